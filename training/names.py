"""Rules that options of every configuration share; each error names the option, its value and the
rule."""

import re

from training.errors import ConfigError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
"""Names of runs, encodings, sources and models: safe in paths, partition keys and SQL."""


RESERVED = ("base.", "rival.")
"""Begin the names of checkpoints that no run of the workspace has made."""


def check_name(kind: str, name: str) -> str:
    """Return `name` if it may name a `kind`; raise ConfigError that states the rule otherwise."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"{kind} name {name!r} must match {NAME_PATTERN.pattern}")
    return name


def check_run_name(name: str) -> str:
    """Return `name` if it may name a run: those of the base model and of rivals are taken."""
    if check_name("run", name).startswith(RESERVED):
        raise ConfigError(f"run name {name!r} must not begin with {' or '.join(RESERVED)}")
    return name


def check_positive(owner: str, **values: float) -> None:
    """Raise ConfigError unless all values are greater than 0; `owner` names their table."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{owner}.{name}={value} must be greater than 0")


def check_fractions(owner: str, **values: float) -> None:
    """Raise ConfigError unless all values lie between 0 and 1; `owner` names their table."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{owner}.{name}={value} must lie between 0 and 1")
