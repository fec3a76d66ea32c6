"""Work by the clock: catching up MLflow with what trainers wrote while it was away."""

import dagster as dg

from resources.store import Store
from resources.tracking import workspace_tracking
from training.errors import TrackingError


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


ALL = [
    dg.ScheduleDefinition(
        job=catch_up_tracking,
        cron_schedule="*/15 * * * *",
        name="tracking_catch_up",
        description="Every 15 minutes: what trainers logged while MLflow was away.",
    )
]
