"""Latents of an encoding, shard by shard."""

import dagster as dg

from assets.partitions import encoding_shards

JOB = dg.define_asset_job(
    "encode",
    selection=dg.AssetSelection.assets("latents"),
    partitions_def=encoding_shards,
    description="Encode the kept pictures of shards.",
)
