"""Names, and the rules that options of every configuration share; each error names the option, its
value and the rule.

Names that hold several values are types here: `str(name)` is what stands in files, tables and
partition keys, and `parse` reads exactly that.
"""

import re
from typing import NamedTuple, Self

from training.errors import ConfigError, DataError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
"""Names of runs, encodings, sources and models: safe in paths, partition keys and SQL."""
BASE = "base."
EXTERNAL = "rival."
RESERVED = (BASE, EXTERNAL)
"""Begin the names of checkpoints that no run of the workspace has made: of the base model, and of
models from outside."""
_THE_BASE = "base"
"""Stands for the base model in names of verdicts."""
_COUNT = re.compile(r"0|[1-9][0-9]*")
_GENERATION = re.compile(r"g([0-9]{4}|[1-9][0-9]{4,})")


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


class CheckpointName(NamedTuple):
    """`<run>@<samples_seen>`: a checkpoint of a run, the base model (`base.<digest8>@0`), or an
    external model (`rival.<name>@0`)."""

    run: str
    """The run; for models that no run of the workspace has made, what stands in its place."""
    samples_seen: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The checkpoint with this name.

        Raises:
            DataError: it is no name of a checkpoint.
        """
        run, _, samples_seen = text.rpartition("@")
        if not run or not _COUNT.fullmatch(samples_seen):
            raise DataError(f"{text!r} is no checkpoint of this workspace (<run>@<samples_seen>)")
        return cls(run, int(samples_seen))

    @classmethod
    def of_base(cls, digest: str) -> Self:
        """The base model whose weights have this digest."""
        return cls(f"{BASE}{digest[:8]}", 0)

    @classmethod
    def of_external(cls, name: str) -> Self:
        """The external model that the workspace knows by this name."""
        return cls(f"{EXTERNAL}{name}", 0)

    def __str__(self) -> str:
        """`demo@2560`."""
        return f"{self.run}@{self.samples_seen}"

    @property
    def is_base(self) -> bool:
        """Whether it is a base model."""
        return self.run.startswith(BASE)

    @property
    def is_external(self) -> bool:
        """Whether it is a model from outside: what becomes of it must not hold up anything else."""
        return self.run.startswith(EXTERNAL)

    @property
    def is_of_run(self) -> bool:
        """Whether a run of the workspace made it."""
        return not self.run.startswith(RESERVED)

    @property
    def external_name(self) -> str:
        """What the workspace calls an external model; empty for other checkpoints."""
        return self.run.removeprefix(EXTERNAL) if self.is_external else ""


class GenerationName(NamedTuple):
    """`g0003`: one encoding pass of a shard."""

    number: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The generation with this name.

        Raises:
            DataError: it is no name of a generation.
        """
        match = _GENERATION.fullmatch(text)
        if match is None:
            raise DataError(f"{text!r} is no generation of latents (g0003)")
        return cls(int(match[1]))

    @classmethod
    def of_manifest(cls, file_name: str) -> Self | None:
        """The generation whose manifest has this file name; None for any other file."""
        stem = file_name.removesuffix(".json")
        return cls.parse(stem) if stem != file_name and _GENERATION.fullmatch(stem) else None

    def __str__(self) -> str:
        """`g0003`."""
        return f"g{self.number:04d}"

    @property
    def manifest(self) -> str:
        """File name of its manifest."""
        return f"{self}.json"


class ShardKey(NamedTuple):
    """`sdxl|s000012`: the partition of a table per encoding and shard."""

    encoding: str
    shard: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The partition with this key.

        Raises:
            DataError: it is none of an encoding and a shard.
        """
        encoding, _, shard = text.partition("|")
        if not encoding or not shard or "|" in shard:
            raise DataError(f"{text!r} is no partition of an encoding and a shard (sdxl|s000012)")
        return cls(encoding, shard)

    def __str__(self) -> str:
        """`sdxl|s000012`."""
        return f"{self.encoding}|{self.shard}"


class VerdictName(NamedTuple):
    """`a~b`: the verdict on checkpoint `b` against `a`, which is `base` for the base model, whatever
    its weights."""

    a: str
    b: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The verdict with this name.

        Raises:
            DataError: it is no name of a verdict.
        """
        a, _, b = text.partition("~")
        if not a or not b or "~" in b:
            raise DataError(f"{text!r} is no verdict between two checkpoints (a~b)")
        return cls(a, b)

    @classmethod
    def against_base(cls, checkpoint: str) -> Self:
        """The verdict on a checkpoint against the base model."""
        return cls(_THE_BASE, checkpoint)

    def __str__(self) -> str:
        """`base~demo@2560`."""
        return f"{self.a}~{self.b}"

    @property
    def is_against_base(self) -> bool:
        """Whether the checkpoint is compared with the base model."""
        return self.a == _THE_BASE


class OwnedPart(NamedTuple):
    """`<owner>.<name>`: a part of one shard by one model (`s000012.joytag`), or of what one stage
    rejected of one partition (`raw_images.s000012`). The owner holds no dot; the name may."""

    owner: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The part with this name.

        Raises:
            DataError: it is no name of such a part.
        """
        owner, _, name = text.partition(".")
        if not owner or not name:
            raise DataError(f"{text!r} is no part of two names (s000012.joytag)")
        return cls(owner, name)

    @staticmethod
    def owner_of(part: str) -> str:
        """The owner of a part; that of a part without a dot is the part itself."""
        return part.partition(".")[0]

    def __str__(self) -> str:
        """`s000012.joytag`."""
        return f"{self.owner}.{self.name}"
