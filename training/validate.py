"""The plain loss on fixed lists of images, with the same prompts, noise and timesteps every time.

Two lists: held-out images, and the stable list of training images; a gap between them is overfitting.
"""

from collections.abc import Callable

import numpy as np
import torch

from training import noise
from training.dataset import Batch, Dataset
from training.ranks import Ranks
from training.seeds import Purpose

PlainLosses = Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, timesteps `(B,)`, noise `(B, 4, h, w)`), all on the CPU, to the unweighted loss per sample `(B,)`."""


def validation_loss(
    rows: np.ndarray, dataset: Dataset, losses_of: PlainLosses, ranks: Ranks, num_timesteps: int
) -> float | None:
    """Mean plain loss over the samples of `rows`; None for an empty list. All ranks call it and get the same number.

    Args:
        rows: Rows of the training set, in order; the timesteps' strata are dealt over them.
        dataset: With the latents of the present epoch.
        losses_of: One forward pass.
        ranks: Each takes every `size`-th micro-batch.
        num_timesteps: Of the noise schedule.
    """
    if not len(rows):
        return None
    seed = dataset.config.seed
    timesteps = noise.stratified_timesteps(seed, [dataset.image_ids[row] for row in rows], num_timesteps)
    losses = torch.zeros(len(rows), dtype=torch.float32)
    for positions in _micro_batches(rows, dataset)[ranks.rank :: ranks.size]:
        batch = dataset.batch(rows[positions], None)
        draw = noise.draw_noise(seed, Purpose.VALIDATION, 0, batch.image_ids, batch.latents.shape[1:])
        with torch.no_grad():
            losses[positions] = losses_of(batch, timesteps[positions], draw).float().cpu()
    # Every element comes from one rank, so the sum is exact and the mean does not depend on the number of ranks.
    return ranks.sum_(losses.to(ranks.device)).double().mean().item()


def _micro_batches(rows: np.ndarray, dataset: Dataset) -> list[np.ndarray]:
    """Positions in `rows`, cut into micro-batches of one bucket and one number of chunks."""
    keys = np.column_stack([dataset.buckets[rows], dataset.count_chunks(rows, None)])
    groups, member_of = np.unique(keys, axis=0, return_inverse=True)
    size = dataset.config.batch.micro_batch_size
    cut: list[np.ndarray] = []
    for group in range(len(groups)):
        members = np.flatnonzero(member_of.reshape(-1) == group)
        cut += np.split(members, range(size, len(members), size))
    return cut
