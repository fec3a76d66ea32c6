"""From people's judgements to a score 0-9 per image."""

import json
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from assets.metadata import materialize
from assets.raw_images import thumbnails
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace.paths import file_digest
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.curation import quality_model as quality
from training.curation import quality_scores as scores
from training.images import figures
from training.manifests import Entry, write_named
from training.tables.schemas import TABLES

NUM_GALLERY = 10


def _labels(store: Store, key: str) -> dict[str, str]:
    """Digests of the judgement files."""
    return {
        f"labels/pairs/{path.name}": file_digest(path)
        for path in sorted(_pairs_folder(store).glob("*.jsonl"))
    }


def _pairs_folder(store: Store) -> Path:
    return store.home / "labels" / "pairs"


@Stage(version=1, scope=Scope.ALL, group="curate", others=_labels)
def quality_pairs(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per judgement of two images, from the append-only files under labels/pairs/."""

    def make(key: str) -> Made:
        frame, problems = scores.read_pairs(_pairs_folder(store))
        outcomes = frame["outcome"].value_counts(sort=True, name="n")
        return Made(
            frame=frame,
            report={
                "numbers": {"unreadable lines": len(problems)},
                "tables": {
                    "outcomes": [{"outcome": name, "count": n} for name, n in outcomes.iter_rows()]
                },
            },
        )

    return materialize(context, store, quality_pairs, make)


@Stage(
    version=1,
    scope=Scope.ALL,
    group="curate",
    kinds=("pytorch",),
    reads=(
        Reads("quality_pairs", ("pair_id", "a", "b", "outcome")),
        Reads("embeddings", ("image_id", "vector")),
    ),
    config=lambda config, key: {
        "min_pairs": config.quality.min_pairs,
        "shares": list(config.quality.shares),
    },
    settings="quality",
    models=("quality_head",),
)
def quality_model(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """The heads that turn an embedding into utility and junk probability, with frozen cut points
    and their report."""

    def make(key: str) -> Made:
        pairs = store.slices.read(quality_model, "quality_pairs", key)
        embeddings = (
            store.slices.read(quality_model, "embeddings", key)
            .unique("image_id", keep="first")
            .sort("image_id")
        )
        fitted = quality.fit(
            pairs, embeddings, store.config.quality, supplied=store.models.path("quality_head")
        )
        folder = store.tables.folder("quality_model", "all")
        entry: Entry = write_named(folder, "all", ".safetensors", fitted.save)
        row = {
            "model": fitted.origin,
            "file": entry.name,
            "num_pairs": fitted.num_pairs,
            "cut_points": list(fitted.cut_points),
            "report": json.dumps(fitted.report, sort_keys=True),
        }
        numbers = {name: value for name, value in fitted.report.items() if value is not None}
        return Made(
            frame=pl.DataFrame([row], schema=TABLES["quality_model"].schema),
            files=(entry,),
            report={"numbers": {"judgements": fitted.num_pairs, "heads": fitted.origin, **numbers}},
        )

    return materialize(context, store, quality_model, make)


@Stage(
    version=1,
    scope=Scope.SHARD,
    group="curate",
    kinds=("pytorch",),
    reads=(
        Reads("embeddings", ("image_id", "vector", "projection"), Per.SHARD),
        Reads("raw_images", ("image_id", "source", "locator", "height", "width", "bytes", "brightness", "contrast",
                             "sharpness"), Per.SHARD),
        Reads("quality_model"),
    ),
    config=lambda config, key: {"junk_threshold": config.quality.junk_threshold},
    settings="quality",
    models=("aesthetic",),
)  # fmt: skip
def quality_scores(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per image: utility, score 0-9 (0 is junk), aesthetic score, low-level measures."""

    def make(key: str) -> Made:
        from training.annotators.aesthetic import Aesthetic

        model = store.slices.read(quality_scores, "quality_model", key).row(0, named=True)
        embeddings = store.slices.read(quality_scores, "embeddings", key).sort("image_id")
        raw = (
            store.slices.read(quality_scores, "raw_images", key)
            .unique("image_id", keep="first")
            .sort("image_id")
        )
        heads = quality.load(
            store.tables.folder("quality_model", "all") / model["file"], model["cut_points"]
        )
        utility, junk = quality.judge(heads, embeddings)
        projections = np.array(embeddings["projection"].to_list(), dtype=np.float32)
        aesthetic = (
            Aesthetic.load(store.models.path("aesthetic"), "cpu")(projections)
            if len(projections)
            else []
        )
        frame = quality.score_table(
            raw, utility, junk, aesthetic, model["cut_points"], store.config.quality
        )
        return Made(frame=frame, rows_in=embeddings.height, report=_report(store, frame, raw))

    return materialize(context, store, quality_scores, make)


def _report(store: Store, frame: pl.DataFrame, raw: pl.DataFrame) -> dict[str, object]:
    """Distribution of the scores, and the best and the worst images."""
    if frame.is_empty():
        return {}
    located = frame.join(raw.select("image_id", "source", "locator"), on="image_id").sort(
        "utility", descending=True
    )
    ends = {"best": located.head(NUM_GALLERY), "worst": located.tail(NUM_GALLERY)}
    galleries = {
        name: thumbnails(store, rows, [f"score {score}" for score in rows["score"]])
        for name, rows in ends.items()
    }
    counts = frame["score"].value_counts(name="n").sort("score")
    return {
        "numbers": {
            "junk": int((frame["score"] == 0).sum()),
            "mean aesthetic": float(frame["aesthetic"].mean() or 0),  # type: ignore[arg-type]
        },
        "pictures": {
            "scores": figures.bars([(str(score), n) for score, n in counts.iter_rows()]),
            **galleries,
        },
    }
