"""Bucket plans and who goes where: the training resolutions, and the one that fits each picture's shape best."""

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from training.data.geometry import Size
from training.data.tables import TABLES, Reason
from training.errors import ConfigError

if TYPE_CHECKING:  # config.py imports PLAN_NAMES from here.
    from training.config import BucketConfig

PLAN_NAMES = ("bigasp_v1",)
"""Names that `plan` knows."""

_STEP = 64
_SIDES = range(512, 2048 + 1, _STEP)
_AREA = (946_176, 1_048_576)
_ASPECT = (0.5, 3.0)


def plan(name: str, scale: int = 1) -> tuple[Size, ...]:
    """The sizes of a named plan, each side divided by `scale`, sorted by height and then width.

    `bigasp_v1`: sides 512 to 2048 in steps of 64, area 946,176 to 1,048,576 pixels, width / height 0.5 to 3.

    Raises:
        ConfigError: an unknown name, or a scale that does not divide the plan's step.

    Source: fpgaminer/bigasp-training, encode-vaes.py; its page lists the same 26 sizes.
    """
    if name not in PLAN_NAMES:
        raise ConfigError(f"bucket plan {name!r} must be one of {list(PLAN_NAMES)}")
    if scale < 1 or _STEP % scale:
        raise ConfigError(f"buckets.scale={scale} must divide the plan's step of {_STEP} px")
    full = [Size(height, width) for height in _SIDES for width in _SIDES]
    kept = [s for s in full if _AREA[0] <= s.area <= _AREA[1] and _ASPECT[0] <= s.aspect <= _ASPECT[1]]
    return tuple(Size(size.height // scale, size.width // scale) for size in kept)


def assign(images: pl.DataFrame, config: "BucketConfig") -> tuple[pl.DataFrame, list[dict[str, object]]]:
    """Give each picture the bucket whose shape is nearest to its own.

    Nearest is the smallest distance between the logarithms of width / height; of two buckets at the same
    distance the first in the plan's order wins. A picture is shrunk until it just covers its bucket, and never
    enlarged: a smaller one is rejected.

    Args:
        images: Columns image_id, shard, height, width: upright source size in pixels.
        config: Plan and scale.

    Returns:
        Rows of `bucket_assignments`, and rows for `rejections` with reason `smaller_than_bucket`.

    Source: bigASP's page: the best fit that is not larger than the picture in any dimension.
    """
    sizes = np.array(plan(config.plan, config.scale), dtype=np.int64)  # (buckets, 2), height first
    source = images.select("height", "width").to_numpy().astype(np.int64)  # (N, 2), height first
    chosen = sizes[_nearest(source, sizes)]  # (N, 2)
    fits = (source >= chosen).all(axis=1)
    bucket, size = chosen[fits], source[fits]
    resized, slack = _cover(size, bucket)
    columns = {"bucket": bucket, "resized": resized, "slack": slack}
    placed = images.filter(pl.Series(fits, dtype=pl.Boolean)).select(
        "image_id", "shard", pl.col("height", "width").cast(pl.Int32)
    )
    placed = placed.with_columns(
        *(
            pl.Series(f"{name}_{side}", values[:, axis].astype(np.int32))
            for name, values in columns.items()
            for axis, side in enumerate(("height", "width"))
        ),
        pl.Series("area_kept", bucket.prod(axis=1) / resized.prod(axis=1), dtype=pl.Float64),
    )
    small = np.flatnonzero(~fits)
    rejected: list[dict[str, object]] = [
        {
            "image_id": image_id,
            "reason": Reason.SMALLER_THAN_BUCKET,
            "value": str(Size(*source[row].tolist())),
            "limit": str(Size(*chosen[row].tolist())),
        }
        for row, image_id in zip(small.tolist(), images["image_id"].gather(small).to_list(), strict=True)
    ]
    return placed.select(list(TABLES["bucket_assignments"].columns)), rejected


def _nearest(source: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Index of the nearest bucket by log aspect ratio for each row, first in the plan's order on a tie."""
    shapes = np.log(sizes[:, 1] / sizes[:, 0])
    order = np.argsort(shapes, kind="stable")
    shapes, first = np.unique(shapes[order], return_index=True)
    order = order[first]  # (shapes,): the first bucket of each shape, shapes ascending
    wanted = np.log(source[:, 1] / source[:, 0])
    above = np.clip(np.searchsorted(shapes, wanted), 1, max(len(shapes) - 1, 1))
    below = above - 1
    down, up = np.abs(wanted - shapes[below]), np.abs(shapes[above] - wanted)
    # Distances that differ by rounding only are a tie.
    tie = np.isclose(down, up, rtol=0, atol=1e-12)
    take_below = np.where(tie, order[below] < order[above], down < up)
    return order[np.where(take_below, below, above)]


def _cover(size: np.ndarray, bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest resize that covers the bucket, one side equal to it, and what it overhangs; both (N, 2)."""
    scale = (bucket / size).max(axis=1, keepdims=True)
    resized = (size * scale + 0.5).astype(np.int64)
    return resized, resized - bucket
