"""`bucket_assignments`: the training resolution of every kept picture."""

import dagster as dg
import polars as pl

from assets.metadata import describe, materialize
from assets.partitions import encodings
from resources.stages import Reads, Scope, Stage
from resources.store import Made, Store
from training.data.buckets import assign
from training.data.tables import rejections
from training.evaluation import figures

SIZES = ("image_id", "shard", "height", "width", "kept")
STAGE = Stage(
    name="bucket_assignments",
    version=1,
    scope=Scope.ENCODING,
    reads=(Reads("selected_images", SIZES),),
    config=lambda config, key: config.encodings[key].buckets,
)


@dg.asset(deps=["selected_images"], partitions_def=encodings, **describe(STAGE, "encode", "polars"))
def bucket_assignments(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per kept image: its bucket, resized size and crop slack."""

    def make(key: str) -> Made:
        kept = store.read_slice(STAGE, "selected_images", key).filter(pl.col("kept")).drop("kept")
        placed, rejected = assign(kept, store.config.encodings[key].buckets)
        counts = (
            placed.group_by("bucket_height", "bucket_width")
            .len("images")
            .sort("images", "bucket_height", descending=True)
        )
        rows = [{"height": height, "width": width, "images": n} for height, width, n in counts.iter_rows()]
        bars = [(f"{row['height']}×{row['width']}", int(row["images"])) for row in rows[:12]]
        return Made(
            frame=placed,
            rejected=rejections(STAGE.name, rejected),
            rows_in=kept.height,
            report={
                "numbers": {"mean share of area kept": float(placed["area_kept"].mean() or 0)},  # type: ignore[arg-type]
                "tables": {"images per bucket (height, width)": rows},
                "pictures": {"images per bucket": figures.bars(bars)},
            },
        )

    return materialize(context, store, STAGE, make)
