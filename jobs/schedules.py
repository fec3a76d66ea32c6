"""Work by the clock: sending MLflow what it lacks, which is on by default, and encoding latents
anew, which is not."""

import dagster as dg

from assets.partitions import UNFINISHED
from jobs.encode import REENCODE_JOB, reencode_requests
from resources.mlflow.catch_up import catch_up, owes
from resources.workspace.store import Store


@dg.op
def send_to_mlflow(context: dg.OpExecutionContext, store: dg.ResourceParam[Store]) -> None:
    """Send MLflow what it lacks; safe to repeat, and nothing is lost when the server is away."""
    catch_up(store, context.log)


@dg.job(
    description="Send MLflow what it lacks: event logs, scores, verdicts, reports, the champion."
)
def catch_up_tracking() -> None:
    """One op: send all that is pending."""
    send_to_mlflow()


@dg.schedule(
    job=catch_up_tracking,
    cron_schedule="*/15 * * * *",
    name="tracking_catch_up",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every 15 minutes: what MLflow lacks, because it was away or because a trainer goes on by itself. On "
    "from the start, and idle while MLflow has everything.",
)
def tracking_catch_up(store: dg.ResourceParam[Store]) -> dg.RunRequest | dg.SkipReason:
    """Request a run when MLflow lacks something."""
    return dg.RunRequest() if owes(store) else dg.SkipReason("MLflow has everything")


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
    waiting = context.instance.get_runs_count(
        dg.RunsFilter(job_name=REENCODE_JOB.name, statuses=UNFINISHED)
    )
    if waiting:
        return dg.SkipReason(f"{waiting} runs of an earlier hour still wait or work")
    requests = reencode_requests(store, context.scheduled_execution_time.timestamp())
    hours = store.config.reencoding.min_age_hours
    return requests or dg.SkipReason(f"no shard has latents older than {hours:g} hours")


ALL = [reencode_latents, tracking_catch_up]
