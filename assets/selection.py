"""`selected_images`: which images go on, by which rule the others fell, and the split that never
leaks."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.raw_images import thumbnails
from assets.tags import aliases_digest, read_aliases
from resources.graph import Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.curation.selection import funnel, select
from training.images import figures

PREVIOUS = ("image_id", "split", "stable")
"""What an image once was, it stays."""


def _plain(section: object) -> dict[str, object]:
    from training import toml

    return toml.dump(section)


@Stage(
    version=3,
    scope=Scope.ALL,
    group="curate",
    kinds=("polars",),
    reads=(
        Reads(
            "source_listing",
            ("source", "source_id", "shard", "gone_at", "tags", "rating", "split", "crop_box"),
        ),
        Reads("raw_images", ("source", "source_id", "image_id", "locator", "height", "width")),
        Reads("duplicate_groups", ("group", "source", "source_id", "image_id", "kind", "kept")),
        Reads("quality_scores", ("image_id", "score", "bytes_per_pixel")),
        Reads("tags", ("image_id", "tags")),
        Reads("captions", ("image_id", "model", "caption")),
        Reads("watermark_boxes", ("image_id", "boxes")),
    ),
    also=(Reads("selected_images", PREVIOUS),),
    config=lambda config, key: {"selection": _plain(config.selection), "tags": _plain(config.tags)},
    others=aliases_digest,
)
def selected_images(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per image: kept or the rule that dropped it, its split, score, tags, caption and
    boxes."""

    def make(key: str) -> Made:
        tables = {
            reads.table: store.slices.read(selected_images, reads.table, key)
            for reads in selected_images.reads
        }
        frame = select(
            tables,
            aliases=read_aliases(store),
            tag_config=store.config.tags,
            config=store.config.selection,
            previous=store.read("selected_images", PREVIOUS),
        )
        return Made(frame=frame, report=_report(store, frame))

    return materialize(context, store, selected_images, make)


def _report(store: Store, frame: pl.DataFrame) -> dict[str, object]:
    kept = frame.filter(pl.col("kept"))
    dropped = (
        frame.filter(~pl.col("kept")).unique("rule", keep="first", maintain_order=True).head(12)
    )
    splits = dict(kept["split"].value_counts(name="n").iter_rows())
    scores = kept["score"].value_counts(name="n").sort("score")
    return {
        "numbers": {
            "kept": kept.height,
            "train": splits.get("train", 0),
            "validation": splits.get("validation", 0),
            "stable": int(kept["stable"].sum()),
        },
        "tables": {"funnel": funnel(frame).to_dicts()},
        "pictures": {
            "scores of the kept": figures.bars(
                [(str(score), n) for score, n in scores.iter_rows()]
            ),
            "kept": thumbnails(store, kept.head(16)),
            "one that each rule dropped": thumbnails(store, dropped, dropped["rule"].to_list()),
        },
    }
