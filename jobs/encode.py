"""Latents of an encoding, shard by shard."""

import dagster as dg

JOB = dg.define_asset_job(
    "encode",
    selection=dg.AssetSelection.assets("latents"),
    description="Encode the kept pictures of shards.",
)
