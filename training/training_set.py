"""Freezes what a run trains on: one row per sample, and a fingerprint that names the set for ever."""

import re

import polars as pl

from training.commit import column_digests, logical_digest
from training.data.tables import TABLES, TAG
from training.errors import DataError

LETTERBOXED = {"name": "letterboxed", "category": "meta"}
"""Tag of a sample with padding, so that a prompt can ask for none."""
_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
_SIDE = re.compile(rf"(?<![a-zA-Z])({'|'.join(_OTHER_SIDE)})(?![a-zA-Z])")


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
    samples = kept.join(
        assigned.select("image_id", "bucket_height", "bucket_width", "padded"), on="image_id", how="inner"
    )
    samples = _turn_words(samples).with_columns(
        tags=pl.when("padded").then(pl.concat_list("tags", pl.lit([LETTERBOXED], dtype=pl.List(TAG)))).otherwise("tags")
    )
    if samples.filter(pl.col("split") == "train").is_empty():
        raise DataError(f"no training image is left: {selected['kept'].sum()} kept, {encoded.height} encoded")
    return TABLES["training_set"].conform(samples.select(list(TABLES["training_set"].columns)))


def _turn_words(samples: pl.DataFrame) -> pl.DataFrame:
    """Of mirrored images, `left` becomes `right` and the other way round, as whole words of tags and caption."""
    turned = samples.filter("flip").with_columns(
        pl.col("caption").map_elements(swap_sides, return_dtype=pl.String),
        pl.col("tags").map_elements(
            lambda tags: [{**tag, "name": swap_sides(tag["name"])} for tag in tags], return_dtype=pl.List(TAG)
        ),
    )
    return samples.update(turned.select("image_id", "caption", "tags"), on="image_id") if turned.height else samples


def swap_sides(text: str) -> str:
    """`text` with the words left and right exchanged, their capitals kept; `_` parts words as a space does."""
    return _SIDE.sub(lambda match: _OTHER_SIDE[match[0]], text)


def fingerprint(samples: pl.DataFrame) -> str:
    """The name of a training set: SHA-256 over its content."""
    return logical_digest(column_digests(samples), samples.height)
