"""Stages from outside of the package: the shapes of kept images, captions made of file names, and one
that reads what it does not declare."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.rules import Finding, check
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.tables.schemas import TABLES
from training.tables.table import IMAGE_ID, Table, column

TABLES["image_shapes"] = Table(
    "image_shapes", "kept image", ("image_id",),
    {"image_id": IMAGE_ID, "shape": column(pl.String, "portrait, landscape or square")},
)  # fmt: skip


@Stage(
    version=1,
    scope=Scope.ALL,
    group="curate",
    reads=(Reads("selected_images", ("image_id", "height", "width", "kept")),),
    config=lambda config, key: {"min_score": config.selection.min_score},
    settings="selection",
)
def image_shapes(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per kept image: whether it is taller than wide, wider than tall, or square."""

    def make(key: str) -> Made:
        kept = store.slices.read(image_shapes, "selected_images", key).filter("kept")
        taller, wider = pl.col("height") > pl.col("width"), pl.col("height") < pl.col("width")
        shape = pl.when(taller).then(pl.lit("portrait")).when(wider).then(pl.lit("landscape"))
        frame = kept.select("image_id", shape=shape.otherwise(pl.lit("square")))
        return Made(frame=frame, rows_in=kept.height)

    return materialize(context, store, image_shapes, make)


@check("image_shapes")
def not_all_square(store: Store) -> Finding:
    """Kept images are not all square: that means squares were cut before."""
    shapes = store.read("image_shapes")["shape"]
    squares = int((shapes == "square").sum())
    return Finding(squares < len(shapes), "some image is not square", {"squares": squares})


@Stage(
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    table="captions",
    model="file_name",
    reads=(Reads("raw_images", ("image_id", "source_id"), Per.SHARD),),
)
def name_captions(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per image: its file's name as a caption, beside those of sidecars in the same table."""

    def make(key: str) -> Made:
        raw = store.slices.read(name_captions, "raw_images", key)
        frame = raw.select("image_id", model=pl.lit("file_name"), caption="source_id")
        return Made(frame=frame, rows_in=raw.height)

    return materialize(context, store, name_captions, make)


@Stage(
    version=1,
    scope=Scope.ALL,
    group="curate",
    table="image_shapes",
    model="careless",
    reads=(Reads("selected_images", ("image_id", "kept")),),
)
def careless_shapes(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per image, made of a table that the declaration does not name: it must fail."""

    def make(key: str) -> Made:
        raw = store.read("raw_images", ["image_id"])
        return Made(frame=raw.with_columns(shape=pl.lit("square")))

    return materialize(context, store, careless_shapes, make)
