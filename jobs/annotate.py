"""Work per shard of candidates: decode, then show each image to all annotators."""

import dagster as dg

from assets.registry import chosen
from resources.graph import Scope

JOB = dg.define_asset_job(
    "annotate",
    selection=chosen("ingest", "annotate", scope=Scope.SHARD),
    description="Read the images of shards and annotate them.",
)
