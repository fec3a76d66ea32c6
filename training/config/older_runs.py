"""Runs that older versions began: what they did before an option existed, so that every resume goes
on as it began."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from training import toml
from training.config.run import RunConfig

BEFORE: Mapping[str, Any] = {
    "rules_version": 1,
    "optimizer.ema_warmup": False,
    "prompts.missing_space_prob": 0.0,
}
"""Options that change results, and what those runs did whose recorded config does not know them."""
_TEXT_RATE = "optimizer.text_encoder_learning_rate"


def build(values: Mapping[str, Any], origin: Path | None = None) -> RunConfig:
    """A run's config as it was recorded; an option that it lacks is as its version did it.

    Raises:
        ConfigError: a key or value cannot be used.
    """
    flat = {**toml.flatten(values), **_before(lacking(values))}
    if flat["rules_version"] in (1, 2) and flat.get(_TEXT_RATE) == 0:
        flat[_TEXT_RATE] = None  # the UNet's rate, in those versions
    if flat.get("compute.compile") is True:
        flat["compute.compile"] = "whole"  # its only way then
    return toml.build(RunConfig, _nested(flat), origin=origin)


def lacking(values: Mapping[str, Any]) -> set[str]:
    """The options of `BEFORE` that a recorded config lacks."""
    return BEFORE.keys() - toml.flatten(values).keys()


def as_begun(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """A recipe's config for a run that was begun: options that its recorded config lacks, and that
    the recipe leaves at their defaults, stay as the run began; and so does the precision, which
    those versions did not leave to the device."""
    own, defaults = (
        toml.flatten(toml.dump(one)) for one in (config, RunConfig(encoding=config.encoding))
    )
    unknown = lacking(recorded)
    kept = _before({key for key in unknown if own[key] == defaults[key]})
    if own["rules_version"] == defaults["rules_version"]:
        kept["rules_version"] = recorded.get("rules_version", BEFORE["rules_version"])
    if "rules_version" in unknown and own["precision"] == "auto":
        kept["precision"] = recorded.get("precision", "auto")
    return toml.build(RunConfig, _nested({**own, **kept}))


def comparable(config: RunConfig) -> dict[str, Any]:
    """A config without the options that are as in `BEFORE`: equal to what older versions would have
    said."""
    values = toml.flatten(toml.dump(config))
    return _nested(
        {key: value for key, value in values.items() if key not in BEFORE or value != BEFORE[key]}
    )


def without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Nested values without some dotted keys."""
    return _nested({key: value for key, value in toml.flatten(values).items() if key not in keys})


def _before(keys: Collection[str]) -> dict[str, Any]:
    return {key: BEFORE[key] for key in keys}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `toml.flatten`."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        table = tables
        *parents, last = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                break  # a value where a table belongs: `toml.build` names it
        else:
            table[last] = value
    return tables
