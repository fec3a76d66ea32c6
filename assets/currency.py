"""What `store.currency.stale` says, shown in Dagster: a check `current` per stage, and settings and models
as assets.

Dagster compares versions itself for whole tables only, and by more than a stage reads. So the store
stays the judge: `report` tells Dagster what it lacks to show the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    CachingStaleStatusResolver,
    StaleStatus,
    extract_data_version_from_entry,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster._core.loader import LoadingContext
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from assets import followed
from assets.registry import STAGES
from resources.graph import Scope, Stage
from resources.workspace.staleness import StageStatus, status_of
from resources.workspace.store import Store
from training import toml
from training.commit import json_digest
from training.errors import PipelineError

CHECK = "current"
VERSION_CHARS = 16
"""Characters of a digest that tell versions apart."""
MAX_LISTED = 50
"""Stale partitions that a check lists."""


def outcome(found: StageStatus) -> tuple[bool, str, dict[str, dg.MetadataValue]]:
    """What the check `current` says of a stage: whether it passed, its sentence, and the stale
    partitions."""
    listed = [
        dg.TableRecord({"partition": one.key, "why": "; ".join(one.reasons)})
        for one in found.stale[:MAX_LISTED]
    ]
    numbers: dict[str, dg.MetadataValue] = {
        "stale": dg.MetadataValue.int(len(found.stale)),
        "partitions": dg.MetadataValue.int(found.num_partitions),
    }
    if listed:
        numbers["stale partitions"] = dg.MetadataValue.table(listed)
    return not found.stale and not found.error, found.sentence, numbers


def _check_of(stage: Stage) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=stage.name,
        name=CHECK,
        description="Every partition is what would be made now; else it says what changed. `foundry status` says the "
        "same.",
    )
    def current(store: dg.ResourceParam[Store]) -> dg.AssetCheckResult:
        passed, sentence, numbers = outcome(status_of(store, stage))
        return dg.AssetCheckResult(
            passed=passed,
            severity=dg.AssetCheckSeverity.WARN,
            description=sentence,
            metadata=numbers,
        )

    return current


CHECKS = [_check_of(stage) for stage in STAGES.values()]


def _tables() -> list[str]:
    return sorted({table for stage in STAGES.values() for table in followed.settings_tables(stage)})


def _models() -> list[str]:
    return sorted({name for stage in STAGES.values() for name in stage.models})


def external_specs() -> list[dg.AssetSpec]:
    """Settings and model folders as assets that Dagster shows and never makes."""
    about = "What follows from it becomes stale when it changes."
    settings = [
        dg.AssetSpec(
            followed.settings_key(table), group_name=followed.SETTINGS, kinds={"toml"},
            description=f"[{table}] of foundry.toml, which people edit. {about}",
        )
        for table in _tables()
    ]  # fmt: skip
    models = [
        dg.AssetSpec(
            followed.model_key(name), group_name=followed.MODELS, kinds={"huggingface"},
            description=f"The weights of [models] {name}. {about}" if name != "vae"
            else f"The VAEs that [encodings] name. {about}",
        )
        for name in _models()
    ]  # fmt: skip
    return [*settings, *models]


def report(instance: dg.DagsterInstance, store: Store, graph: BaseAssetGraph) -> int:
    """Tell Dagster what it lacks to show what the store says; returns the number of events, 0 where
    it shows it.

    With a foundry.toml that cannot be read there are no versions to tell; the checks then say why.
    """
    num_events = 0
    with contextlib.suppress(PipelineError):
        num_events = report_versions(instance, store)
    found = [status_of(store, stage) for stage in STAGES.values()]
    current = [one.stage for one in found if not one.stale and not one.error]
    for events in (
        check_evaluations(instance, found),
        confirmations(instance, store, graph, current),
    ):
        for event in events:
            instance.report_runless_asset_event(event)
            num_events += 1
    return num_events


def report_versions(instance: dg.DagsterInstance, store: Store) -> int:
    """Tell Dagster of new settings and models: what is made afterwards is recorded to follow from
    them."""
    found = list(versions(instance, store))
    for event in found:
        instance.report_runless_asset_event(event)
    return len(found)


def versions(instance: dg.DagsterInstance, store: Store) -> Iterator[dg.AssetMaterialization]:
    """New versions of settings and models, with what they are. (Of assets that it cannot observe
    itself, Dagster takes no observations into account, only materializations.)"""
    found = {followed.settings_key(table): _settings(store, table) for table in _tables()}
    models = [name for name in _models() if name == "vae" or store.config.models.names(name)]
    found |= {followed.model_key(name): _model(store, name) for name in models}
    for key, (version, metadata) in found.items():
        record = instance.get_latest_data_version_record(key, is_source=False)
        known = extract_data_version_from_entry(record.event_log_entry) if record else None
        if known is None or known.value != version:
            yield dg.AssetMaterialization(key, metadata=metadata, tags={DATA_VERSION_TAG: version})


def _settings(store: Store, table: str) -> tuple[str, dict[str, dg.MetadataValue]]:
    values = toml.dump(store.config)[table]
    return json_digest(values)[:VERSION_CHARS], {"settings": dg.MetadataValue.json({table: values})}


def _model(store: Store, name: str) -> tuple[str, dict[str, dg.MetadataValue]]:
    encodings = sorted(store.config.encodings) if name == "vae" else [""]
    folders = dg.MetadataValue.text(
        ", ".join(dict.fromkeys(store.models.name_of(name, one) for one in encodings))
    )
    try:
        digests = [
            store.models.vae_digest(one) if name == "vae" else store.models.digest(name)
            for one in encodings
        ]
    except PipelineError as error:
        return "missing", {"folder": folders, "missing": dg.MetadataValue.text(str(error))}
    version = digests[0] if len(digests) == 1 else json_digest(digests)
    return version[:VERSION_CHARS], {"folder": folders, "digest": dg.MetadataValue.text(version)}


def check_evaluations(
    instance: dg.DagsterInstance, found: list[StageStatus]
) -> Iterator[dg.AssetCheckEvaluation]:
    """Outcomes of the checks `current` that differ from what Dagster shows; it shows none from
    before the last materialization."""
    keys = {one.stage: dg.AssetCheckKey(dg.AssetKey(one.stage), CHECK) for one in found}
    shown = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(keys.values()))
    made = {
        record.asset_entry.asset_key: record.asset_entry.last_materialization_record
        for record in instance.get_asset_records([key.asset_key for key in keys.values()])
    }
    for one in found:
        passed, sentence, numbers = outcome(one)
        record = shown.get(keys[one.stage])
        last = made.get(dg.AssetKey(one.stage))
        if (
            record is not None
            and record.event is not None
            and last
            and last.timestamp > record.event.timestamp
        ):
            record = None
        ended = record is not None and record.status is not AssetCheckExecutionRecordStatus.PLANNED
        evaluation = record.evaluation if record is not None and ended else None
        if evaluation is None or (evaluation.passed, evaluation.description) != (passed, sentence):
            yield dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey(one.stage),
                check_name=CHECK,
                passed=passed,
                severity=dg.AssetCheckSeverity.WARN,
                description=sentence,
                metadata=numbers,
            )


class _Loading(LoadingContext):
    """What Dagster's own reckoning of staleness caches its reads in."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._loaders: dict[type, Any] = {}

    @property
    def instance(self) -> dg.DagsterInstance:
        """The instance that is read."""
        return self._instance

    @property
    def loaders(self) -> dict[type, Any]:
        """Loaders by kind of record."""
        return self._loaders


