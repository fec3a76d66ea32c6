"""A training run: started here, or attached to where it already runs."""

import dagster as dg

JOB = dg.define_asset_job(
    "train",
    selection=dg.AssetSelection.assets("prompt_statistics", "checkpoints"),
    description="Start or resume a training run and follow it to its end.",
)
