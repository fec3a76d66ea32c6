"""`eval_metrics`: how good a checkpoint's pictures are."""

from typing import Any

import dagster as dg
import polars as pl

from assets.metadata import describe, materialize
from assets.partitions import checkpoints
from resources import devices
from resources.stages import Per, Reads, Scope, Stage
from resources.store import Made, Store
from resources.tracking import workspace_tracking
from training.evaluation import figures

METRICS = Stage(
    name="eval_metrics",
    version=1,
    scope=Scope.CHECKPOINT,
    reads=(Reads("sample_images", per=Per.KEY),),
    models=("clip", "aesthetic"),
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
