"""Which sentences an image is trained with: its source's own, and one that a model made."""

import polars as pl

from training.tables.schemas import TABLES

SIDECAR = "sidecar"
"""Model name under which a source's own sentences stand in `captions`."""


def from_sources(listing: pl.DataFrame, raw_images: pl.DataFrame) -> pl.DataFrame:
    """The sources' own sentences as rows of `captions`.

    Args:
        listing: Columns source, source_id, caption.
        raw_images: Columns source, source_id, image_id.

    Returns:
        `captions` with model `sidecar`, a row for each image: the sentence of its first candidate
        that has one, null when none has.
    """
    joined = raw_images.select("source", "source_id", "image_id").join(
        listing.select("source", "source_id", "caption"), on=["source", "source_id"], how="left"
    )
    found = (
        joined.sort("source", "source_id")
        .group_by("image_id")
        .agg(pl.col("caption").drop_nulls().first())
        .select("image_id", "caption", model=pl.lit(SIDECAR))
    )
    return TABLES["captions"].conform(found)


def choose(captions: pl.DataFrame) -> pl.DataFrame:
    """Each image's own sentence and the one that a model made.

    Args:
        captions: Rows of `captions`, of any models; empty sentences count as none.

    Returns:
        Columns image_id, caption (the source's own, null when it has none), made_caption (of the
        first model by name that has one); images without a sentence are absent.
    """
    present = captions.filter(pl.col("caption").str.strip_chars() != "").sort("model")
    own = pl.col("model") == SIDECAR
    return (
        present.group_by("image_id")
        .agg(
            pl.col("caption").filter(own).first(),
            made_caption=pl.col("caption").filter(~own).first(),
        )
        .sort("image_id")
    )
