"""The optimizer and its learning rate, whose clock is samples trained on, skipped steps left out."""

import math
from collections.abc import Iterable

import torch

from training.run_config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with one group, fused (one pass over the weights); its learning rate is set before every step."""
    return torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, samples: float, num_samples: int) -> float:
    """The rate at a point of the run.

    Args:
        config: Peak, shape and warm-up.
        samples: Samples trained on; the trainer asks for the middle of a step, so that neither the first step nor
            the last has a rate of 0.
        num_samples: Length of the run.
    """
    warmup = min(1.0, samples / config.warmup_samples) if config.warmup_samples else 1.0
    if config.schedule == "constant" or samples < config.warmup_samples:
        return config.learning_rate * warmup
    done = min(1.0, (samples - config.warmup_samples) / max(1, num_samples - config.warmup_samples))
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups of an optimizer the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
