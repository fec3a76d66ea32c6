"""`eval_metrics` and `verdicts`: how good a checkpoint's pictures are, and whether that is better than the base."""

import json
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.metadata import describe, materialize
from assets.partitions import checkpoints
from resources import devices
from resources.stages import Per, Reads, Scope, Stage
from resources.store import Made, Store
from resources.tracking import workspace_tracking
from training.data.tables import TABLES
from training.errors import DataError, TrackingError
from training.evaluation import figures

if TYPE_CHECKING:
    from training.evaluation.verdict import Scores

METRICS = Stage(
    name="eval_metrics",
    version=1,
    scope=Scope.CHECKPOINT,
    reads=(Reads("sample_images", per=Per.KEY),),
    models=("clip", "aesthetic"),
)


def _base_scores(store: Store, key: str) -> dict[str, str]:
    """Digest of the base model's scores, which every verdict compares with."""
    base = store.base_checkpoint()
    manifest = store.manifest("eval_metrics", base) if base else None
    return {"base": manifest.digest if manifest else "absent"}


VERDICTS = Stage(
    name="verdicts",
    version=1,
    scope=Scope.CHECKPOINT,
    reads=(Reads("eval_metrics", per=Per.KEY),),
    config=lambda config, key: config.evaluation.verdicts,
    models=("clip", "aesthetic"),
    others=_base_scores,
    prefix="base~",
)


@dg.asset(deps=["sample_images"], partitions_def=checkpoints, **describe(METRICS, "evaluate", "pytorch", "huggingface"))
def eval_metrics(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per sample image and metric (CLIP score, LAION aesthetic, embedding), and the summary of them all."""

    def make(key: str) -> Made:
        from training.evaluation.clip_score import score
        from training.models.aesthetic import Aesthetic
        from training.models.clip import Clip

        samples = store.read_slice(METRICS, "sample_images", key)
        with devices.hold("evaluate", store.config.devices, store.home) as device:
            clip = Clip.load(store.model_path("clip"), device)
            aesthetic = Aesthetic.load(store.model_path("aesthetic"), device)
            frame = score(
                samples,
                store.sample_folder(key),
                clip,
                aesthetic,
                batch_size=store.config.evaluation.scoring.batch_size,
            )
        return Made(frame=frame, report=_report(store, key, frame))

    return materialize(context, store, METRICS, make)


def _report(store: Store, key: str, frame: pl.DataFrame) -> dict[str, Any]:
    summary = frame.filter(pl.col("prompt_id").is_null())
    scores = frame.filter(pl.col("metric") == "clip_score")
    groups = frame.filter(pl.col("metric").is_in(["clip_score", "aesthetic"])).group_by("group", "metric")
    url = workspace_tracking(store.home, store.config.tracking.uri).run_url(key.partition("@")[0])
    return {
        "numbers": dict(summary.filter(pl.col("value").is_not_nan()).select("metric", "value").iter_rows()),
        "tables": {
            "means by group": groups.agg(pl.col("value").mean().alias("mean")).sort("metric", "group").to_dicts()
        },
        "pictures": {"CLIP scores": figures.histogram(scores["value"].to_list())},
        "links": {"MLflow run": url} if url else {},
    }


def _track(context: dg.AssetExecutionContext, store: Store, key: str) -> None:
    """Send scores, verdicts and a handful of pictures to MLflow; when it is away, say so and go on."""
    try:
        tracking = workspace_tracking(store.home, store.config.tracking.uri)
        tracking.log_evaluation(
            key,
            metrics=store.read("eval_metrics", parts=[key]),
            samples=store.read("sample_images", parts=[key]),
            folder=store.sample_folder(key),
        )
        if VERDICTS.part(key) in store.parts("verdicts"):
            tracking.log_verdicts(store.read("verdicts", parts=[VERDICTS.part(key)]))
    except TrackingError as error:
        context.log.warning(f"MLflow: {error}")


def scores_of(store: Store, checkpoint: str) -> "Scores":
    """A checkpoint's committed scores, with the protocol that its manifests say they were made by.

    Raises:
        DataError: they are not committed, or its pictures have been drawn anew since.
    """
    from training.evaluation.clip_score import DTYPE
    from training.evaluation.verdict import Protocol, Scores

    pictures, metrics = (store.manifest(table, checkpoint) for table in ("sample_images", "eval_metrics"))
    if pictures is None or metrics is None:
        raise DataError(f"checkpoint {checkpoint} has no scores yet: foundry run --select eval_metrics")
    drawn = METRICS.reads[0].label
    if metrics.inputs[drawn] != pictures.digest:
        raise DataError(f"checkpoint {checkpoint}: its pictures are newer than its scores; run `foundry run` first")
    protocol = Protocol(
        prompts=pictures.inputs["prompts"],
        sampling=json.dumps(pictures.config, sort_keys=True),
        clip=metrics.models["clip"],
        aesthetic=metrics.models["aesthetic"],
        dtype=DTYPE,
    )
    return Scores(checkpoint=checkpoint, protocol=protocol, metrics=store.read("eval_metrics", parts=[checkpoint]))


@dg.asset(deps=["eval_metrics"], partitions_def=checkpoints, **describe(VERDICTS, "evaluate"))
def verdicts(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per metric and prompt group: is this checkpoint better than its base, by how much, how surely?"""

    def make(key: str) -> Made:
        from training.evaluation.verdict import compare, sentence

        base = store.base_checkpoint()
        if base is None or store.manifest("eval_metrics", base) is None:
            raise DataError(f"verdicts {key}: the base model {base or ''} has no eval_metrics yet; run that first")
        if key == base:
            return Made(frame=TABLES["verdicts"].empty(), report={"numbers": {"note": "the base is not compared"}})
        rules = store.config.evaluation.verdicts
        margins = {"clip_score": rules.clip_margin, "aesthetic": rules.aesthetic_margin}
        frame = compare(scores_of(store, base), scores_of(store, key), margins)
        return Made(
            frame=frame,
            report={
                "numbers": {f"{row['metric']} ({row['group']})": row["verdict"] for row in frame.iter_rows(named=True)},
                "tables": {"verdicts": [{"verdict": sentence(row)} for row in frame.iter_rows(named=True)]},
            },
        )

    result = materialize(context, store, VERDICTS, make)
    for key in context.partition_keys:
        _track(context, store, key)
    return result
