"""What a stage is: its partitions, what it reads, and what its output follows from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from training import toml
from training.config.workspace import WorkspaceConfig
from training.names import OwnedPart, ShardKey


class Scope(StrEnum):
    """How a stage is partitioned."""

    ALL = "all"
    SHARD = "shard"
    ENCODING = "encoding"
    ENCODING_SHARD = "encoding_shard"
    MODEL = "model"
    PROMPT_SET = "prompt_set"
    RUN = "run"
    CHECKPOINT = "checkpoint"


class Per(StrEnum):
    """Which part of an input a partition reads."""

    ALL = "all"
    """Every part."""
    SHARD = "shard"
    """The parts of the partition's own shard."""
    ROWS = "rows"
    """The rows of a whole table that lie in the partition's shard."""
    ENCODING = "encoding"
    """The part of the partition's own encoding."""
    ENCODING_ROWS = "encoding_rows"
    """The rows of the encoding's part that lie in the partition's shard."""
    ENCODING_ALL = "encoding_all"
    """The parts of every shard in the partition's encoding."""
    KEY = "key"
    """The part with the partition's own key."""


@dataclass(frozen=True, slots=True)
class Reads:
    """A slice of an input table: the stage is stale when this slice changes, and only then."""

    table: str
    columns: tuple[str, ...] = ()
    """Named columns; empty for all of them."""
    per: Per = Per.ALL
    """Which parts or rows."""

    @property
    def label(self) -> str:
        """How manifests name the slice."""
        return f"{self.table}:{self.per.value}:{','.join(self.columns) or '*'}"


def nothing(config: WorkspaceConfig, key: str) -> Any:
    """For stages that read no section of the configuration."""
    return {}


def no_others(store: Any, key: str) -> Mapping[str, str]:
    """For stages whose inputs are all tables."""
    return {}


def always(config: WorkspaceConfig) -> bool:
    """For stages that every workspace wants."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the graph."""

    name: str
    """Of its asset."""
    version: int
    """Raised by hand when its output changes for equal inputs."""
    scope: Scope
    reads: tuple[Reads, ...] = ()
    """Slices of tables."""
    config: Callable[[WorkspaceConfig, str], Any] = nothing
    """The section of foundry.toml that it reads."""
    settings: str = ""
    """Where in foundry.toml that section's keys stand, dotted; `{key}` and `{encoding}` are the
    partition's."""
    models: tuple[str, ...] = ()
    """Keys under [models] whose weights it runs; `vae` is that of the partition's encoding."""
    others: Callable[[Any, str], Mapping[str, str]] = no_others
    """Digests of inputs that are no tables: folders, files people made, runs. Given the `Store`,
    which this module does not know: it is made of what is declared here."""
    model: str = ""
    """For tables with rows per model: the model whose rows this stage writes."""
    prefix: str = ""
    """For tables whose parts are pairs: what stands before the partition's key."""
    table: str = ""
    """Table that it writes parts of, where that is not called like the stage: several stages may
    write to one table, each under the name of its model."""
    in_use: Callable[[WorkspaceConfig], bool] = always
    """Whether a workspace wants it; where it does not, nothing of it is ever stale."""

    def __post_init__(self) -> None:
        if not self.table:
            object.__setattr__(self, "table", self.name)

    def part(self, key: str) -> str:
        """Name of the part that holds the partition `key`."""
        name = f"{self.prefix}{key}"
        return str(OwnedPart(name, self.model)) if self.model else name

    def section(self, config: WorkspaceConfig, key: str) -> Any:
        """The section of the configuration that a partition follows from, as plain values."""
        section = self.config(config, key)
        return section if isinstance(section, Mapping) else toml.dump(section)

    def settings_of(self, key: str) -> str:
        """Where in foundry.toml the section of a partition stands (`encodings.sdxl`)."""
        return self.settings.format(key=key, encoding=self.encoding(key))

    def shard(self, key: str) -> str:
        """The shard of a partition key (`sdxl|s000012` -> `s000012`)."""
        return ShardKey.parse(key).shard if self._by_encoding_and_shard else key

    def encoding(self, key: str) -> str:
        """The encoding of a partition key (`sdxl|s000012` -> `sdxl`)."""
        return ShardKey.parse(key).encoding if self._by_encoding_and_shard else key

    @property
    def _by_encoding_and_shard(self) -> bool:
        return self.scope is Scope.ENCODING_SHARD
