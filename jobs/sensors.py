"""Work by what happened: new images, new checkpoints, anything stale. Those that start runs are
off until switched on."""

import contextlib
import time

import dagster as dg

from assets import currency, raw_images
from assets.definitions import GRAPH
from assets.partitions import checkpoints, mirror
from assets.registry import STAGES, chosen
from jobs import automation, evaluate
from resources.graph import Scope
from resources.run_coordinator import PARTITION
from resources.workspace.store import Store
from training.commit import json_digest
from training.errors import PipelineError

REST = 9.0
"""How much longer than its last look `staleness` rests, so that it costs a tenth of the time at
most."""
MAX_ATTEMPTS = 3
"""Runs of `new_checkpoint` for one checkpoint, as long as nothing that its evaluation follows from
changes."""
RUN_KEY = "dagster/run_key"
"""Tag of a run with the key that a sensor asked for it by."""

LISTING_JOB = dg.define_asset_job(
    "list_sources",
    selection=chosen("ingest", scope=Scope.ALL),
    description="List the sources again.",
)


@dg.sensor(
    job=LISTING_JOB,
    minimum_interval_seconds=60,
    description="Lists the sources again when a folder changed.",
)
def new_images(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Request a listing when what the sources hold is not what was listed."""
    basis = store.currency.basis(raw_images.source_listing, "all")
    if not store.currency.stale(raw_images.source_listing) or basis is None:
        return dg.SkipReason("the sources hold what was listed")
    inputs = "+".join(sorted(digest[:8] for digest in basis["inputs"].values()))
    return dg.SensorResult(run_requests=[dg.RunRequest(run_key=f"listing:{inputs}")])


@dg.sensor(
    job=evaluate.JOB,
    minimum_interval_seconds=30,
    description="Evaluates checkpoints as training writes them.",
)
def new_checkpoint(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Request evaluation of the base, then of external models and of the first, every N-th and the last
    checkpoint of each run.

    What is evaluated is done; what fails is tried `MAX_ATTEMPTS` times, and anew when something
    about it changes.
    """
    if (base := store.checkpoints.base()) is None:
        return dg.SkipReason(
            "the base model is not recorded yet: `foundry run --select base_model`"
        )
    attempts: dict[str, str | None] = {}
    left = []
    for name in store.checkpoints.to_evaluate(training=True):
        try:
            store.checkpoints.folder(
                name
            )  # an external model that is missing is not worth three runs
            evaluate.keep(store, name)
            if not evaluate.is_evaluated(store, name):
                attempts[name] = _attempt(context.instance, store, name)
        except PipelineError as error:  # one that is damaged or gone does not hold up the others
            left.append(f"{name}: {error}")
    if base in attempts:
        attempts = {base: attempts[base]}  # no other can be judged before it
    left += [
        f"{name} is running, or has failed {MAX_ATTEMPTS} times"
        for name, key in attempts.items()
        if key is None
    ]
    requests = [
        dg.RunRequest(partition_key=name, run_key=key)
        for name, key in attempts.items()
        if key is not None
    ]
    if left:
        context.log.info("; ".join(left))
    if not requests:
        return dg.SkipReason("; ".join(left) or "no checkpoint waits for evaluation")
    return dg.SensorResult(
        dynamic_partitions_requests=[
            checkpoints.build_add_request([str(item.partition_key) for item in requests])
        ],
        run_requests=requests,
    )


def _attempt(instance: dg.DagsterInstance, store: Store, checkpoint: str) -> str | None:
    """Run key of the next attempt at evaluating a checkpoint; None while one runs, or after the
    last has failed.

    Dagster starts one run a key, whatever becomes of it. So the key holds all that the outcome
    follows from, the base's scores too, and a number: another base, a mended setting and new scores
    are tried afresh.
    """
    base = store.manifest("eval_metrics", store.checkpoints.base() or "")
    bases = [store.currency.basis(stage, checkpoint) for stage in evaluate.STAGES]
    identity = json_digest([base.digest if base else "absent", *bases])[:16]
    runs = instance.get_runs(
        dg.RunsFilter(job_name=evaluate.JOB.name, tags={PARTITION: checkpoint})
    )
    if not all(run.is_finished for run in runs):
        return None
    used = {run.tags.get(RUN_KEY) for run in runs}
    keys = (f"evaluate:{checkpoint}:{identity}:{number}" for number in range(1, MAX_ATTEMPTS + 1))
    return next((key for key in keys if key not in used), None)


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps the checks `current`, the settings and the models of the graph up to date with the workspace. "
    "Starts no run. On from the start.",
)
def staleness(context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]) -> dg.SkipReason:
    """Report what changed since Dagster last heard of it; where that takes long, less often."""

    if time.time() < float(context.cursor or 0):
        return dg.SkipReason("the last look took long: waiting before the next")
    started = time.monotonic()
    with contextlib.suppress(
        PipelineError
    ):  # of a foundry.toml that cannot be read: the checks say it, stage by stage
        mirror(
            context.instance, store, remove=False
        )  # somebody may be naming a new run in the launch dialog
    num_events = currency.report(context.instance, store, GRAPH.resolve_asset_graph())
    context.update_cursor(str(time.time() + REST * (time.monotonic() - started)))
    return dg.SkipReason(f"reported {num_events} changes" if num_events else "nothing has changed")


keep_current = dg.AutomationConditionSensorDefinition(
    "keep_current",
    target=dg.AssetSelection.assets(*STAGES),
    default_condition=automation.CONDITION,
    use_user_code_server=True,
    minimum_interval_seconds=60,
    description="Brings whatever is stale up to date, the first stages of the graph first.",
)

ALL = [staleness, new_images, new_checkpoint, keep_current]
