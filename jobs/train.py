"""A training run: started here, or attached to where it already runs."""

import dagster as dg

from assets.registry import chosen
from resources.graph import Scope

JOB = dg.define_asset_job(
    "train",
    selection=chosen("train", scope=Scope.RUN),
    description="Start or resume a training run and follow it to its end.",
)
