"""Latents in the files of other trainers: kohya's `.npz` and bigASP's gzip, each with the placement
it was made by."""

import gzip
import re
import struct
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.buckets.geometry import Placement, Size
from training.errors import DataError

_KOHYA_NAME = re.compile(r"(.+?)(?:_\d{4,}x\d{4,}(?:_sdxl|_sd))?\.npz")
_BIGASP_V1, _BIGASP_V2 = struct.Struct("<7I"), struct.Struct("<6I")
_MAX_BYTES = 64_000_000
"""Largest content of one file that is read: a hundred times what a 1024 x 1024 image needs."""


class Refusal(StrEnum):
    """Why a file of another trainer cannot be used for an image."""

    NO_FILE = "no_file"
    UNREADABLE = "unreadable"
    NOT_FINITE = "not_finite"
    OTHER_SIZE = "other_original_size"
    OTHER_BUCKET = "other_bucket"
    OTHER_CROP = "crop_outside_of_the_picture"
    MIRRORED_OR_PADDED = "to_be_mirrored_or_padded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """One image's latents as another trainer kept them."""

    latents: np.ndarray
    """`(C, H/8, W/8)` fp32, scaled."""
    original: Size
    """Upright source size, px, by the file."""
    crop_top: int | None
    """Rows cut off above, px of the resized image; None where the format's own numbers cannot be
    trusted."""
    crop_left: int | None
    """Columns cut off on the left."""


def kohya_stem(name: str) -> str | None:
    """What kohya's file name says of its image: the path without suffix, of
    `a/b_0832x1216_sdxl.npz` it is `a/b`."""
    match = _KOHYA_NAME.fullmatch(name)
    return match[1] if match else None


def read_kohya(path: Path, scaling_factor: float) -> Foreign:
    """Read a `.npz` of sd-scripts for SD or SDXL.

    It holds `latents`, a draw of the posterior before scaling, `original_size` as width and height,
    and `crop_ltrb`, which is of the original image and wrong whenever something was cut
    (sd-scripts issue 1443): the crop was centred.

    Raises:
        DataError: it is no such file.

    Source: kohya-ss/sd-scripts, library/strategy_base.py and train_util.py
    (trim_and_resize_if_required).
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, more than the {_MAX_BYTES} of any latents"
            )
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            latents = np.asarray(archive["latents"], dtype=np.float32)
            width, height = (int(side) for side in archive["original_size"].tolist())
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no latents file of sd-scripts ({error})") from None
    if latents.ndim != 3:
        raise DataError(
            f"{path} has latents of shape {latents.shape}, must be (channels, height, width)"
        )
    return Foreign(
        latents=latents * np.float32(scaling_factor),
        original=Size(height, width),
        crop_top=None,
        crop_left=None,
    )


def write_kohya(
    file: BinaryIO, latents: np.ndarray, placement: Placement, scaling_factor: float
) -> None:
    """Write what sd-scripts caches for an image.

    Args:
        file: Open for writing.
        latents: `(C, H/8, W/8)` fp32, scaled.
        placement: Its own; sizes are written width first, as the format has them, and the crop in
            pixels of the resized image, as training means it: of a mirrored one as it is seen.
        scaling_factor: Taken out again.
    """
    top, left = placement.seen_crop
    np.savez(
        file,
        latents=(latents / np.float32(scaling_factor)).astype(np.float32),
        original_size=np.array([placement.original.width, placement.original.height]),
        crop_ltrb=np.array(
            [left, top, left + placement.bucket.width, top + placement.bucket.height]
        ),
    )


def kohya_name(stem: str, original: Size, *, sdxl: bool) -> str:
    """The name under which sd-scripts looks for the latents of the image `stem`."""
    return f"{stem}_{original.width:04d}x{original.height:04d}_{'sdxl' if sdxl else 'sd'}.npz"


def read_bigasp(path: Path, original: Size) -> Foreign:
    """Read a `.bin.gz` of bigASP's encode-vaes.py, version 1 (with an index in front) or 2.

    Its header calls the height of the image its width and the row of the crop its x. Where only
    the exchanged order fits the image, the file was written by a tool that had mended that.

    Args:
        path: The file.
        original: The image's size, which decides which order the file has.

    Raises:
        DataError: it is no such file.

    Source: fpgaminer/bigasp-training, encode-vaes.py and data.py.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_BYTES)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no gzip file ({error})") from None
    for header in (_BIGASP_V1, _BIGASP_V2):
        if len(content) < header.size:
            continue
        *_, first, second, down, across, rows, columns = header.unpack_from(content)
        body = content[header.size :]
        channels, rest = divmod(len(body), max(2 * rows * columns, 1))
        if rows and columns and channels == 4 and not rest:
            latents = np.frombuffer(body, dtype="<f2").reshape(4, rows, columns).astype(np.float32)
            if (first, second) != original and (second, first) == original:
                first, second, down, across = second, first, across, down
            return Foreign(
                latents=latents, original=Size(first, second), crop_top=down, crop_left=across
            )
    raise DataError(
        f"{path} has {len(content)} bytes, which are no header and latents of four channels of bigASP's"
    )


def fit(foreign: Foreign, wanted: Placement, scale: int) -> Placement | Refusal:
    """The placement that a file was made by, if it is one of the encoding's own.

    Args:
        foreign: What was read.
        wanted: Original size, bucket and resized size of the image in the encoding, with its
            centred crop.
        scale: Pixels per latent along a side.
    """
    if wanted.flip or wanted.padded:
        return Refusal.MIRRORED_OR_PADDED
    if foreign.original != wanted.original:
        return Refusal.OTHER_SIZE
    if tuple(side * scale for side in foreign.latents.shape[1:]) != tuple(wanted.bucket):
        return Refusal.OTHER_BUCKET
    if not np.isfinite(foreign.latents).all():
        return Refusal.NOT_FINITE
    if foreign.crop_top is None or foreign.crop_left is None:
        return wanted
    slack = Size(
        wanted.resized.height - wanted.bucket.height, wanted.resized.width - wanted.bucket.width
    )
    if foreign.crop_top > slack.height or foreign.crop_left > slack.width:
        return Refusal.OTHER_CROP
    return wanted._replace(crop_top=foreign.crop_top, crop_left=foreign.crop_left)
