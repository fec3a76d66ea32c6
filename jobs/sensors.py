"""Work by what happened: new pictures, new checkpoints, anything stale. All are off until switched on."""

from collections.abc import Iterator

import dagster as dg

from assets import raw_images
from assets.partitions import checkpoints, mirror
from assets.sample_images import WANTED_BY
from jobs import evaluate
from resources.stages import Scope
from resources.store import Store
from training import retention
from training.commit import json_digest
from training.run_folder import READY

MAX_REQUESTS = 50
"""Runs that one tick of `keep_current` asks for, at most."""

LISTING_JOB = dg.define_asset_job(
    "list_sources", selection=dg.AssetSelection.assets("source_listing"), description="List the sources again."
)


@dg.sensor(job=LISTING_JOB, minimum_interval_seconds=60, description="Lists the sources again when a folder changed.")
def new_images(context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]) -> dg.SensorResult | dg.SkipReason:
    """Request a listing when what the sources hold is not what was listed."""
    basis = store.basis(raw_images.LISTING, "all")
    if not store.stale(raw_images.LISTING) or basis is None:
        return dg.SkipReason("the sources hold what was listed")
    inputs = "+".join(sorted(digest[:8] for digest in basis["inputs"].values()))
    return dg.SensorResult(run_requests=[dg.RunRequest(run_key=f"listing:{inputs}")])


@dg.sensor(job=evaluate.JOB, minimum_interval_seconds=30, description="Evaluates checkpoints as training writes them.")
def new_checkpoint(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Request evaluation of the base, of rivals, and of the first, every N-th and the last checkpoint of each run."""
    done = set(store.parts("eval_metrics"))
    found = {}
    for name in store.checkpoints_to_evaluate(training=True):
        if name in done:
            continue
        found[name] = store.checkpoint_digest(name)
        folder = store.checkpoint_folder(name)
        if (folder / READY).is_file():
            retention.want(folder, WANTED_BY)
    if not found:
        return dg.SkipReason("no checkpoint waits for evaluation")
    return dg.SensorResult(
        dynamic_partitions_requests=[checkpoints.build_add_request(sorted(found))],
        run_requests=[
            dg.RunRequest(partition_key=name, run_key=f"evaluate:{name}:{digest[:16]}")
            for name, digest in sorted(found.items())
        ],
    )


@dg.sensor(
    asset_selection=dg.AssetSelection.all(),
    minimum_interval_seconds=60,
    description="Brings whatever is stale up to date, the first stages of the graph first.",
)
def keep_current(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Request the stale partitions of the first stale stages; later stages follow in later ticks."""
    mirror(context.instance, store)
    requests = list(_requests(store))[:MAX_REQUESTS]
    return dg.SensorResult(run_requests=requests) if requests else dg.SkipReason("nothing is stale")


def _requests(store: Store) -> Iterator[dg.RunRequest]:
    """Runs for stages that are stale while nothing that they read is."""
    from jobs.definitions import STAGES, defs

    graph = defs.resolve_asset_graph()
    stale = {name: keys for name, stage in STAGES.items() if (keys := store.stale(stage))}
    for name, keys in stale.items():
        upstream = {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}
        if upstream & stale.keys():
            continue
        selection = [dg.AssetKey(name)]
        for key in keys:
            basis = store.basis(STAGES[name], key)
            run_key = f"{name}:{key}:{json_digest(basis)[:16]}"
            partition = None if STAGES[name].scope is Scope.ALL else key
            yield dg.RunRequest(run_key=run_key, asset_selection=selection, partition_key=partition)


ALL = [new_images, new_checkpoint, keep_current]
