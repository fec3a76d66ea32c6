"""Why partitions are stale, in words: what `foundry status`, `foundry run` and the check `current`
say."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resources.graph import Per, Stage
from resources.workspace.store import Store
from training import toml
from training.errors import PipelineError
from training.manifests import Manifest
from training.tables.schemas import TABLES

MAX_VALUE_CHARS = 60
"""A value in a reason is cut after this."""
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class StalePartition:
    """One partition whose committed part is not what would be made now."""

    key: str
    reasons: tuple[str, ...]
    """Each names a setting with its old and new value, a model folder, an input, a version, or what
    is missing."""


@dataclass(frozen=True, slots=True)
class StageStatus:
    """What `store.currency.stale` says of a stage, with the reasons and what the work will cost."""

    stage: str
    num_partitions: int
    stale: tuple[StalePartition, ...]
    seconds: float | None
    """Expected time for the stale partitions, from those made before; None where none was."""
    follows: tuple[str, ...] = ()
    """Stale stages that this one reads from, directly or not: it may become stale with them."""
    error: str = ""
    """Why the stage cannot be judged, a missing model for example."""

    @property
    def sentence(self) -> str:
        """`3 of 10 partitions stale: [selection] min_score 1 → 3`, or that all is current."""
        if self.error:
            return f"cannot be judged: {self.error}"
        if not self.stale:
            return "current" if self.num_partitions else "no partition yet"
        counted = (
            f"{len(self.stale)} of {self.num_partitions} partitions stale"
            if self.num_partitions > 1
            else "stale"
        )
        return f"{counted}: {'; '.join(grouped(self.stale))}"


def grouped(stale: Sequence[StalePartition]) -> list[str]:
    """The reasons of several partitions, each once, the most frequent first; with a count where not
    all have it."""
    counts: dict[str, int] = {}
    for partition in stale:
        for reason in partition.reasons:
            counts[reason] = counts.get(reason, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [reason if count == len(stale) else f"{reason} ({count})" for reason, count in ordered]


def status_of(store: Store, stage: Stage) -> StageStatus:
    """The state of one stage; what stands in the way of judging it becomes its `error`."""
    try:
        keys = store.currency.keys(stage.scope)
        stale = tuple(
            StalePartition(key, reasons(store, stage, key)) for key in store.currency.stale(stage)
        )
    except PipelineError as error:
        return StageStatus(stage.name, 0, (), None, error=" ".join(str(error).split()))
    return StageStatus(stage.name, len(keys), stale, _expected_seconds(store, stage, len(stale)))


def status(
    store: Store, stages: Mapping[str, Stage], parents: Mapping[str, set[str]]
) -> list[StageStatus]:
    """The state of every stage, in order.

    Args:
        store: The workspace.
        stages: Stages by name, each after all that it reads.
        parents: What each stage reads from, by name.
    """
    found: list[StageStatus] = []
    upstream: dict[str, set[str]] = {}
    unsettled: set[str] = set()
    for name, stage in stages.items():
        above = parents.get(name, set())
        upstream[name] = above.union(*(upstream.get(parent, set()) for parent in above))
        one = status_of(store, stage)
        if one.stale or one.error:
            unsettled.add(name)
        follows = tuple(other for other in stages if other in upstream[name] & unsettled)
        found.append(
            StageStatus(name, one.num_partitions, one.stale, one.seconds, follows, one.error)
        )
    return found


def reasons(store: Store, stage: Stage, key: str) -> tuple[str, ...]:
    """Why a stale partition is stale; empty for one that is current."""
    manifest, basis = store.manifest(stage.table, stage.part(key)), store.currency.basis(stage, key)
    if basis is None:
        missing = [
            reads.table for reads in stage.reads if store.slices.digest(stage, reads, key) is None
        ]
        return (f"waits for {' and '.join(dict.fromkeys(missing))}",)
    section = stage.section(store.config, key)
    if manifest is None:
        missing = [
            label
            for label, digest in basis["inputs"].items()
            if digest == "absent" and section.get(label)
        ]
        return tuple(f"{_input_name(stage, label, section)} is missing" for label in missing) or (
            "not made yet",
        )
    found = [*_versions(manifest, basis), *_settings(store, stage, key, manifest)]
    found += [
        *_models(store, stage, key, manifest, basis),
        *_inputs(stage, section, manifest, basis),
    ]
    found += [f"file {name} is missing" for name in store.currency.missing_files(manifest)]
    return tuple(found)


def _versions(manifest: Manifest, basis: Mapping[str, Any]) -> Iterator[str]:
    if manifest.version != basis["version"]:
        yield f"version {manifest.version} → {basis['version']}"


def _settings(store: Store, stage: Stage, key: str, manifest: Manifest) -> Iterator[str]:
    """Settings that differ, as people write them in foundry.toml."""
    before, after = toml.flatten(manifest.config), toml.flatten(stage.section(store.config, key))
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if old != new and _written(old) != _written(new):
            yield f"{setting_name(stage.settings_of(key), name)} {_written(old)} → {_written(new)}"


def setting_name(prefix: str, name: str) -> str:
    """A key of a section as people find it in foundry.toml: `[selection] min_score`."""
    table, _, last = ".".join(part for part in (prefix, name) if part).rpartition(".")
    return f"[{table}] {last}" if table else last


def _written(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 1]}…"


def _models(
    store: Store, stage: Stage, key: str, manifest: Manifest, basis: Mapping[str, Any]
) -> Iterator[str]:
    for name, digest in basis["models"].items():
        if manifest.models.get(name) != digest:
            yield f"model {name} ({store.models.name_of(name, stage.encoding(key))}) changed"


def _input_name(stage: Stage, label: str, section: Mapping[str, Any]) -> str:
    """What people call an input: a table, or a file by the name that the settings give it."""
    table, _, rest = label.partition(":")
    if (
        label in {reads.label for reads in stage.reads}
        or label in TABLES
        or rest.partition(":")[0] in set(Per)
    ):
        return table
    words, value = label.replace(":", " ").replace("_", " "), section.get(label)
    return f"{words} {value}" if isinstance(value, str) and value else words


def _inputs(
    stage: Stage, section: Mapping[str, Any], manifest: Manifest, basis: Mapping[str, Any]
) -> Iterator[str]:
    before, after = manifest.inputs, basis["inputs"]
    for label in sorted(before.keys() | after.keys()):
        if before.get(label) == after.get(label):
            continue
        name = _input_name(stage, label, section)
        if after.get(label) == "absent":
            yield f"{name} is missing"
        elif label not in before:
            yield f"{name} is new"
        elif label not in after:
            yield f"{name} is no longer read"
        else:
            yield f"{name} changed"


def _expected_seconds(store: Store, stage: Stage, num_stale: int) -> float | None:
    """The mean time of the parts that are committed, times the stale ones."""
    if not num_stale:
        return 0.0
    manifests = (
        store.manifest(stage.table, stage.part(key)) for key in store.currency.keys(stage.scope)
    )
    seconds = [
        manifest.report["seconds"]
        for manifest in manifests
        if manifest and manifest.report.get("seconds")
    ]
    return num_stale * sum(seconds) / len(seconds) if seconds else None
