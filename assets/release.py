"""`release`: a run's last checkpoint as a folder that stands alone, with a card that says how it came about."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.metadata import describe, materialize
from assets.partitions import runs
from resources.stages import Scope, Stage
from resources.store import Made, Store
from resources.tracking import choose_pictures, workspace_tracking
from training import release as releasing
from training.commit import write_bytes
from training.errors import DataError, TrackingError
from training.evaluation import contact_sheet, figures, report
from training.evaluation.report import Side
from training.event_log import read_events
from training.run_folder import CONFIG, EVENTS, read_config, read_inputs, read_ready

NUM_SHOWN = 8
NUM_IN_SHEET = 24
"""Prompts, of each group in turn, in Dagster's metadata and in the contact sheet."""


def _last(store: Store, run: str) -> str:
    """Name of a finished run's last checkpoint; empty while it has none."""
    if store.manifest("checkpoints", run) is None:
        return ""
    return str(store.read("checkpoints", ["checkpoint", "samples_seen"], [run]).sort("samples_seen")["checkpoint"][-1])


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the last checkpoint, its scores and its verdict."""
    last = _last(store, key)
    if not last:
        return {"checkpoint": "absent"}
    tables = {"eval_metrics": last, "verdicts": f"base~{last}"}
    found = {table: store.manifest(table, part) for table, part in tables.items()}
    digests = {table: manifest.digest if manifest else "absent" for table, manifest in found.items()}
    return {"checkpoint": store.checkpoint_digest(last), **digests}


STAGE = Stage(name="release", version=1, scope=Scope.RUN, others=_inputs)


@dg.asset(
    deps=[dg.AssetDep(name, partition_mapping=dg.AllPartitionMapping()) for name in ("checkpoints", "verdicts")],
    partitions_def=runs,
    **describe(STAGE, "evaluate", "huggingface"),
)
def release(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per file of the release: the last checkpoint's model, its card, its report and its configuration."""

    def make(key: str) -> Made:
        last = _last(store, key)
        if not last:
            raise DataError(f"release {key}: the run has no finished checkpoint; run `foundry train --run {key}`")
        folder, model = store.home / "release" / key, store.checkpoint_folder(last)
        page = render_report(store, key, last)
        releasing.assemble(
            folder,
            model=model,
            model_files=[entry.name for entry in read_ready(model).files],
            texts={"README.md": render_card(store, key, last), "report.html": page},
            copies={"config.toml": store.run_folder(key) / CONFIG},
        )
        return Made(
            frame=releasing.table(folder),
            report={
                "numbers": {"checkpoint": last, "folder": str(folder)},
                "pictures": {"before and after": _grid(store, last)},
            },
        )

    result = materialize(context, store, STAGE, make)
    for key in context.partition_keys:
        _track(context, store, key)
    return result


def _sides(store: Store, last: str) -> list[Side]:
    """The base and the checkpoint, as the report shows them."""
    return [
        Side(
            checkpoint=name,
            samples=store.read("sample_images", parts=[name]),
            metrics=store.read("eval_metrics", parts=[name]),
            folder=store.sample_folder(name),
        )
        for name in (store.base_checkpoint() or "", last)
    ]


def render_report(store: Store, run: str, last: str) -> str:
    """The run's report as one HTML page."""
    events = read_events(store.run_folder(run) / EVENTS)
    curves = {
        "validation loss": [
            (event["samples_seen"], event["loss"]) for event in events if event["event"] == "validation"
        ],
        "training loss": [(event["samples_seen"], event["loss"]) for event in events if event["event"] == "step"],
    }
    config, sampling = read_config(store.run_folder(run)), store.config.evaluation.sampling
    facts = {
        "training set": read_inputs(store.run_folder(run)).fingerprint[:12],
        "samples": config.num_samples,
        "prompts": store.config.evaluation.prompt_set,
        "sampler": f"{sampling.sampler} {sampling.schedule}, {sampling.num_steps} steps",
    }
    verdicts = store.read("verdicts", parts=[f"base~{last}"])
    return report.render(f"Run {run}", _sides(store, last), verdicts, curves, facts)


def render_card(store: Store, run: str, last: str) -> str:
    """The model card as Markdown."""
    from training.evaluation import model_card

    base = store.read("base_model", parts=["base"]).row(0, named=True)
    inputs = read_inputs(store.run_folder(run))
    return model_card.render(
        model_card.Card(
            checkpoint=last,
            digest=store.checkpoint_digest(last),
            base=Path(store.config.models.base).name,
            base_digest=base["digest"],
            family=base["family"],
            license_name=store.config.models.base_license,
            fingerprint=inputs.fingerprint,
            training_set=model_card.count_set(pl.read_parquet(inputs.training_set)),
            run=read_config(store.run_folder(run)),
            evaluation=store.config.evaluation,
            verdicts=store.read("verdicts", parts=[f"base~{last}"]),
        )
    )


def _grid(store: Store, last: str) -> str:
    """Base and checkpoint side by side for a few prompts, as Markdown."""
    from training.evaluation.clip_score import read_picture

    before, after = _sides(store, last)
    both = before.samples.join(after.samples.select("prompt_id", after="file"), on="prompt_id")
    rows = choose_pictures(both, NUM_SHOWN)
    pictures, captions = [], []
    for row in rows.iter_rows(named=True):
        pictures += [read_picture(before.folder / row["file"]), read_picture(after.folder / row["after"])]
        captions += [f"base: {row['text']}", "fine-tuned"]
    return figures.contact_sheet(pictures, captions)


def _track(context: dg.AssetExecutionContext, store: Store, key: str) -> None:
    """Put the report and the grid beside the run in MLflow; when it is away, say so and go on."""
    from training.evaluation.clip_score import read_picture

    last = _last(store, key)
    before, after = _sides(store, last)
    both = before.samples.filter(pl.col("prompt_id").is_in(after.samples["prompt_id"]))
    rows = [
        contact_sheet.Row(
            title=row["prompt_id"],
            text=row["text"],
            pictures=[read_picture(side.folder / row["file"]) for side in (before, after)],
        )
        for row in choose_pictures(both, NUM_IN_SHEET).iter_rows(named=True)
    ]
    sheet = contact_sheet.grid(rows, [before.checkpoint, after.checkpoint])
    write_bytes(store.home / "sample_images" / f"{key}_contact_sheet.jpg", sheet)
    try:
        tracking = workspace_tracking(store.home, store.config.tracking.uri)
        tracking.log_file(last, "contact_sheet.jpg", sheet)
        tracking.log_file(last, "report.html", (store.home / "release" / key / "report.html").read_bytes())
    except TrackingError as error:
        context.log.warning(f"MLflow: {error}")
