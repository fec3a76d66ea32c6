"""`eval_metrics`: how good a checkpoint's images are."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from assets import references
from assets.metadata import materialize
from resources.engine.workers import Workers, WorkerSpec
from resources.graph import Per, Reads, Scope, Stage
from resources.mlflow.tracking import workspace_tracking
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.evaluation import overbaked, summary
from training.images import figures
from training.names import CheckpointName


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the further scorers, and of what the images are compared with."""
    scorers = {
        f"scorer:{name}": store.models.digest(name)
        for name in store.config.evaluation.scoring.scorers
    }
    return scorers | references.digests(store, key)


@Stage(
    version=4,
    scope=Scope.CHECKPOINT,
    group="evaluate",
    kinds=("pytorch", "huggingface"),
    reads=(Reads("sample_images", per=Per.KEY),),
    # Embeddings need no digest: they follow from the images of the training set, whose fingerprint is
    # among the others, and from CLIP.
    follows=(Reads("embeddings", ("image_id", "projection")),),
    also=(
        Reads("eval_metrics", ("prompt_id", "metric", "value", "embedding")),
        Reads("raw_images", ("image_id", "source", "locator")),
    ),
    config=lambda config, key: {"scorers": list(config.evaluation.scoring.scorers)},
    settings="evaluation.scoring",
    models=("clip", "aesthetic"),
    others=_inputs,
)
def eval_metrics(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per sample image and metric: CLIP score, LAION aesthetic, nearest training image,
    look; and their sum."""

    from training.evaluation.clip_score import load_networks, score

    config = store.config.evaluation.scoring
    folders = {name: store.models.path(name) for name in ("clip", "aesthetic", *config.scorers)}
    spec = WorkerSpec(make=load_networks, arguments=(folders,), kind="evaluate")

    def make(key: str) -> Made:
        samples = store.slices.read(eval_metrics, "sample_images", key)
        compared = references.gather(store, eval_metrics, key, workers, config.batch_size)
        frame = score(
            samples, store.paths.sample_folder(key), workers,
            batch_size=config.batch_size, references=compared,
        )  # fmt: skip
        return Made(frame=frame, report=_report(store, key, frame, samples))

    with Workers(spec, store.config.devices, store.home, say=context.log.info) as workers:
        return materialize(context, store, eval_metrics, make)


def _report(store: Store, key: str, frame: pl.DataFrame, samples: pl.DataFrame) -> dict[str, Any]:
    """The guide's summary first, then what it is to be compared with."""
    summed = _summary(frame)
    groups = frame.filter(pl.col("metric").is_in(["clip_score", "aesthetic"])).group_by(
        "group", "metric"
    )
    failed = frame.filter(pl.col("metric") == "failed").join(samples, on="prompt_id").head(20)
    url = workspace_tracking(store.home, store.config.tracking.uri).run_url(
        CheckpointName.parse(key).run
    )
    clip_scores = frame.filter(pl.col("metric") == "clip_score")["value"].to_list()
    headlines = ("num_failed", *summary.COLUMNS, "aesthetic_std_within", "overbaked_index")
    further = [f"{name}_mean" for name in store.config.evaluation.scoring.scorers]
    return {
        "numbers": {name: summed[name] for name in (*headlines, *further) if name in summed}
        | _alarm(store, key, summed),
        "tables": {
            "means by group": groups.agg(pl.col("value").mean().alias("mean"))
            .sort("metric", "group")
            .to_dicts(),
            "nearest training images (CLIP neighbours)": _rows(
                summed, "train_similarity", ("p50", "p95", "max")
            ),
            "distance from validation images": _distances(summed),
            "look of the images": _looks(summed),
            "images without scores": failed.select("prompt_id", "text", "reason").to_dicts(),
        },
        "pictures": {
            "CLIP scores": figures.histogram(clip_scores),
            **_closest(store, key, frame, samples),
        },
        "links": {"MLflow run": url} if url else {},
    }


def _summary(frame: pl.DataFrame) -> dict[str, float]:
    """Rows of the summary that have a value."""
    rows = frame.filter(pl.col("prompt_id").is_null() & pl.col("value").is_not_nan())
    return dict(rows.select("metric", "value").iter_rows())


def _rows(
    summed: Mapping[str, float], stem: str, columns: tuple[str, ...]
) -> list[dict[str, object]]:
    """The same numbers of the checkpoint's images, of validation images and of the base's
    images."""
    found = []
    for label, prefix in (
        ("checkpoint", stem),
        ("validation images", f"{stem}_validation"),
        ("base", f"{stem}_base"),
    ):
        own = {name: summed[f"{prefix}_{name}"] for name in columns if f"{prefix}_{name}" in summed}
        if own:
            found.append({"images of": label, **own})
    return found


def _distances(summed: Mapping[str, float]) -> list[dict[str, object]]:
    of = {"checkpoint": "", "base": "_base", "as many training images": "_floor"}
    return [
        {"images of": label, "CMMD": summed[f"cmmd{suffix}"], "KID": summed[f"kid{suffix}"]}
        for label, suffix in of.items()
        if f"cmmd{suffix}" in summed
    ]


def _looks(summed: Mapping[str, float]) -> list[dict[str, object]]:
    of = {"checkpoint": "", "base": "_base", "training images": "_train"}
    return [
        {
            "images of": label,
            **{name: summed[f"{name}_mean{suffix}"] for name in overbaked.MEASURES},
            "share with uniform borders": summed[f"border_share{suffix}"],
        }
        for label, suffix in of.items()
        if f"border_share{suffix}" in summed
    ]


def _alarm(store: Store, key: str, summed: Mapping[str, float]) -> dict[str, object]:
    """What alarms in this checkpoint, and the last one of its run before the alarm."""
    run = CheckpointName.parse(key).run
    summaries = {key: summed}
    for part in store.tables.parts("eval_metrics"):
        if CheckpointName.parse(part).run == run and part != key:
            summaries[part] = _summary(
                store.read("eval_metrics", ["prompt_id", "metric", "value"], [part])
            )
    ordered = sorted(summaries.items(), key=lambda item: CheckpointName.parse(item[0]))
    if not any(overbaked.alarms(one) for one in summaries.values()):
        return {}
    return {
        "alarm": "; ".join(overbaked.alarms(summed))
        or "none here, but at another checkpoint of the run",
        "last checkpoint before the alarm": overbaked.last_before_alarm(ordered) or "none",
    }


def _closest(store: Store, key: str, frame: pl.DataFrame, samples: pl.DataFrame) -> dict[str, str]:
    """The images nearest to a training image, each with that image on its right."""
    pairs = references.closest(store, key, frame, samples)
    shown = [
        np.asarray(figures.fit(side, 96, 96))
        for pair in pairs
        for side in (pair.picture, pair.image)
    ]
    captions = [
        text for pair in pairs for text in (f"cosine {pair.similarity:.3f}", pair.image_id[:12])
    ]
    return (
        {"nearest training images": figures.contact_sheet(shown, captions, columns=4)}
        if pairs
        else {}
    )
