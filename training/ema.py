"""Averaged weights: an exponential moving average whose half-life is counted in samples, in fp32 beside the model."""

import contextlib
from collections.abc import Iterator, Mapping

import torch


class Ema:
    """Shadows of the trained parameters, by name."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], half_life_samples: int) -> None:
        """Start from the present weights.

        Args:
            parameters: The trained ones, by name.
            half_life_samples: After so many samples a weight's past counts half.
        """
        self.half_life_samples = half_life_samples
        self.shadows = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.nn.Parameter], num_samples: int) -> None:
        """Move the shadows after a step of `num_samples` samples."""
        weight = 1 - 0.5 ** (num_samples / self.half_life_samples)
        names = list(self.shadows)
        torch._foreach_lerp_(
            [self.shadows[name] for name in names], [parameters[name].detach() for name in names], weight
        )

    @contextlib.contextmanager
    def swapped(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
        """The model holds the averaged weights inside the block, and its own afterwards."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    def _swap(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for name, shadow in self.shadows.items():
            parameter = parameters[name]
            parameter.data, self.shadows[name] = shadow, parameter.data
