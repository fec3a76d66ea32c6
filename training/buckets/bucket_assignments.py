"""Who goes to which bucket: the training resolution that fits each image's shape best, and a
report of all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from training import seeds
from training.buckets.geometry import Size
from training.buckets.plans import BucketConfig, UpCropConfig, follows_image, plan
from training.tables.schemas import TABLES
from training.tables.table import Reason

_TIE = 1e-12
"""Distances of shapes that differ by less differ by rounding only."""
_SIDES = ("height", "width")


def assign(
    images: pl.DataFrame,
    config: BucketConfig,
    up_crop: UpCropConfig | None = None,
    *,
    seed: int = 0,
) -> tuple[pl.DataFrame, list[dict[str, object]]]:
    """Give each image the bucket whose shape is nearest to its own, of those that it covers
    without growing.

    Nearest is the smallest distance between the logarithms of width / height; of two buckets at the
    same distance the first in the plan's order wins. An image that covers no bucket is rejected,
    or with `allow_upscale` enlarged to the nearest of all. The image is then resized until it
    just covers its bucket; or, by `up_crop`, until it fits in.

    Args:
        images: Columns image_id, shard, height, width: upright source size in pixels; and with
            `up_crop` a list of tag names.
        config: Plan, its options and scale.
        up_crop: Which images are padded instead of cropped; None for none.
        seed: Keys which of the eligible ones are padded.

    Returns:
        Rows of `bucket_assignments`, and rows for `rejections` with reason `smaller_than_bucket` or
        `no_bucket`.

    Source: bigASP's page: the best fit that is not larger than the image in any dimension.
    """
    source = images.select(_SIDES).to_numpy().astype(np.int64)  # (N, 2), height first
    if follows_image(config):
        bucket, resized, fits = _own_sizes(source, config)
        wanted = bucket
    else:
        sizes = np.array(plan(config), dtype=np.int64)  # (buckets, 2), height first
        wanted = sizes[_nearest(source, sizes)]
        bucket, fits = _among_covered(source, sizes, wanted, allow_upscale=config.allow_upscale)
        resized = _cover(source, bucket)
    error = np.abs(source[:, 1] / source[:, 0] - bucket[:, 1] / bucket[:, 0])
    far = (
        error > config.value("max_ar_error")
        if config.plan == "arb"
        else np.zeros(len(source), dtype=bool)
    )
    kept = fits & ~far
    rejected = _rejections(images, source, wanted, ~fits, error, fits & far, config)
    placed = images.filter(pl.Series(kept, dtype=pl.Boolean))
    bucket, resized, source = bucket[kept], resized[kept], source[kept]
    cut = 1 - bucket.prod(axis=1) / np.maximum(resized.prod(axis=1), 1)
    padded = (
        np.zeros(len(bucket), dtype=bool)
        if up_crop is None
        else _padded(placed, cut, up_crop, seed)
    )
    resized[padded] = _contain(source[padded], bucket[padded], allow_upscale=config.allow_upscale)
    columns = {
        "bucket": bucket,
        "resized": resized,
        "slack": np.where(padded[:, None], 0, resized - bucket),
        "padding": np.where(padded[:, None], bucket - resized, 0),
    }
    frame = placed.select("image_id", "shard", pl.col(_SIDES).cast(pl.Int32)).with_columns(
        *(
            pl.Series(f"{name}_{side}", values[:, axis].astype(np.int32))
            for name, values in columns.items()
            for axis, side in enumerate(_SIDES)
        ),
        pl.Series("padded", padded, dtype=pl.Boolean),
        pl.Series("area_kept", np.where(padded, 1.0, 1 - cut), dtype=pl.Float64),
    )
    return frame.select(list(TABLES["bucket_assignments"].columns)), rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an assignment means for training."""

    buckets: pl.DataFrame
    """height, width, images, share of all, mean share of area kept; the fullest first."""
    numbers: dict[str, float]
    """Mean share of area kept, images enlarged and padded, buckets with a single image, and
    what each batch size would leave over in an epoch."""


