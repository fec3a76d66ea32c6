"""Sample images of a checkpoint, their scores, and the verdict against the base."""

import dagster as dg

JOB = dg.define_asset_job(
    "evaluate",
    selection=dg.AssetSelection.assets("sample_images", "eval_metrics", "verdicts"),
    description="Sample a checkpoint with the fixed prompts, score the pictures, compare with the base.",
)
