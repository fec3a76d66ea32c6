"""What a stage is: its partitions, what it reads, and what its output follows from; and the order of
all stages, which follows from that."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from training import toml
from training.config.workspace import WorkspaceConfig
from training.errors import DeclarationError
from training.names import OwnedPart, ShardKey
from training.tables.schemas import TABLES


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
    """A stage of the graph, declared once: a decorator of the function that makes it.

    The stage is named and described by its function, unless the declaration does so: one function
    may make several stages. From the declaration follow the Dagster asset with its dependencies,
    the stage's place in the order, what is stale, and what the function may read.
    """

    name: str = ""
    """The asset's; the function's by default."""
    version: int
    """Raised by hand when its output changes for equal inputs."""
    scope: Scope
    group: str = ""
    """Where Dagster shows it, and which job makes it."""
    kinds: tuple[str, ...] = ()
    """What Dagster marks it with; `parquet` is understood."""
    description: str = ""
    """What a row is; the function's docstring by default."""
    table: str = ""
    """The table that it writes, alone or with other stages; by default the one of its name."""
    reads: tuple[Reads, ...] = ()
    """Slices of tables: a change of one makes the stage stale."""
    follows: tuple[Reads, ...] = ()
    """Tables that it depends on in another way: `others` digests them, or it freezes them once."""
    also: tuple[Reads, ...] = ()
    """Tables that it only looks at, for its report or because it wrote them before: they make
    nothing stale, and no order follows from them."""
    config: Callable[[WorkspaceConfig, str], Any] = nothing
    """The section of foundry.toml that it reads."""
    settings: str = ""
    """Where in foundry.toml that section's keys stand, dotted; `{key}` and `{encoding}` are the
    partition's."""
    models: tuple[str, ...] = ()
    """Keys under [models] whose weights it runs; `vae` is that of the partition's encoding."""
    others: Callable[[Any, str], Mapping[str, str]] = no_others
    """Digests of inputs that are no slices: folders, files people made, runs. Given the `Store`,
    which this module does not know: it is made of what is declared here."""
    model: str = ""
    """For tables with rows per model: the model whose rows this stage writes."""
    prefix: str = ""
    """For tables whose parts are pairs: what stands before the partition's key."""
    in_use: Callable[[WorkspaceConfig], bool] = always
    """Whether a workspace wants it; where it does not, nothing of it is ever stale."""
    body: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    """The function that makes it, with the context and the store."""

    def __post_init__(self) -> None:
        if not self.table:
            object.__setattr__(self, "table", self.name)

    def __call__(self, body: Callable[..., Any]) -> "Stage":
        """The stage that `body` makes."""
        description = self.description or inspect.getdoc(body) or ""
        return replace(self, name=self.name or body.__name__, description=description, body=body)

    @property
    def parents(self) -> tuple[str, ...]:
        """Tables that the stage comes after."""
        return tuple(dict.fromkeys(item.table for item in (*self.reads, *self.follows)))

    def lacks(self, table: str, columns: Sequence[str]) -> str:
        """What the declaration does not name of a table that is to be read: the table, columns of
        it, or nothing.

        Args:
            table: Its name.
            columns: Its columns that are to be read; none for all of them.
        """
        declared = [
            item for item in (*self.reads, *self.follows, *self.also) if item.table == table
        ]
        if not declared:
            return f"table {table}"
        if any(not item.columns for item in declared):
            return ""
        known = {name for item in declared for name in item.columns}
        unknown = [name for name in columns or TABLES[table].columns if name not in known]
        return f"{', '.join(unknown)} of table {table}" if unknown else ""

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


def bodies(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Stages by the function that makes them, in the order of the first of each."""
    found: dict[int, list[Stage]] = {}
    for stage in stages:
        found.setdefault(id(stage.body), []).append(stage)
    return list(found.values())


def writers(table: str, stages: Iterable[Stage]) -> list[Stage]:
    """The stages that write parts of a table."""
    return [stage for stage in stages if stage.table == table]


def ordered(stages: Sequence[Stage]) -> dict[str, Stage]:
    """Stages by name, each after all that it reads; else in the order that they are given in.

    Raises:
        DeclarationError: two have one name or write the same parts, one reads a table that no stage
            writes, some of one body have other scopes, or some wait for each other.
    """
    _check(stages)
    waiting, found = bodies(stages), dict[str, Stage]()
    for body in waiting:
        if len({stage.scope for stage in body}) > 1:
            names = ", ".join(stage.name for stage in body)
            raise DeclarationError(f"stages {names} have one body, so they need one scope")
    while waiting:
        left = [stage for body in waiting for stage in body]
        for body in waiting:
            tables = {table for stage in body for table in stage.parents}
            if not any(one.table in tables and one not in body for one in left):
                break
        else:
            raise DeclarationError(
                f"stages {', '.join(stage.name for stage in left)} read each other in a circle"
            )
        waiting.remove(body)
        found |= {stage.name: stage for stage in body}
    return found


def _check(stages: Sequence[Stage]) -> None:
    """Refuse declarations that cannot stand together."""
    names, parts = set[str](), set[tuple[str, str]]()
    for stage in stages:
        part = (stage.table, stage.part("KEY"))
        if stage.name in names or part in parts:
            raise DeclarationError(
                f"stage {stage.name}: another stage has its name, or writes the same parts of table "
                f"{stage.table}; give it a name and a `model` of its own"
            )
        names.add(stage.name)
        parts.add(part)
        for item in (Reads(stage.table), *stage.reads, *stage.follows, *stage.also):
            schema = TABLES[item.table].columns if item.table in TABLES else {}
            unknown = [name for name in item.columns if name not in schema]
            if unknown or not schema:
                wrong = f"column {unknown[0]} of table" if schema else "table"
                raise DeclarationError(
                    f"stage {stage.name} names {wrong} {item.table}, which no schema has"
                )
        if missing := [name for name in stage.parents if not writers(name, stages)]:
            raise DeclarationError(
                f"stage {stage.name} reads table {missing[0]}, which no stage writes"
            )
