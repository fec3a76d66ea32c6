"""A stage as Dagster's asset: everything that Dagster knows of it follows from its declaration."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from assets import followed
from assets.partitions import DYNAMIC, encoding_shards
from resources.graph import Per, Scope, Stage, bodies, writers
from training.config.workspace import WorkspaceConfig
from training.tables.schemas import TABLES

OWNER = "team:foundry"
_TYPE_WORDS = {
    "String": "string",
    "Int8": "int",
    "Int32": "int",
    "Int64": "int",
    "UInt64": "int",
    "Boolean": "bool",
}
_PARTITIONS = {**DYNAMIC, Scope.ALL: None, Scope.ENCODING_SHARD: encoding_shards}


def assets(stages: Sequence[Stage]) -> list[dg.AssetsDefinition]:
    """The assets of all stages; those that one function makes become one definition."""
    return [_definition(together, stages) for together in bodies(stages)]


def _definition(together: Sequence[Stage], stages: Sequence[Stage]) -> dg.AssetsDefinition:
    body, partitions = together[0].body, _PARTITIONS[together[0].scope]
    assert body is not None, f"stage {together[0].name} decorates no function"
    policy = dg.BackfillPolicy.single_run()
    if len(together) == 1:
        about = _about(together[0], stages)
        return dg.asset(**about, partitions_def=partitions, backfill_policy=policy)(body)
    return dg.multi_asset(
        name=body.__name__,
        specs=[_spec(stage, stages) for stage in together],
        partitions_def=partitions,
        can_subset=True,
        backfill_policy=policy,
    )(body)


def _spec(stage: Stage, stages: Sequence[Stage]) -> dg.AssetSpec:
    """A stage that is made with others; one that some workspaces do not want may be left out."""
    about = _about(stage, stages)
    optional = not stage.in_use(WorkspaceConfig())
    return dg.AssetSpec(about.pop("name"), skippable=optional, **about)


def _about(stage: Stage, stages: Sequence[Stage]) -> dict[str, Any]:
    """What Dagster shows of a stage: what it is, the columns of its table, what it follows from."""
    table = TABLES[stage.table]
    columns = [
        dg.TableColumn(name, _type_word(str(column.dtype)), description=column.about)
        for name, column in table.columns.items()
    ]
    return {
        "name": stage.name,
        "description": stage.description,
        "deps": [*_deps(stage, stages), *followed.deps(stage)],
        "group_name": stage.group,
        "kinds": {"parquet", *stage.kinds},
        "owners": [OWNER],
        "code_version": str(stage.version),
        "metadata": {
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/table_name": stage.table,
            "one row per": table.row,
        },
    }


def _deps(stage: Stage, stages: Sequence[Stage]) -> Iterator[dg.AssetDep]:
    """The stages that write what a stage reads, with the partitions that it reads of each."""
    slices = {reads.table: reads for reads in reversed((*stage.reads, *stage.follows))}
    for table in stage.parents:
        for writer in writers(table, stages):
            if writer is not stage:
                mapping = _mapping(stage.scope, slices[table].per, writer.scope)
                yield dg.AssetDep(writer.name, partition_mapping=mapping)


def _mapping(scope: Scope, per: Per, above: Scope) -> dg.PartitionMapping | None:
    """Which partitions of a stage above one depends on; None where Dagster sees it by itself: whole
    tables, equal partitions, and those of a dimension of its own."""
    if Scope.ALL in (scope, above):
        return None
    if per is Per.ENCODING_ALL:
        return dg.MultiToSingleDimensionPartitionMapping("encoding")
    return dg.AllPartitionMapping() if per is Per.ALL else None


def _type_word(dtype: str) -> str:
    word = dtype.partition("(")[0]
    return _TYPE_WORDS.get(
        word,
        {"Float32": "float", "Float64": "float", "Datetime": "timestamp"}.get(word, word.lower()),
    )
