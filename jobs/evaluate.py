"""Sample images of a checkpoint, their scores, and the verdict against the base."""

import dagster as dg

from assets import sample_images
from assets.registry import chosen, in_groups
from resources.graph import Scope
from resources.workspace.store import Store

STAGES = in_groups("evaluate", scope=Scope.CHECKPOINT)
"""What evaluating a checkpoint means, in order."""
JOB = dg.define_asset_job(
    "evaluate",
    selection=chosen("evaluate", scope=Scope.CHECKPOINT),
    description="Sample a checkpoint with the fixed prompts, score the images, compare with the base.",
)


def is_evaluated(store: Store, checkpoint: str) -> bool:
    """Whether images, scores and verdict of a checkpoint are those that would be made now."""
    return all(store.currency.is_current(stage, checkpoint) for stage in STAGES)


def keep(store: Store, checkpoint: str) -> None:
    """Keep a checkpoint from its run's retention until its images are drawn.

    Raises:
        DataError: retention was faster.
    """
    if not store.currency.is_current(sample_images.sample_images, checkpoint):
        store.checkpoints.keep(checkpoint, sample_images.WANTED_BY)
