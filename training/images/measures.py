"""What `raw_images` holds of a decoded image: its size, digest, perceptual hashes and measures.

Workers import this module too: it imports neither polars nor torch.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.images.decoding import Decoded

LUMA_SIDE = 256
"""Longest side of the luman image that brightness, contrast and sharpness are measured on, px."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Columns of `raw_images` that follow from the bytes; see there for meaning and units."""

    image_id: str
    height: int
    width: int
    stored_height: int
    stored_width: int
    orientation: int
    format: str
    mode: str
    bytes: int
    dpi: float | None
    pixel_digest: str
    phash: int
    phash_mirrored: int
    brightness: float
    contrast: float
    sharpness: float


def measure(data: bytes, image_id: str, decoded: Decoded) -> Facts:
    """Everything that `raw_images` holds of one file.

    All measures are made in integers, so that equal images give equal facts on every machine.
    Brightness and contrast are mean and standard deviation of luma (0-1), sharpness is the variance
    of its 4-neighbour Laplacian in 8-bit steps, all at `LUMA_SIDE`; smaller images are not
    enlarged.
    """
    pixels = decoded.pixels
    height, width = pixels.shape[:2]
    luma = Image.fromarray(pixels).convert("L")
    small = _shrink(luma, LUMA_SIDE)
    brightness, variance = _moments(small)
    frequencies = _frequencies(luma)
    digest = hashlib.sha256(height.to_bytes(4, "big") + width.to_bytes(4, "big"))
    digest.update(pixels.data)
    return Facts(
        image_id=image_id,
        height=height,
        width=width,
        stored_height=decoded.stored.height,
        stored_width=decoded.stored.width,
        orientation=decoded.orientation,
        format=decoded.format,
        mode=decoded.mode,
        bytes=len(data),
        dpi=decoded.dpi,
        pixel_digest=digest.hexdigest(),
        phash=_hash(frequencies),
        phash_mirrored=_hash(frequencies * (-1) ** np.arange(8)),
        brightness=brightness / 255,
        contrast=math.sqrt(variance) / 255,
        sharpness=_sharpness(small),
    )


def _shrink(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX)


def _moments(values: Image.Image | np.ndarray) -> tuple[float, float]:
    """Mean and variance of whole numbers, summed exactly."""
    numbers = np.asarray(values).astype(np.int64)
    count, total, squares = numbers.size, int(numbers.sum()), int((numbers * numbers).sum())
    return total / count, (count * squares - total * total) / (count * count)


def _sharpness(luma: Image.Image) -> float:
    grey = np.asarray(luma).astype(np.int64)  # (h, w)
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return _moments(laplacian)[1]


_COSINES = np.array(
    [
        [round(math.cos((2 * n + 1) * k * math.pi / 64) * 2**14) for n in range(32)]
        for k in range(8)
    ],
    dtype=np.int64,
)


def _frequencies(luma: Image.Image) -> np.ndarray:
    """The lowest 8 x 8 coefficients of the unscaled DCT-II of luma at 32 x 32, as whole numbers."""
    grey = np.asarray(luma.resize((32, 32), Image.Resampling.LANCZOS)).astype(np.int64)
    return _COSINES @ grey @ _COSINES.T  # (8, 8)


def _hash(frequencies: np.ndarray) -> int:
    """64 bits, row by row from the highest: coefficients above their median. The usual pHash
    definition."""
    flat = frequencies.ravel()
    middle = np.sort(flat)[31:33].sum()  # Twice the median.
    return int("".join("1" if twice > middle else "0" for twice in flat * 2), 2)
