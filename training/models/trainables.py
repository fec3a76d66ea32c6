"""Which trainable a run has: the only place that decides it."""

from collections.abc import Callable

from training.config.run import RunConfig
from training.errors import ConfigError
from training.models.full_model import FullModel
from training.models.trainable import Trainable

TRAINABLES: dict[str, Callable[[RunConfig], Trainable]] = {}
"""What a run's `trainable` may name, beside the whole model, which has no name."""


def trainable_of(config: RunConfig) -> Trainable:
    """What a run trains.

    Raises:
        ConfigError: `trainable` names nothing that is known.
    """
    if config.trainable is None:
        return FullModel(config)
    if config.trainable not in TRAINABLES:
        known = ", ".join(sorted(TRAINABLES)) or "none"
        raise ConfigError(
            f"trainable={config.trainable!r} is not known ({known}); leave it out to train the whole UNet"
        )
    return TRAINABLES[config.trainable](config)
