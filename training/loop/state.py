"""What the steps of a run change, and a copy of it between two steps."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from training.models.trainable import Trainable
from training.models.unet import PipelineParts
from training.optimization.ema import Ema
from training.optimization.offload import Offload
from training.optimization.optim import optimizer_state
from training.optimization.precision import Arithmetic
from training.optimization.sharding import Sharding


@dataclass(slots=True, kw_only=True)
class Clock:
    """Where a run stands: the border after its last finished step."""

    samples_seen: int = 0
    """Samples that steps were made from, skipped steps included: the run's clock."""
    samples_trained: int = 0
    """Without those of skipped steps: the learning rate's clock."""
    step: int = 0
    """Steps behind us."""
    epoch: int = 0
    """The epoch of the next step."""
    step_in_epoch: int = 0
    """The next step's place in its epoch."""
    num_skipped: int = 0
    """Steps that were not finite."""
    skipped_in_row: int = 0
    """Of those, since the last finite one."""
    validation_loss: float | None = None
    """The last plain one on the held-out images; None before the first, and where that was not
    finite."""
    validation_owed: bool = False
    """Whether a stop request dropped a validation that was due at this border."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the gradient scaler, where there is one."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Everything that steps change."""

    trainable: Trainable
    """What is trained, and how it is saved."""
    parts: PipelineParts
    parameters: dict[str, torch.nn.Parameter]
    """The trained ones as the model holds them, by name."""
    sharding: Sharding
    """Which of them this rank's optimizer steps."""
    arithmetic: Arithmetic
    """Precision, with the fp32 weights that the optimizer steps."""
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    """Of this rank's share."""
    clock: Clock

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block, and its own afterwards; all ranks
        enter it."""
        assert self.ema is not None, "nothing is averaged"
        with self.ema.swapped(self.parameters):
            self.sharding.publish()
            yield
        self.sharding.publish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state between two steps, copied to rank 0's CPU."""

    trainable: Trainable
    """How it is saved."""
    parts: PipelineParts
    """Of which only what is not trained is read."""
    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor]
    """What `bf16` rounded in the model and no one trains, as it came; empty where it is not saved."""
    optimizer: dict[str, torch.Tensor]
    clock: Clock


class Capture:
    """A state between two steps, whose copies are still to be made; it must not change until they
    are."""

    def __init__(self, state: TrainingState) -> None:
        """Note what is copied; every rank does so, between the same two steps."""
        self._state = state
        # The tensors themselves: a validation of the averages exchanges what the model's parameters
        # hold.
        self._weights, self._whole = state.arithmetic.stored()
        self._clock = dataclasses.replace(state.clock, scaler=state.arithmetic.scaler_state())
        self._offload = Offload(state.sharding.ranks.device)

    def copy(self) -> Snapshot | None:
        """Copy all that steps change, in any thread; every rank calls it and rank 0 gets it."""
        state, sharding = self._state, self._state.sharding
        weights = self._whole(sharding.collect(self._weights, self._offload))
        averages = (
            sharding.collect(state.ema.shadows, self._offload) if state.ema is not None else {}
        )
        optimizer = optimizer_state(state.optimizer, state.arithmetic.weights)
        moments = sharding.collect(optimizer, self._offload)
        if sharding.ranks.rank != 0:
            return None
        return Snapshot(
            trainable=state.trainable,
            parts=state.parts,
            weights=weights,
            averages=averages,
            frozen=dict(state.arithmetic.frozen),
            optimizer=moments,
            clock=self._clock,
        )
