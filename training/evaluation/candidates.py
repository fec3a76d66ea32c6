"""Which checkpoints are evaluated: of a run the first, every N-th and the last; and external models, those
made by others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import ConfigError
from training.names import CheckpointName, check_name
from training.records import read_record, write_record

FILE = "rivals.json"
_FORMAT = 1


def due(saved: Sequence[int], *, interval: int, every: int, num_samples: int) -> list[int]:
    """The checkpoints of a run that are to be evaluated, by their samples_seen.

    Args:
        saved: samples_seen of those that are there, oldest first; a stopped run has some between
            the intervals.
        interval: Samples between checkpoints; each that is the first at or after a multiple has
            that number.
        every: Every so many-th number is evaluated, number 1 and the end of the run always.
        num_samples: At which the run ends.
    """
    found, before = [], 0
    for samples_seen in saved:
        number = samples_seen // interval
        regular = number > before and (number == 1 or number % every == 0)
        if regular or samples_seen >= num_samples:
            found.append(samples_seen)
        before = number
    return found


def read_external_models(home: Path) -> dict[str, str]:
    """Name to path of the workspace's external models, by name.

    Raises:
        DamageError: rivals.json cannot be read.
    """

    def build(values: dict[str, Any]) -> dict[str, str]:
        return {name: str(home / model) for name, model in sorted(values["rivals"].items())}

    try:
        return read_record(home / FILE, _FORMAT, build)
    except FileNotFoundError:
        return {}


def add_external_model(home: Path, name: str, model: Path) -> str:
    """Enter a model that others made; returns its name as a checkpoint.

    Raises:
        ConfigError: the name breaks the rule or is taken by another model.
    """
    check_name("external model", name)
    externals = read_external_models(home)
    if externals.get(name, str(model)) != str(model):
        raise ConfigError(
            f"external model {name!r} is {externals[name]} already; choose another name"
        )
    _write(home, {**externals, name: str(model)})
    return str(CheckpointName.of_external(name))


def remove_external_model(home: Path, name: str) -> None:
    """Strike an external model off the list; its images and scores stay.

    Raises:
        ConfigError: there is no such external model.
    """
    externals = read_external_models(home)
    if name not in externals:
        raise ConfigError(
            f"there is no external model {name!r}; there are: {', '.join(externals) or 'none'}"
        )
    _write(home, {key: path for key, path in externals.items() if key != name})


def _write(home: Path, externals: dict[str, str]) -> None:
    """Write the list; models inside the workspace are named from there, so that they move with
    it."""
    inside = {name for name, model in externals.items() if Path(model).is_relative_to(home)}
    named = {
        name: str(Path(path).relative_to(home)) if name in inside else path
        for name, path in externals.items()
    }
    write_record(home / FILE, _FORMAT, {"rivals": named})
