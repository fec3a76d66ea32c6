"""What a run's ranks, cards and networks have to hold and send, as lines for people: for `foundry
train --dry-run`."""

from collections.abc import Callable
from dataclasses import fields

from training.config.run import RunConfig
from training.estimates.gpus import Gpu
from training.estimates.memory import MemoryEstimate
from training.estimates.scale import (
    NETWORKS,
    largest_micro_batch,
    step_traffic,
    without_checkpointing,
)

_GIGA = 1e9
WANTED_MICRO_BATCH = 16
"""What stands between the largest micro-batch and this is told in bytes: bigASP's, with
checkpointing."""

Shape = tuple[int, int, int]
"""Height and width in pixels, and text chunks."""


def memory_lines(
    estimated: Callable[[RunConfig], MemoryEstimate], config: RunConfig, card: Gpu, shape: Shape
) -> list[str]:
    """Memory by part, and the largest micro-batch without gradient checkpointing.

    Args:
        estimated: Memory of one rank by config, for samples of `shape`.
        config: Of the run.
        card: That each rank has.
        shape: The largest of the run.
    """
    memory, (height, width, num_chunks) = estimated(config), shape
    lines = [f"memory per card: about {_gigabytes(memory.total)} ({_parts(memory)})"]
    if memory.total > card.memory_bytes:
        lines.append(
            f"memory: more than the {card.memory_bytes / _GIGA:.0f} GB of one {card.name}; lower "
            "batch.micro_batch_size, or set compute.gradient_checkpointing or compute.shard_optimizer"
        )

    def plain(micro_batch_size: int) -> MemoryEstimate:
        return estimated(without_checkpointing(config, micro_batch_size))

    largest = largest_micro_batch(plain, card.memory_bytes)
    lines.append(
        f"largest micro-batch of {height}x{width} with {num_chunks} x 77 tokens, without gradient checkpointing: "
        f"{largest} on one {card.name} of {_gigabytes(card.memory_bytes)}"
    )
    if largest < WANTED_MICRO_BATCH:
        wanted = plain(WANTED_MICRO_BATCH)
        lines.append(
            f"a micro-batch of {WANTED_MICRO_BATCH} takes {_gigabytes(wanted.total - card.memory_bytes)} more than it "
            f"has: {_parts(wanted)}, of which {_gigabytes(plain(1).activations)} per sample"
        )
    return lines


def network_lines(
    config: RunConfig, num_trained: int, num_ranks: int, num_micro_batches: float, step_s: float
) -> list[str]:
    """What a rank sends in a step, and how long that takes beside the step itself; nothing for one
    rank.

    Args:
        config: Of the run.
        num_trained: Trained parameters.
        num_ranks: Of the run.
        num_micro_batches: Of a step, over all ranks.
        step_s: Seconds that its cards compute for a step.
    """
    if num_ranks == 1:
        return []
    traffic = step_traffic(config, num_trained, num_ranks, num_micro_batches)
    how = (
        "all-reduced"
        if config.reduction == "fast"
        else "gathered after every round of micro-batches"
    )
    sent = f"gradients {_gigabytes(traffic.gradients)}, {how}"
    if traffic.weights:
        sent += f"; stepped weights {_gigabytes(traffic.weights)}"
    seconds = ", ".join(f"{traffic.seconds(speed):.3g} s at {speed} Gbit/s" for speed in NETWORKS)
    lines = [
        f"network: each of {num_ranks} ranks sends and receives {_gigabytes(traffic.total)} a step ({sent})",
        f"network: {seconds} per rank, beside {step_s:.3g} s of computing a step",
    ]
    if num_micro_batches < num_ranks:
        lines.append(
            f"ranks: a step has {num_micro_batches:.3g} micro-batches, fewer than {num_ranks} ranks: the others wait; "
            "lower batch.micro_batch_size"
        )
    return lines


def _parts(memory: MemoryEstimate) -> str:
    names = [part.name for part in fields(memory) if not part.name.startswith("num_")]
    return ", ".join(f"{name} {getattr(memory, name) / _GIGA:.2f}" for name in names)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / _GIGA:.2f} GB"
