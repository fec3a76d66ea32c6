"""One click in Dagster that does what `foundry run` does."""

from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from jobs import pipeline
from resources.workspace.store import Store


class BringUpToDate(dg.Config):
    """What to bring up to date."""

    select: str = Field(
        default="",
        description="Assets in Dagster's selection syntax (latents, raw_images+, group:curate), several joined by "
        "commas, with all that they follow from. Empty for everything.",
    )
    accept_missing: list[str] = Field(
        default=[],
        description="Sources whose missing files are meant to be missing, as their folders are now; any other run "
        "stops where a source has lost most of its files.",
    )


@dg.op
def bring_stages_up_to_date(
    context: dg.OpExecutionContext, config: BringUpToDate, store: dg.ResourceParam[Store]
) -> None:
    """Every stale stage in order, a run of its own for each; the log tells which, why, and what
    came of it."""

    def started(stage: str, num_partitions: int, reasons: Sequence[str]) -> None:
        plural = "" if num_partitions == 1 else f", {num_partitions} partitions"
        context.log.info(f"{stage}{plural}: {'; '.join(reasons)}")

    try:
        outcomes = pipeline.bring_up_to_date(
            store.home,
            select=config.select or None,
            accept_missing=config.accept_missing,
            started=started,
        )
    except KeyboardInterrupt:
        raise dg.DagsterExecutionInterruptedError from None
    made = [item for item in outcomes if item.num_made]
    for item in made:
        context.log.info(
            f"{item.stage}: {item.num_made} made in {item.seconds:.0f} s, {item.rows_out} rows"
        )
    for key, reason in ((key, reason) for item in outcomes for key, reason in item.failed.items()):
        context.log.warning(f"{key} is not evaluated: {reason}")
    context.log.info(
        "up to date" if made else "everything selected was up to date: nothing was done"
    )
    rows = [
        dg.TableRecord(
            {
                "stage": item.stage,
                "made now": item.num_made,
                "of": item.num_partitions,
                "rows": item.rows_out,
                "rejected": item.rows_rejected,
                "seconds": round(item.seconds, 1),
            }
        )
        for item in outcomes
    ]
    context.add_output_metadata({"stages": dg.MetadataValue.table(rows)} if rows else {})


@dg.job(
    description="Bring the graph up to date: what is missing or stale, and only that. The same as `foundry run`."
)
def bring_up_to_date() -> None:
    """One op: all stages in order."""
    bring_stages_up_to_date()


JOB = bring_up_to_date
