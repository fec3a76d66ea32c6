"""How the graph is partitioned. Keys are made by the store; Dagster only mirrors them."""

import dagster as dg

from resources.stages import Scope
from resources.store import Store

shards = dg.DynamicPartitionsDefinition(name="shards")
encodings = dg.DynamicPartitionsDefinition(name="encodings")
encoding_shards = dg.MultiPartitionsDefinition({"encoding": encodings, "shard": shards})
models = dg.DynamicPartitionsDefinition(name="models")
prompt_sets = dg.DynamicPartitionsDefinition(name="prompt_sets")
runs = dg.DynamicPartitionsDefinition(name="runs")
checkpoints = dg.DynamicPartitionsDefinition(name="checkpoints")

DYNAMIC = {
    Scope.SHARD: shards,
    Scope.ENCODING: encodings,
    Scope.MODEL: models,
    Scope.PROMPT_SET: prompt_sets,
    Scope.RUN: runs,
    Scope.CHECKPOINT: checkpoints,
}


def mirror(instance: dg.DagsterInstance, store: Store) -> None:
    """Add to Dagster every partition that the workspace has, and remove those it no longer has."""
    for scope, definition in DYNAMIC.items():
        assert definition.name is not None
        wanted = set(store.keys(scope))
        known = set(instance.get_dynamic_partitions(definition.name))
        if scope is Scope.CHECKPOINT:
            wanted |= {name for name in known if store.has_key(scope, name)}
        if new := sorted(wanted - known):
            instance.add_dynamic_partitions(definition.name, new)
        for gone in sorted(known - wanted):
            instance.delete_dynamic_partition(definition.name, gone)
