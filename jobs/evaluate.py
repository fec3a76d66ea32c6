"""Sample images of a checkpoint, their scores, and the verdict against the base."""

import dagster as dg

from assets import eval_metrics, sample_images, verdicts
from resources.workspace.store import Store

STAGES = (sample_images.STAGE, eval_metrics.METRICS, verdicts.VERDICTS)
"""What evaluating a checkpoint means, in order."""
JOB = dg.define_asset_job(
    "evaluate",
    selection=dg.AssetSelection.assets(*(stage.name for stage in STAGES)),
    description="Sample a checkpoint with the fixed prompts, score the pictures, compare with the base.",
)


def is_evaluated(store: Store, checkpoint: str) -> bool:
    """Whether pictures, scores and verdict of a checkpoint are those that would be made now."""
    return all(store.currency.is_current(stage, checkpoint) for stage in STAGES)


def keep(store: Store, checkpoint: str) -> None:
    """Keep a checkpoint from its run's retention until its pictures are drawn.

    Raises:
        DataError: retention was faster.
    """
    if not store.currency.is_current(sample_images.STAGE, checkpoint):
        store.checkpoints.keep(checkpoint, sample_images.WANTED_BY)
