"""How a run scales, on paper: what its ranks send to each other in a step, and the largest
micro-batch of a card."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from training.config.run import RunConfig, shares_optimizer
from training.estimates.memory import MemoryEstimate

NETWORKS = (10, 100, 400)
"""Gbit/s that a rank sends and receives at."""
_BITS = 8
_GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that each rank sends in a step, and receives as many."""

    gradients: float
    """To make the gradients of all ranks one sum."""
    weights: float
    """To tell the others the weights that it has stepped for them; 0 unless the optimizer is shared
    out."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights

    def seconds(self, gigabits: float) -> float:
        """How long it takes at so many Gbit/s per rank, if nothing else does."""
        return self.total * _BITS / (gigabits * _GIGA)


def step_traffic(
    config: RunConfig, num_trained: int, num_ranks: int, num_micro_batches: float
) -> Traffic:
    """What the ranks of a run send in one step.

    Args:
        config: Reduction, precision and sharding of the run.
        num_trained: Trained parameters.
        num_ranks: Of the run; one sends nothing.
        num_micro_batches: Of a step, over all ranks.

    Source: ring all-reduce, Patarasuk and Yuan 2009: 2 (w - 1) / w of the buffer; a ring gathers w
    - 1 of them.
    """
    others = (num_ranks - 1) / num_ranks
    buffer = 4.0 * num_trained
    if config.reduction == "fast":
        gradients = 2 * others * buffer
    else:  # every rank gathers every other's gradients after each round of micro-batches
        gradients = max(1.0, num_micro_batches / num_ranks) * (num_ranks - 1) * buffer
    shared = shares_optimizer(config, num_ranks)
    weight = 2.0 if config.precision == "bf16" else 4.0
    return Traffic(gradients=gradients, weights=others * weight * num_trained if shared else 0.0)


def largest_micro_batch(estimate: Callable[[int], MemoryEstimate], memory_bytes: float) -> int:
    """The largest micro-batch that a card holds; 0 where it does not hold one sample.

    Args:
        estimate: Memory of a run by its micro-batch, which grows with it.
        memory_bytes: Of the card.
    """
    fits, fails = 0, 1
    while estimate(fails).total <= memory_bytes:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if estimate(middle).total <= memory_bytes else (fits, middle)
    return fits


def without_checkpointing(config: RunConfig, micro_batch_size: int) -> RunConfig:
    """The run with another micro-batch, and nothing that is computed again to save memory."""
    batch = dataclasses.replace(
        config.batch,
        micro_batch_size=micro_batch_size,
        global_batch_size=max(micro_batch_size, config.batch.global_batch_size),
    )
    compute = dataclasses.replace(config.compute, gradient_checkpointing=())
    return dataclasses.replace(config, batch=batch, compute=compute)
