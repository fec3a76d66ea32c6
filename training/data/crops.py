"""From a picture to its bucket: where the crop lies, the pixels of it, and where a box of the source ends up.

The same placement makes the pixels, the conditioning and the mask, so that the three cannot disagree.
"""

from typing import Literal

import numpy as np
from PIL import Image

from training import seeds
from training.data.geometry import Box, Placement, Size
from training.errors import DataError


def place(
    original: Size,
    bucket: Size,
    *,
    mode: Literal["random", "centre"],
    seed: int,
    generation: int,
    image_id: str,
    flip: bool = False,
    crop_box: Box | None = None,
) -> Placement:
    """Shrink a picture until it just covers its bucket, and choose which part of the overhang to cut.

    Args:
        original: Upright source size, px.
        bucket: Target size, px.
        mode: `random` draws the offset from (generation, image_id); `centre` halves the overhang, rounded down.
        seed: Keys the draw.
        generation: Encoding pass: each pass crops anew.
        image_id: SHA-256 of the source.
        flip: Mirror left to right after the crop.
        crop_box: Part of the source that matters, upright source px. It wins over `mode`: the crop lies as
            near to the box's centre as the picture's borders allow.

    Returns:
        A placement with one side of `resized` equal to the bucket's and none shorter.

    Raises:
        DataError: the picture would have to grow.

    Source: bigASP's encode-vaes.py (cover, int(x * scale + 0.5), random offset); SDXL report, arXiv:2307.01952,
    section 2.2 (crop in pixels of the resized image).
    """
    resized = cover(original, bucket)
    slack = Size(resized.height - bucket.height, resized.width - bucket.width)
    if crop_box is not None:
        top = _around(crop_box.y0, crop_box.y1, resized.height / original.height, bucket.height, slack.height)
        left = _around(crop_box.x0, crop_box.x1, resized.width / original.width, bucket.width, slack.width)
    elif mode == "random":
        rng = seeds.generator(seed, seeds.Purpose.CROP, generation, image_id)
        top, left = rng.randint(0, slack.height), rng.randint(0, slack.width)
    else:
        top, left = slack.height // 2, slack.width // 2
    return Placement(original, resized, top, left, bucket, flip)


def cover(original: Size, bucket: Size) -> Size:
    """The size to which a picture shrinks to just cover its bucket, px.

    Raises:
        DataError: the picture would have to grow.
    """
    if original.height < bucket.height or original.width < bucket.width:
        raise DataError(f"picture of {original} px is smaller than its bucket of {bucket} px: never enlarged")
    scale = max(bucket.height / original.height, bucket.width / original.width)
    return Size(int(original.height * scale + 0.5), int(original.width * scale + 0.5))


def _around(low: float, high: float, scale: float, side: int, slack: int) -> int:
    """Offset of a crop of `side` px that is centred on [low, high) of the source, kept inside the slack."""
    return min(max(round((low + high) / 2 * scale - side / 2), 0), slack)


def apply(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    """Resize (Lanczos), crop and mirror a picture as its placement says.

    Args:
        pixels: (H, W, 3) uint8, upright, of the placement's `original` size.
        placement: Where it goes.

    Returns:
        (bucket height, bucket width, 3) uint8, contiguous.

    Raises:
        DataError: the picture is not of the size that the placement was made for.
    """
    size = Size(*pixels.shape[:2])
    if size != placement.original:
        raise DataError(f"picture is {size} px, its placement was made for {placement.original} px")
    image = Image.fromarray(pixels)
    if placement.resized != size:
        image = image.resize((placement.resized.width, placement.resized.height), Image.Resampling.LANCZOS)
    rows = slice(placement.crop_top, placement.crop_top + placement.bucket.height)
    columns = slice(placement.crop_left, placement.crop_left + placement.bucket.width)
    cropped = np.asarray(image)[rows, columns]  # (bucket height, bucket width, 3)
    return np.ascontiguousarray(cropped[:, ::-1] if placement.flip else cropped)


def map_box(box: Box, placement: Placement) -> Box | None:
    """Where a box of the upright source lies in the bucket-sized picture, px; None when it was cut away."""
    down = placement.resized.height / placement.original.height
    across = placement.resized.width / placement.original.width
    bucket = placement.bucket
    y0, y1 = (min(max(y * down - placement.crop_top, 0.0), bucket.height) for y in (box.y0, box.y1))
    x0, x1 = (min(max(x * across - placement.crop_left, 0.0), bucket.width) for x in (box.x0, box.x1))
    if placement.flip:
        x0, x1 = bucket.width - x1, bucket.width - x0
    return Box(y0, x0, y1, x1) if y1 > y0 and x1 > x0 else None
