"""How every stage behaves in Dagster: materialized one way, shown one way."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import dagster as dg

from resources.graph import Scope, Stage
from resources.warehouse import rebuild
from resources.workspace import reading
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.commit import json_digest
from training.errors import DataError
from training.manifests import Manifest

DIGEST_SHOWN = 16
"""Characters of a digest that fit beside the other metadata; the whole is the asset's data
version."""
SIGNIFICANT_DIGITS = 5
MAX_KEYS_LISTED = 8
_SCOPE_WORDS = {
    Scope.SHARD: "shard",
    Scope.ENCODING: "encoding",
    Scope.ENCODING_SHARD: "encoding and shard",
    Scope.MODEL: "base model",
    Scope.PROMPT_SET: "prompt set",
    Scope.RUN: "training run",
    Scope.CHECKPOINT: "checkpoint",
}


def materialize(
    context: dg.AssetExecutionContext,
    store: Store,
    stage: Stage,
    make: Callable[[str], Made],
    *,
    again: Callable[[str], bool] = lambda key: False,
    new: Callable[[str], bool] = lambda key: False,
) -> dg.MaterializeResult:
    """Bring the run's partitions of a stage up to date: each is locked, checked, made if stale,
    committed, shown.

    A partition that is current already is not made again, unless the run asks for that with
    `again`: its recorded report is shown. So a run is never needed to be right, and never wrong to
    repeat. A partition that the workspace does not have is refused, unless `new` says that this run
    makes it.
    """
    keys = partition_keys(context, store, stage, new=new)
    digests = {}
    for key in keys:
        manifest = bring_up_to_date(context, store, stage, key, make, again=again(key))
        digests[key] = manifest.digest
        metadata = shown(manifest, store, partitioned=keys != ["all"])
        if keys == ["all"]:
            context.add_output_metadata(metadata)
        else:
            context.add_asset_metadata(metadata, partition_key=key)
    rebuild(store)
    version = next(iter(digests.values())) if len(digests) == 1 else json_digest(digests)
    return dg.MaterializeResult(data_version=dg.DataVersion(version))


def partition_keys(
    context: dg.AssetExecutionContext,
    store: Store,
    stage: Stage,
    *,
    new: Callable[[str], bool] = lambda key: False,
) -> list[str]:
    """The partitions that a run is about; `all` of a whole table.

    Raises:
        DataError: the run names none though the stage has partitions, or one that the workspace
            does not have.
    """
    if stage.scope is Scope.ALL:
        return ["all"]
    keys = (
        list(context.partition_keys)
        if context.has_partition_key or context.has_partition_key_range
        else []
    )
    unknown = [key for key in keys if not store.currency.has_key(stage.scope, key) and not new(key)]
    if keys and not unknown:
        return keys
    known = store.currency.keys_of(stage)
    listed = ", ".join(known[:MAX_KEYS_LISTED]) + (
        f" and {n} more" if (n := len(known) - MAX_KEYS_LISTED) > 0 else ""
    )
    wrong = (
        f"there is no partition {unknown[0]!r}"
        if unknown
        else "the run was launched without a partition"
    )
    raise DataError(
        f"{stage.name}: {wrong}; it is made per {_SCOPE_WORDS[stage.scope]}, there are: {listed or 'none'}"
    )


def bring_up_to_date(
    context: dg.AssetExecutionContext,
    store: Store,
    stage: Stage,
    key: str,
    make: Callable[[str], Made],
    *,
    again: bool = False,
) -> Manifest:
    """The committed manifest of one partition, made now if it is stale or `again` asks for it."""
    part = stage.part(key)
    with store.writer.holding(stage.table, part):
        manifest, basis = store.manifest(stage.table, part), store.currency.basis(stage, key)
        if manifest is not None and store.currency.agrees(manifest, basis) and not again:
            context.log.info(f"{stage.name} {key}: current, nothing to do")
            return manifest
        if basis is None:
            missing = [
                reads.table
                for reads in stage.reads
                if store.slices.digest(stage, reads, key) is None
            ]
            raise DataError(
                f"{stage.name} {key}: nothing is committed in {', '.join(missing)} yet; run that first"
            )
        store.currency.begin(stage, key, basis)
        started = time.monotonic()
        with reading.at_work(stage):
            made = make(key)
        manifest = store.writer.commit(stage, key, made, basis, seconds=time.monotonic() - started)
        context.log.info(f"{stage.name} {key}: {manifest.rows} rows, digest {manifest.digest[:12]}")
        return manifest


def shown(manifest: Manifest, store: Store, *, partitioned: bool) -> dict[str, Any]:
    """Dagster metadata of a committed part: what a person looks for first stands first."""
    report = manifest.report
    count = "dagster/partition_row_count" if partitioned else "dagster/row_count"
    metadata: dict[str, Any] = {count: manifest.rows}
    for name, label in (("rows_in", "rows in"), ("rows_rejected", "rows rejected")):
        if report.get(name) is not None:
            metadata[label] = report[name]
    for name, markdown in report.get("pictures", {}).items():
        metadata[name] = dg.MetadataValue.md(markdown)
    for name, value in report.get("numbers", {}).items():
        metadata[name] = _rounded(value)
    for name, rows in report.get("tables", {}).items():
        if rows:
            metadata[name] = _table(rows)
    for name, url in report.get("links", {}).items():
        metadata[name] = dg.MetadataValue.url(url)
    metadata["digest"] = manifest.digest[:DIGEST_SHOWN]
    if made := manifest.provenance.get("time"):
        metadata["made"] = dg.MetadataValue.timestamp(datetime.fromisoformat(made))
    if report.get("seconds") is not None:
        metadata["seconds"] = report["seconds"]
    if manifest.files:
        folder = store.tables.folder(manifest.table, manifest.part)
        metadata["file"] = dg.MetadataValue.path(str(folder / manifest.files[0].name))
    return metadata


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in rows]
    return dg.MetadataValue.table(records)


def _cell(value: Any) -> str | int | float | bool | None:
    value = _rounded(value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _rounded(value: Any) -> Any:
    """Floats with the digits that people read; the tables keep all."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
