"""Freezes what a run trains on: one row per sample, and a fingerprint that names the set for ever."""

import polars as pl

from training.commit import column_digests, logical_digest
from training.data.tables import TABLES, TAG
from training.data.tags import LETTERBOXED, swap_sides
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
    samples = kept.join(
        assigned.select("image_id", "bucket_height", "bucket_width", "padded"), on="image_id", how="inner"
    )
    letterboxed = pl.lit([{"name": LETTERBOXED, "category": "meta"}], dtype=pl.List(TAG))
    samples = _turn_words(samples).with_columns(
        tags=pl.when("padded").then(pl.concat_list("tags", letterboxed)).otherwise("tags")
    )
    if samples.filter(pl.col("split") == "train").is_empty():
        raise DataError(f"no training image is left: {selected['kept'].sum()} kept, {encoded.height} encoded")
    return TABLES["training_set"].conform(samples.select(list(TABLES["training_set"].columns)))


def _turn_words(samples: pl.DataFrame) -> pl.DataFrame:
    """Of mirrored images, `left` becomes `right` and the other way round, as whole words of tags and captions."""
    turned = samples.filter("flip").with_columns(
        pl.col("caption", "made_caption").map_elements(swap_sides, return_dtype=pl.String),
        pl.col("tags").map_elements(_turn_tags, return_dtype=pl.List(TAG)),
    )
    return (
        samples.update(turned.select("image_id", "caption", "made_caption", "tags"), on="image_id")
        if turned.height
        else samples
    )


def _turn_tags(tags: pl.Series) -> list[dict[str, str]]:
    """Tags of a mirrored picture, sorted by name, each once."""
    turned = {swap_sides(tag["name"]): tag["category"] for tag in tags}
    return [{"name": name, "category": category} for name, category in sorted(turned.items())]


def fingerprint(samples: pl.DataFrame) -> str:
    """The name of a training set: SHA-256 over its content."""
    return logical_digest(column_digests(samples), samples.height)