def confirmations(
    instance: dg.DagsterInstance, store: Store, graph: BaseAssetGraph, current: list[str]
) -> Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """Whole tables that Dagster takes for unsynced though they are current: the same version, made
    from what is there now. For Dagster a table depends on all of its inputs; for the store on the
    slices that it reads."""
    resolver = CachingStaleStatusResolver(instance, graph, _Loading(instance))
    for name in current:
        stage, key = STAGES[name], dg.AssetKey(name)
        if stage.scope is not Scope.ALL or resolver.get_status(key) is not StaleStatus.STALE:
            continue
        manifest = store.manifest(stage.table, "all")
        assert manifest is not None
        tags = {DATA_VERSION_TAG: manifest.digest, CODE_VERSION_TAG: str(stage.version)}
        for parent in graph.get(key).parent_keys:
            record = instance.get_latest_data_version_record(parent, is_source=False)
            tags[get_input_data_version_tag(parent)] = resolver.get_current_data_version(
                parent
            ).value
            tags[get_input_event_pointer_tag(parent)] = str(record.storage_id) if record else "NULL"
        outcomes = list(_outcomes(instance, graph, key))
        yield dg.AssetMaterialization(
            key,
            description="Still current: what changed upstream is nothing that this table reads.",
            metadata={
                "dagster/row_count": manifest.rows,
                "digest": manifest.digest[:VERSION_CHARS],
            },
            tags=tags,
        )
        yield from outcomes  # what was checked holds for the same table; Dagster shows outcomes since the last event


def _outcomes(
    instance: dg.DagsterInstance, graph: BaseAssetGraph, key: dg.AssetKey
) -> Iterator[dg.AssetCheckEvaluation]:
    """The last outcomes of an asset's checks."""
    keys = [check for check in graph.asset_check_keys if check.asset_key == key]
    for record in instance.event_log_storage.get_latest_asset_check_execution_by_key(keys).values():
        if record.status is not AssetCheckExecutionRecordStatus.PLANNED and (
            last := record.evaluation
        ):
            yield dg.AssetCheckEvaluation(
                asset_key=key, check_name=last.check_name, passed=last.passed, severity=last.severity,
                description=last.description, metadata=last.metadata,
            )  # fmt: skip
