"""Images inside of an HTML page, each stored once as a CSS class, so that slider, grid and zoom
share its bytes.

A page has room for so many characters of each kind of image; each image gets an equal share and
gives way first in quality, then in size.
"""

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from training.images.figures import data_uri, fit
from training.sampling.image_files import read_if_there

ROOM = 8_500_000
"""Characters of all images of a page."""
FULL_PX, FULL_ROOM = 512, 3_000_000
"""Longest side of an image of a slider, and characters for all of them."""
SECTION_PX, SECTION_ROOM = 320, 1_000_000
"""The same for those of further sections."""
THUMBNAIL_PX = 320
"""Longest side of those that stand in the grid only; they have the room that the others leave."""
_GOOD, _FAIR = 82, 65
"""Qualities of an image, before and after it gives way."""
_NUM_THREADS = 2
_OVERHEAD = 80
"""Characters of a rule around its image."""

_T = TypeVar("_T")


def encode(image: Image.Image, longest_px: int, max_bytes: int) -> bytes:
    """A WebP of at most `max_bytes`; an image is never enlarged.

    Args:
        image: Any mode.
        longest_px: Longest side at most.
        max_bytes: Some 1,000 at least.
    """
    longest = min(longest_px, max(image.size))
    small = fit(image, longest, longest)
    content = _webp(small, _GOOD)
    if len(content) > max_bytes:
        content = _webp(small, _FAIR)
    while len(content) > max_bytes and longest > 8:
        # Bytes grow with the area; a little less, so that the next attempt is mostly the last.
        shrink = min(math.sqrt(max_bytes / len(content)) * 0.96, 0.9)
        longest = max(int(longest * shrink), 8)
        content = _webp(fit(small, longest, longest), _FAIR)
    return content


def _webp(image: Image.Image, quality: int) -> bytes:
    """A third smaller than a JPEG that looks like it; every browser since 2020 shows it."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def rules_of_files(
    files: Sequence[tuple[str, Path]], longest_px: int, room: int
) -> tuple[str, list[str]]:
    """CSS rules that give each class its image, and the classes whose image is missing or
    damaged.

    Args:
        files: Class and image file.
        longest_px: Longest side of each at most.
        room: Characters of all rules together at most.
    """
    max_bytes = _share(len(files), room)
    lost: list[str] = []

    def rule(item: tuple[str, Path]) -> str:
        name, path = item
        picture = read_if_there(path.parent, path.name)
        if picture is None:
            lost.append(name)
            return ""
        return _rule(name, encode(Image.fromarray(picture), longest_px, max_bytes))

    return _joined(rule, files), lost


def rules_of_arrays(pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    """CSS rules for the images of further sections.

    Args:
        images: Class and `(H, W, 3)` uint8.
    """
    max_bytes = _share(len(pictures), SECTION_ROOM)
    return _joined(
        lambda item: _rule(item[0], encode(Image.fromarray(item[1]), SECTION_PX, max_bytes)),
        pictures,
    )


def _share(count: int, room: int) -> int:
    """Bytes of each of `count` images: base64 makes four characters of three."""
    return (room // max(count, 1) - _OVERHEAD) * 3 // 4


def _rule(name: str, content: bytes) -> str:
    return f".{name}{{background-image:url({data_uri(content, 'image/webp')})}}"


def _joined(rule: Callable[[_T], str], items: Sequence[_T]) -> str:
    # Pillow lets go of the interpreter while it decodes and scales.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return "".join(pool.map(rule, items))
