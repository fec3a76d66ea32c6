"""Work by the clock: catching up MLflow with what trainers wrote while it was away, and encoding latents anew."""

import dagster as dg

from jobs.encode import REENCODE_JOB, reencode_requests
from resources.store import Store
from resources.tracking import workspace_tracking
from training.errors import TrackingError

_UNFINISHED = (
    dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
)  # fmt: skip


@dg.op
def forward_events(context: dg.OpExecutionContext, store: dg.ResourceParam[Store]) -> None:
    """Send every run's new events to MLflow; safe to repeat, and nothing is lost when the server is away."""
    tracking = workspace_tracking(store.home, store.config.tracking.uri)
    for folder in sorted(path.parent for path in (store.home / "runs").glob("*/events.jsonl")):
        try:
            num_sent = tracking.forward(folder)
        except TrackingError as error:
            context.log.warning(f"{folder.name}: {error}")
            continue
        context.log.info(f"{folder.name}: {num_sent} metrics sent")


@dg.job(description="Send to MLflow whatever training runs have logged since the last time.")
def catch_up_tracking() -> None:
    """One op: forward all runs."""
    forward_events()


@dg.schedule(
    job=REENCODE_JOB,
    cron_schedule="0 * * * *",
    name="reencode_latents",
    description="Every hour: the next generation of the oldest latents, as [reencoding] in foundry.toml says. "
    "Gives way to whoever waits for the card.",
)
def reencode_latents(
    context: dg.ScheduleEvaluationContext, store: dg.ResourceParam[Store]
) -> list[dg.RunRequest] | dg.SkipReason:
    """Request a run for each shard whose latents are old enough, unless earlier requests still wait."""
    waiting = context.instance.get_runs_count(dg.RunsFilter(job_name=REENCODE_JOB.name, statuses=list(_UNFINISHED)))
    if waiting:
        return dg.SkipReason(f"{waiting} runs of an earlier hour still wait or work")
    requests = reencode_requests(store, context.scheduled_execution_time.timestamp())
    hours = store.config.reencoding.min_age_hours
    return requests or dg.SkipReason(f"no shard has latents older than {hours:g} hours")


ALL = [
    reencode_latents,
    dg.ScheduleDefinition(
        job=catch_up_tracking,
        cron_schedule="*/15 * * * *",
        name="tracking_catch_up",
        description="Every 15 minutes: what trainers logged while MLflow was away.",
    ),
]
