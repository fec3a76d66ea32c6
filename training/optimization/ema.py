"""Averaged weights: an exponential moving average whose half-life is counted in samples, in fp32
beside the model."""

import contextlib
from collections.abc import Iterator, Mapping

import torch


class Ema:
    """Shadows of the trained weights, by name."""

    def __init__(self, weights: Mapping[str, torch.Tensor], half_life_samples: int) -> None:
        """Start from the present weights.

        Args:
            weights: The trained ones in fp32, by name.
            half_life_samples: After so many samples a weight's past counts half.
        """
        self.half_life_samples = half_life_samples
        self.shadows = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(
        self, weights: Mapping[str, torch.Tensor], num_samples: int, steps_before: int | None = None
    ) -> None:
        """Move the shadows of some weights after a step.

        Args:
            weights: By name, after the step.
            num_samples: Of the step.
            steps_before: Steps that were averaged before this one, for the warm-up; None for no
                warm-up.

        Source: diffusers' EMAModel and OneTrainer. After the first step diffusers keeps nothing of
        where the average began, this a tenth, which is below 1 % from the third step on.
        """
        decay = 0.5 ** (num_samples / self.half_life_samples)
        if steps_before is not None:
            decay = min(decay, (1 + steps_before) / (10 + steps_before))
        names = list(weights)
        own = [weights[name].detach() for name in names]
        torch._foreach_lerp_([self.shadows[name] for name in names], own, 1 - decay)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from saved shadows; names that are not ours are another rank's.

        Raises:
            KeyError: a shadow is missing.
            ValueError: a shadow has another shape.
        """
        for name, shadow in self.shadows.items():
            if state[name].shape != shadow.shape:
                raise ValueError(
                    f"average of {name} is {list(state[name].shape)} instead of {list(shadow.shape)}"
                )
            shadow.copy_(state[name])

    @contextlib.contextmanager
    def swapped(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
        """The model holds the averaged weights inside the block, in its own precision, and its own
        afterwards."""
        kept = {name: parameters[name].data for name in self.shadows}
        try:
            for name, shadow in self.shadows.items():
                parameters[name].data = shadow.to(kept[name].dtype)
            yield
        finally:
            for name, own in kept.items():
                parameters[name].data = own
