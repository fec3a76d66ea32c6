"""Work per shard of candidates: decode, then show each picture to all annotators."""

import dagster as dg

from assets import annotations

JOB = dg.define_asset_job(
    "annotate",
    selection=dg.AssetSelection.assets("raw_images", *annotations.STAGES),
    description="Read the pictures of shards and annotate them.",
)
