"""`training_set`: what a run trains on, frozen under a fingerprint."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.images import figures
from training.runs.training_set import freeze


@Stage(
    version=3,
    scope=Scope.ENCODING,
    group="encode",
    kinds=("polars",),
    reads=(
        Reads("selected_images", ("image_id", "shard", "height", "width", "kept", "score", "tags", "caption",
                                  "made_caption", "words", "boxes", "split", "stable", "flip")),
        Reads("bucket_assignments", ("image_id", "bucket_height", "bucket_width", "padded"), Per.ENCODING),
        Reads("latents", ("image_id",), Per.ENCODING_ALL),
    ),
)  # fmt: skip
def training_set(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per sample of an encoding. Its digest is the fingerprint that runs and checkpoints
    carry."""

    def make(key: str) -> Made:
        tables = {
            reads.table: store.slices.read(training_set, reads.table, key)
            for reads in training_set.reads
        }
        frame = freeze(tables["selected_images"], tables["bucket_assignments"], tables["latents"])
        splits = frame["split"].value_counts(name="n").sort("split")
        lengths = frame["tags"].list.len().to_list()
        return Made(
            frame=frame,
            report={
                "numbers": {
                    **dict(splits.iter_rows()),
                    "with a caption": frame["caption"].count(),
                    "with a made caption": frame["made_caption"].count(),
                    "with a watermark": int((frame["boxes"].list.len() > 0).sum()),
                    "padded": int(tables["bucket_assignments"]["padded"].sum()),
                    "without a tag": int(
                        frame.select((pl.col("tags").list.len() == 0).sum()).item()
                    ),
                },
                "pictures": {"tags per sample": figures.histogram(lengths)},
            },
        )

    return materialize(context, store, training_set, make)
