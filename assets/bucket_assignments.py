"""`bucket_assignments`: the training resolution of every kept image."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from resources.graph import Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import toml
from training.buckets.bucket_assignments import assign, nothing_fits, report
from training.errors import DataError
from training.images import figures
from training.tables.schemas import rejections

MAX_BARS = 8
BATCH_SIZES = (4, 8, 16)
"""Micro-batch sizes for which the report counts what would be left over."""
COLUMNS = ("image_id", "shard", "height", "width", "kept", "tags")


@Stage(
    version=3,
    scope=Scope.ENCODING,
    group="encode",
    kinds=("polars",),
    reads=(Reads("selected_images", COLUMNS),),
    config=lambda config, key: {
        "buckets": toml.dump(config.encodings[key].buckets),
        "up_crop": toml.dump(config.encodings[key].up_crop),
        "seed": config.encodings[key].seed,
    },
    settings="encodings.{key}",
)
def bucket_assignments(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per kept image: its bucket, resized size, and crop slack or padding."""

    def make(key: str) -> Made:
        encoding = store.config.encodings[key]
        kept = (
            store.slices.read(bucket_assignments, "selected_images", key)
            .filter(pl.col("kept"))
            .drop("kept")
        )
        kept = kept.with_columns(pl.col("tags").list.eval(pl.element().struct.field("name")))
        placed, rejected = assign(kept, encoding.buckets, encoding.up_crop, seed=encoding.seed)
        if kept.height and placed.is_empty():
            raise DataError(f"encoding {key!r}: {nothing_fits(kept, encoding.buckets)}")
        found = report(placed, BATCH_SIZES)
        bars = [
            (f"{height}×{width}", images) for height, width, images, *_ in found.buckets.iter_rows()
        ]
        return Made(
            frame=placed,
            rejected=rejections(bucket_assignments.name, rejected),
            rows_in=kept.height,
            report={
                "numbers": found.numbers,
                "tables": {"images per bucket": found.buckets.to_dicts()},
                "pictures": {"images per bucket, height × width": figures.bars(bars[:MAX_BARS])},
            },
        )

    return materialize(context, store, bucket_assignments, make)
