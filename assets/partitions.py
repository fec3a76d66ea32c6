"""How the graph is partitioned. Keys are made by the store; Dagster only mirrors them."""

import dagster as dg
from dagster._core.storage.dagster_run import FINISHED_STATUSES

from resources.graph import Scope
from resources.run_coordinator import PARTITION
from resources.workspace.store import Store

shards = dg.DynamicPartitionsDefinition(name="shards")
encodings = dg.DynamicPartitionsDefinition(name="encodings")
encoding_shards = dg.MultiPartitionsDefinition({"encoding": encodings, "shard": shards})
models = dg.DynamicPartitionsDefinition(name="models")
prompt_sets = dg.DynamicPartitionsDefinition(name="prompt_sets")
runs = dg.DynamicPartitionsDefinition(name="runs")
checkpoints = dg.DynamicPartitionsDefinition(name="checkpoints")

UNFINISHED = [status for status in dg.DagsterRunStatus if status not in FINISHED_STATUSES]
"""States of a run of Dagster that waits or works."""

DYNAMIC = {
    Scope.SHARD: shards,
    Scope.ENCODING: encodings,
    Scope.MODEL: models,
    Scope.PROMPT_SET: prompt_sets,
    Scope.RUN: runs,
    Scope.CHECKPOINT: checkpoints,
}


def mirror(instance: dg.DagsterInstance, store: Store, *, remove: bool = True) -> None:
    """Add to Dagster every partition that the workspace has, and unless told not to, remove those
    it does not have.

    A run that was named in the launch dialog and is about to be configured by its launch stays.
    """
    for scope, definition in DYNAMIC.items():
        assert definition.name is not None
        wanted = set(store.currency.keys(scope))
        known = set(instance.get_dynamic_partitions(definition.name))
        if scope is Scope.CHECKPOINT:
            wanted |= {name for name in known if store.currency.has_key(scope, name)}
        if new := sorted(wanted - known):
            instance.add_dynamic_partitions(definition.name, new)
        unknown = sorted(known - wanted) if remove else []
        if unknown and scope is Scope.RUN:
            launched = instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))
            unknown = [
                name for name in unknown if all(run.tags.get(PARTITION) != name for run in launched)
            ]
        for name in unknown:
            instance.delete_dynamic_partition(definition.name, name)