def report(placed: pl.DataFrame, batch_sizes: Sequence[int]) -> Report:
    """Summarise `bucket_assignments` as bigASP's page does, for one's own data.

    Args:
        placed: The table.
        batch_sizes: For each, the images that fill no whole batch of their bucket are counted.
    """
    counted = (
        placed.group_by(height="bucket_height", width="bucket_width")
        .agg(pl.len().alias("images"), pl.col("area_kept").mean().round(4))
        .sort(["images", "height", "width"], descending=[True, False, False])
        .with_columns(share=(pl.col("images") / max(placed.height, 1)).round(4))
        .select("height", "width", "images", "share", "area_kept")
    )
    grown = placed.filter(
        (pl.col("resized_height") > pl.col("height")) | (pl.col("resized_width") > pl.col("width"))
    )
    numbers: dict[str, float] = {
        "mean share of area kept": float(placed["area_kept"].mean() or 0),  # type: ignore[arg-type]
        "enlarged": grown.height,
        "padded": int(placed["padded"].sum()),
        "buckets in use": counted.height,
        "buckets with a single image": counted.filter(images=1).height,
    }
    for size in batch_sizes:
        numbers[f"left over by batches of {size}"] = int((counted["images"] % size).sum())
    return Report(buckets=counted, numbers=numbers)


