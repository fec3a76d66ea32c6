"""Whole tables, rewritten in seconds: duplicates, vocabulary, quality model, selection."""

import dagster as dg

from assets.registry import chosen
from resources.graph import Scope

JOB = dg.define_asset_job(
    "curate",
    selection=chosen("curate", scope=Scope.ALL),
    description="Rewrite the tables that say which images go on and why.",
)
