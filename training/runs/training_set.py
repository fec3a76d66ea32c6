"""Freezes what a run trains on: one row per sample, and a fingerprint that names the set for
ever."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from training.commit import column_digests, logical_digest
from training.curation.tags import LETTERBOXED, swap_sides
from training.errors import DataError
from training.manifests import read_parquet
from training.runs.run_folder import RunInputs
from training.tables.schemas import TABLES
from training.tables.table import TAG

FORGOTTEN = "forgotten"
"""Split of a row whose image was forgotten after the set was frozen."""


def freeze(selected: pl.DataFrame, assigned: pl.DataFrame, encoded: pl.DataFrame) -> pl.DataFrame:
    """The samples of one encoding: kept images with a bucket and with latents.

    Args:
        selected: `selected_images`.
        assigned: `bucket_assignments` of the encoding.
        encoded: image_id of every row of the encoding's latents.

    Raises:
        DataError: nothing is left to train on.
    """
    kept = selected.filter(pl.col("kept")).join(
        encoded.select("image_id").unique(), on="image_id", how="semi"
    )
    samples = kept.join(
        assigned.select("image_id", "bucket_height", "bucket_width", "padded"),
        on="image_id",
        how="inner",
    )
    letterboxed = pl.lit([{"name": LETTERBOXED, "category": "meta"}], dtype=pl.List(TAG))
    samples = _turn_words(samples).with_columns(
        tags=pl.when("padded").then(pl.concat_list("tags", letterboxed)).otherwise("tags")
    )
    if samples.filter(pl.col("split") == "train").is_empty():
        raise DataError(
            f"no training image is left: {selected['kept'].sum()} kept, {encoded.height} encoded"
        )
    return TABLES["training_set"].conform(samples.select(list(TABLES["training_set"].columns)))


def _turn_words(samples: pl.DataFrame) -> pl.DataFrame:
    """Of mirrored images, `left` becomes `right` and the other way round, as whole words of tags
    and captions."""
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
    """Tags of a mirrored image, sorted by name, each once."""
    turned = {swap_sides(tag["name"]): tag["category"] for tag in tags}
    return [{"name": name, "category": category} for name, category in sorted(turned.items())]


def blank(samples: pl.DataFrame, image_ids: Sequence[str]) -> pl.DataFrame:
    """A frozen set in which some images are forgotten: of such a row the id, the shard and the
    place in the set stay.

    Its split is `forgotten`: it neither trains nor validates, and everything else that was derived
    from the image is gone.
    """
    forgotten = pl.col("image_id").is_in(list(image_ids))
    empty: dict[str, Any] = {"split": FORGOTTEN, "stable": False}
    kept = ("image_id", "shard")
    lists = {name for name, dtype in samples.schema.items() if isinstance(dtype, pl.List)}
    return samples.with_columns(
        pl.when(forgotten)
        .then(pl.lit([] if name in lists else empty.get(name), dtype=dtype))
        .otherwise(pl.col(name))
        .alias(name)
        for name, dtype in samples.schema.items()
        if name not in kept
    )


def shards_of(training_set: Path) -> pl.DataFrame:
    """shard and image_id of a frozen set's images that have latents: all but the forgotten ones."""
    samples = read_parquet(training_set, ["shard", "image_id", "split"])
    return samples.filter(pl.col("split") != FORGOTTEN).drop("split")


def count_forgotten(training_set: Path) -> int:
    """Images of a frozen set that were forgotten since; 0 where its file is missing."""
    if not training_set.is_file():
        return 0
    return int((read_parquet(training_set, ["split"])["split"] == FORGOTTEN).sum())


def require_whole(inputs: RunInputs) -> None:
    """Check that a run that is to be trained lacks no images but those that it was told to go on
    without.

    Raises:
        DataError: more of its images were forgotten.
    """
    count = count_forgotten(inputs.training_set)
    if count > inputs.num_left_out:
        raise DataError(
            f"run {inputs.run}: {count} images of its training set were forgotten since it was frozen; go on without "
            f"them by `foundry train --run {inputs.run} --without-forgotten`, or begin another run"
        )


def fingerprint(samples: pl.DataFrame) -> str:
    """The name of a training set: SHA-256 over its content."""
    return logical_digest(column_digests(samples), samples.height)
