"""Freezes what a run trains on: one row per sample, and a fingerprint that names the set for ever."""

import polars as pl

from training.commit import column_digests, logical_digest
from training.data.tables import TABLES
from training.errors import DataError


def freeze(selected: pl.DataFrame, assigned: pl.DataFrame, encoded: pl.DataFrame) -> pl.DataFrame:
    """The samples of one encoding: kept images with a bucket and with latents.

    Args:
        selected: `selected_images`.
        assigned: `bucket_assignments` of the encoding.
        encoded: image_id of every row of the encoding's latents.

    Raises:
        DataError: nothing is left to train on.
    """
    kept = selected.filter(pl.col("kept")).join(encoded.select("image_id").unique(), on="image_id", how="semi")
    samples = kept.join(assigned.select("image_id", "bucket_height", "bucket_width"), on="image_id", how="inner")
    if samples.filter(pl.col("split") == "train").is_empty():
        raise DataError(f"no training image is left: {selected['kept'].sum()} kept, {encoded.height} encoded")
    return TABLES["training_set"].conform(samples.select(list(TABLES["training_set"].columns)))


def fingerprint(samples: pl.DataFrame) -> str:
    """The name of a training set: SHA-256 over its content."""
    return logical_digest(column_digests(samples), samples.height)