def _among_covered(
    source: np.ndarray, sizes: np.ndarray, wanted: np.ndarray, *, allow_upscale: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest bucket that each image covers, `(N, 2)`, and whether there is one; few need a
    second look."""
    bucket = wanted.copy()
    fits: np.ndarray = np.all(source >= wanted, axis=1)
    second = np.flatnonzero(~fits)
    shapes = np.log(sizes[:, 1] / sizes[:, 0])
    for rows in np.array_split(second, max(len(second) * len(sizes) // 4_000_000, 1)):
        covered: np.ndarray = np.all(
            source[rows, None, :] >= sizes[None, :, :], axis=2
        )  # (n, buckets)
        distance = np.abs(np.log(source[rows, 1] / source[rows, 0])[:, None] - shapes[None, :])
        distance[~covered] = np.inf
        least = distance.min(axis=1, keepdims=True)
        chosen = np.argmax(distance <= least + _TIE, axis=1)
        some: np.ndarray = np.asarray(covered.any(axis=1))
        bucket[rows[some]] = sizes[chosen[some]]
        fits[rows] = some
    return bucket, fits | allow_upscale


def _nearest(source: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Index of the nearest bucket by log aspect ratio for each row, first in the plan's order on a
    tie."""
    shapes = np.log(sizes[:, 1] / sizes[:, 0])
    order = np.argsort(shapes, kind="stable")
    shapes, first = np.unique(shapes[order], return_index=True)
    order = order[first]  # (shapes,): the first bucket of each shape, shapes ascending
    wanted = np.log(source[:, 1] / source[:, 0])
    above = np.clip(np.searchsorted(shapes, wanted), 1, max(len(shapes) - 1, 1))
    above = np.minimum(above, len(shapes) - 1)
    below = np.maximum(above - 1, 0)
    down, up = np.abs(wanted - shapes[below]), np.abs(shapes[above] - wanted)
    tie = np.isclose(down, up, rtol=0, atol=_TIE)
    take_below = np.where(tie, order[below] < order[above], down < up)
    return order[np.where(take_below, below, above)]


def _own_sizes(
    source: np.ndarray, config: BucketConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """kohya's no_upscale: bucket and resized size of each image, `(N, 2)`, and whether a step
    fits into it.

    An image beyond the area shrinks to it, with one side rounded to the step. Which side: that
    whose bucket, both sides in whole steps, keeps the image's shape better; on a tie the height.
    Then both sides are cut to the step.

    Source: kohya-ss/sd-scripts, library/train_util.py, BucketManager.select_bucket.
    """
    area, step = config.value("area") // config.scale**2, config.value("step") // config.scale
    aspect = source[:, 1] / source[:, 0]
    width = np.sqrt(area * aspect)
    by_width = _round(width) // step * step
    by_height = _round(area / width) // step * step
    a = np.stack([_round(by_width / aspect), by_width], axis=1)
    b = np.stack([by_height, _round(by_height * aspect)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error_a, error_b = (
            np.abs(c[:, 1] / c[:, 0] - aspect) for c in (a // step * step, b // step * step)
        )
    shrunk = np.where((error_a < error_b)[:, None], a, b)
    resized = np.where((source.prod(axis=1) > area)[:, None], shrunk, source)
    bucket = resized // step * step
    fits = (bucket > 0).all(axis=1)
    return np.maximum(bucket, step), resized, fits


def _round(sides: np.ndarray) -> np.ndarray:
    """To whole pixels, halves up."""
    return (sides + 0.5).astype(np.int64)


def _cover(size: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """The smallest resize that covers the bucket, one side equal to it; `(N, 2)`."""
    scale = (bucket / size).max(axis=1, keepdims=True)
    return _round(size * scale)


def _contain(size: np.ndarray, bucket: np.ndarray, *, allow_upscale: bool) -> np.ndarray:
    """The largest resize that fits into the bucket; `(N, 2)`."""
    scale = (bucket / size).min(axis=1, keepdims=True)
    if not allow_upscale:
        scale = np.minimum(scale, 1.0)
    return np.maximum(_round(size * scale), 1)


def _padded(placed: pl.DataFrame, cut: np.ndarray, config: UpCropConfig, seed: int) -> np.ndarray:
    """Which images are padded instead of cropped, `(N,)`; a draw depends on the image and on
    nothing else."""
    if not config.share:
        return np.zeros(len(cut), dtype=bool)
    drawn = (
        placed["tags"]
        .list.set_intersection(pl.Series([list(config.except_tags)]))
        .list.len()
        .to_numpy()
        > 0
    )
    eligible = (cut >= config.min_cut) & ~drawn
    chosen = np.zeros(len(cut), dtype=bool)
    for row in np.flatnonzero(eligible).tolist():
        rng = seeds.generator(seed, seeds.Purpose.CROP, "padded", placed["image_id"][row])
        chosen[row] = rng.random() < config.share
    return chosen


def _rejections(
    images: pl.DataFrame,
    source: np.ndarray,
    wanted: np.ndarray,
    small: np.ndarray,
    error: np.ndarray,
    far: np.ndarray,
    config: BucketConfig,
) -> list[dict[str, object]]:
    """Rows of `rejected_images` for those that cover no bucket, and for those too unlike any."""
    reason = Reason.SMALLER_THAN_BUCKET
    rows = [
        {
            "reason": reason,
            "value": str(Size(*source[i].tolist())),
            "limit": str(Size(*wanted[i].tolist())),
        }
        for i in np.flatnonzero(small).tolist()
    ]
    rows += [
        {
            "reason": Reason.NO_BUCKET,
            "value": f"{error[i]:.3f}",
            "limit": f"{config.value('max_ar_error'):g}",
        }
        for i in np.flatnonzero(far).tolist()
    ]
    numbers = np.concatenate([np.flatnonzero(small), np.flatnonzero(far)])
    ids = images["image_id"].gather(numbers).to_list()
    return [{"image_id": image_id, **row} for image_id, row in zip(ids, rows, strict=True)]


def nothing_fits(images: pl.DataFrame, config: BucketConfig) -> str:
    """One line for a plan into which none of the images goes: what the largest is, and the
    smallest bucket."""
    largest = max(
        (Size(*row) for row in images.select(_SIDES).iter_rows()), key=lambda size: size.area
    )
    sizes = plan(config)
    smallest = (
        f"its smallest bucket is {min(sizes, key=lambda size: size.area)}"
        if sizes
        else "it needs larger ones"
    )
    return (
        f"bucket plan {config.plan!r}: none of {images.height} images fits, the largest has {largest} px, "
        f"{smallest}; choose a smaller plan, a scale, or allow_upscale = true"
    )
