"""From an image to its bucket: where the crop or the padding lies, its pixels, and where a box of
the source ends up.

The same placement makes the pixels, the conditioning and the mask, so that the three cannot
disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from training import seeds
from training.buckets.geometry import Box, Placement, Size
from training.errors import DataError

PADDING_LEVEL = 128
"""Of the padding: grey, because models learn white borders soonest."""
_KEPT_SHARE = 0.98
"""Of the importance that the best crop keeps: what any crop must keep to be drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropPolicy:
    """How the part of an image that goes into its bucket is chosen."""

    mode: Literal["random", "centre", "subject"]
    """`random` draws the offset from (generation, image_id); `centre` halves the overhang, rounded
    down; `subject` draws as `random` does, among the offsets that keep 98 % of the importance that
    the best keeps."""
    seed: int
    """Keys the draw."""
    generation: int
    """Encoding pass: each pass crops anew."""
    flip: bool = False
    """Mirror left to right after the crop."""
    upscale: bool = False
    """The image may grow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CropTarget:
    """What one image asks of its crop."""

    crop_box: Box | None = None
    """Part of the source that matters, upright source px. It wins over `mode` and `avoid`: the crop
    lies as near to the box's centre as the image's borders allow."""
    avoid: Sequence[Box] = ()
    """Boxes of upright source px of which as little as possible may lie in the crop."""
    importance: np.ndarray | None = None
    """`(h, w)` over the upright source, for `subject`."""
    padded: bool = False
    """Fit the whole image into the bucket, in its middle, instead of cropping."""
    resized: Size | None = None
    """What it is resized to, at least its bucket's size; None for the smallest size that covers the
    bucket."""


def place(
    original: Size,
    bucket: Size,
    image_id: str,
    policy: CropPolicy,
    target: CropTarget = CropTarget(),
) -> Placement:
    """Resize an image until it just covers its bucket, and choose which part of the overhang to
    cut; or pad it.

    The resized image equals the bucket along one side, so the crop moves along the other, unless
    `target.resized` says what it is resized to: then it may overhang along both, which are chosen one
    after the other.

    Args:
        original: Upright source size, px.
        bucket: Target size, px.
        image_id: SHA-256 of the source, which keys the draw.
        policy: What holds for all images of a pass.
        target: What holds for this one.

    Returns:
        A placement that covers the bucket, none of its sides shorter; or, padded, one that lies
        within it with none longer.

    Raises:
        DataError: the image would have to grow, or `subject` has no importance to go by.

    Source: bigASP's encode-vaes.py (cover, int(x * scale + 0.5), random offset); SDXL report,
    arXiv:2307.01952, section 2.2 (crop in pixels of the resized image).
    """
    if (
        policy.mode == "subject"
        and target.crop_box is None
        and target.importance is None
        and not target.padded
    ):
        raise DataError(f"image {image_id}: crop mode 'subject' needs the image's importance map")
    if target.padded:
        resized = contain(original, bucket, upscale=policy.upscale)
        top, left = (bucket.height - resized.height) // 2, (bucket.width - resized.width) // 2
        return Placement(original, resized, 0, 0, bucket, policy.flip, pad_top=top, pad_left=left)
    resized = target.resized or cover(original, bucket, upscale=policy.upscale)
    rng = seeds.generator(policy.seed, seeds.Purpose.CROP, policy.generation, image_id)
    offsets = [0, 0]
    for axis in (0, 1):
        slack, side, scale = (
            resized[axis] - bucket[axis],
            bucket[axis],
            resized[axis] / original[axis],
        )
        if slack == 0:
            continue
        if target.crop_box is not None:
            centre = (target.crop_box[axis] + target.crop_box[axis + 2]) / 2 * scale
            offsets[axis] = min(max(round(centre - side / 2), 0), slack)
            continue
        allowed = np.arange(slack + 1)
        if policy.mode == "subject":
            assert target.importance is not None
            kept = _kept(target.importance.sum(axis=1 - axis), resized[axis], side, allowed)
            allowed = allowed[kept >= _KEPT_SHARE * kept.max()]
        if target.avoid:
            inside = _overlap(target.avoid, axis, scale, side, allowed)
            allowed = allowed[inside <= inside.min() + 1e-6]
        if policy.mode == "centre":
            offsets[axis] = int(allowed[np.argmin(np.abs(allowed - slack // 2))])
        else:
            offsets[axis] = int(allowed[rng.randrange(len(allowed))])
    return Placement(original, resized, offsets[0], offsets[1], bucket, policy.flip)


def cover(original: Size, bucket: Size, *, upscale: bool = False) -> Size:
    """The size that an image is resized to so that it just covers its bucket, px.

    Raises:
        DataError: the image would have to grow, and may not.
    """
    scale = max(bucket.height / original.height, bucket.width / original.width)
    if scale > 1 and not upscale:
        raise DataError(
            f"image of {original} px is smaller than its bucket of {bucket} px: it would have to grow"
        )
    return Size(int(original.height * scale + 0.5), int(original.width * scale + 0.5))


def contain(original: Size, bucket: Size, *, upscale: bool = False) -> Size:
    """The largest size of an image that fits into its bucket, px; one that may not grow stays as
    small as it is."""
    scale = min(bucket.height / original.height, bucket.width / original.width)
    if not upscale:
        scale = min(scale, 1.0)
    return Size(
        max(int(original.height * scale + 0.5), 1), max(int(original.width * scale + 0.5), 1)
    )


def _kept(profile: np.ndarray, length: int, side: int, offsets: np.ndarray) -> np.ndarray:
    """What crops of `side` at `offsets` keep of a profile over `length` px."""
    total = np.concatenate([[0.0], np.cumsum(profile, dtype=np.float64)])
    borders = np.linspace(0, length, len(total))
    return np.interp(offsets + side, borders, total) - np.interp(offsets, borders, total)


def _overlap(
    boxes: Sequence[Box], axis: int, scale: float, side: int, offsets: np.ndarray
) -> np.ndarray:
    """Area of the boxes inside crops of `side` at `offsets`; the crop spans the other axis
    wholly."""
    area = np.zeros(len(offsets))
    for box in boxes:
        low, high, across = box[axis] * scale, box[axis + 2] * scale, box[3 - axis] - box[1 - axis]
        area += (np.minimum(high, offsets + side) - np.maximum(low, offsets)).clip(0) * across
    return area


def apply(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    """Resize (Lanczos), crop or pad, and mirror an image as its placement says.

    Args:
        pixels: (H, W, 3) uint8, upright, of the placement's `original` size.
        placement: Where it goes.

    Returns:
        (bucket height, bucket width, 3) uint8, contiguous.

    Raises:
        DataError: the image is not of the size that the placement was made for.
    """
    size = Size(*pixels.shape[:2])
    if size != placement.original:
        raise DataError(f"image is {size} px, its placement was made for {placement.original} px")
    image = Image.fromarray(pixels)
    if placement.resized != size:
        image = image.resize(
            (placement.resized.width, placement.resized.height), Image.Resampling.LANCZOS
        )
    rows = slice(placement.crop_top, placement.crop_top + placement.bucket.height)
    columns = slice(placement.crop_left, placement.crop_left + placement.bucket.width)
    cropped = np.asarray(image)[rows, columns]
    if placement.padded:
        canvas = np.full((*placement.bucket, 3), PADDING_LEVEL, dtype=np.uint8)
        height, width = cropped.shape[:2]
        canvas[
            placement.pad_top : placement.pad_top + height,
            placement.pad_left : placement.pad_left + width,
        ] = cropped
        cropped = canvas  # (bucket height, bucket width, 3)
    return np.ascontiguousarray(cropped[:, ::-1] if placement.flip else cropped)


def told_crop(placement: Placement, rules_version: int) -> tuple[int, int]:
    """Rows and columns that a model is told were cut off above and on the left of an image, px of
    the resized image.

    Rules of version 1 told of a mirrored image what had been cut off on its right.
    """
    return placement.seen_crop if rules_version > 1 else (placement.crop_top, placement.crop_left)


def map_box(box: Box, placement: Placement) -> Box | None:
    """Where a box of the upright source lies in the bucket-sized image, px; None when it was cut
    away."""
    down = placement.resized.height / placement.original.height
    across = placement.resized.width / placement.original.width
    bucket = placement.bucket
    top, left = placement.pad_top - placement.crop_top, placement.pad_left - placement.crop_left
    y0, y1 = (min(max(y * down + top, 0.0), bucket.height) for y in (box.y0, box.y1))
    x0, x1 = (min(max(x * across + left, 0.0), bucket.width) for x in (box.x0, box.x1))
    if placement.flip:
        x0, x1 = bucket.width - x1, bucket.width - x0
    return Box(y0, x0, y1, x1) if y1 > y0 and x1 > x0 else None
