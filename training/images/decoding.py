"""The one place where bytes become pixels: what may be an image, and how it is read.

Every image leaves as upright 8-bit sRGB. `decode_pool` calls this in killable workers, so this
module starts fast: it imports neither polars nor torch, and reasons are the plain words of
`tables.Reason`.
"""

import errno
import math
import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from training.buckets.geometry import Size
from training.images import containers

if TYPE_CHECKING:
    from training.config.workspace import DecodeConfig

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
"""Formats that are read, in the order in which they are tried. A JPEG of several images comes out
as MPO."""

_KNOWN = (  # Magic numbers: offset, bytes, name. Only to say what a file is; nothing is decoded by them.
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "video"),
    (0, b"\0\0\0\x0cJXL ", "JXL"),
    (0, b"\xff\x0a", "JXL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "EPS"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"<svg", "SVG"),
    (0, b"\x1aE\xdf\xa3", "video"),
)
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_METADATA_WARNINGS = "Metadata Warning|Possibly corrupt EXIF|Truncated File Read"
"""What Pillow says of a TIFF's tags while it loads one; they say nothing of the pixels."""
_DEEP_MODES = ("I", "F")
"""Pillow's modes of more than 16 bits or of fractions: nothing says which of their values is
white."""
_PIXEL_BYTES = 7
"""Least memory per pixel while an image is decoded, bytes: four as Pillow holds RGB, three as it
leaves."""
_PROFILE_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 274
_PHOTOMETRIC_TAG = 262
_ZERO_IS_WHITE = 0
_X_RESOLUTION_TAG = 282


class Unusable(Exception):  # noqa: N818 - it describes the file; nothing went wrong here.
    """A file that cannot become an image."""

    def __init__(
        self, reason: str, *, value: object = None, limit: object = None, detail: object = None
    ) -> None:
        """`reason` is a value of `tables.Reason`; `detail` becomes one line."""
        self.reason = reason
        self.value = None if value is None else one_line(value)
        self.limit = None if limit is None else str(limit)
        self.detail = None if detail is None else one_line(detail)
        super().__init__(f"{reason}: {self.value} (limit {self.limit}) {self.detail or ''}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """An image and what its file said of it."""

    pixels: np.ndarray
    """(H, W, 3) uint8, upright sRGB, blended on white, contiguous."""
    format: str
    mode: str
    """Pillow mode as stored."""
    stored: Size
    """Before EXIF rotation."""
    orientation: int
    """EXIF 1-8; 1 when absent or invalid."""
    dpi: float | None
    """What the file says; None when it says nothing."""


def out_of_memory(config: "DecodeConfig", needed_bytes: int | None = None) -> Unusable:
    """What to say of an image that a worker's memory does not hold."""
    needed = "more" if needed_bytes is None else f"at least {needed_bytes} bytes"
    return Unusable("out_of_memory", value=needed, limit=f"{config.memory_bytes} bytes")


def one_line(words: object) -> str:
    """Foreign words as one printable line of at most 200 characters."""
    text = " ".join(str(words).split())[:200]
    return "".join(character if character.isprintable() else "?" for character in text)


def check_length(num_bytes: int, config: "DecodeConfig") -> None:
    """Refuse content that is empty or too large, before it is read or handed on.

    Raises:
        Unusable: `empty_file` or `too_many_bytes`.
    """
    if num_bytes == 0:
        raise Unusable("empty_file", value=0)
    if num_bytes > config.max_bytes:
        raise Unusable("too_many_bytes", value=num_bytes, limit=config.max_bytes)


def read_file(path: Path, config: "DecodeConfig") -> bytes:
    """The bytes of a regular file; a link is not followed.

    Raises:
        Unusable: gone, a link, no regular file, not readable, empty, too large, or changed while it
            was read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise Unusable(
                    "not_a_file", value=stat.filemode(before.st_mode)[0], limit="regular file"
                )
            check_length(before.st_size, config)
            data = file.read(before.st_size + 1) or b""
            while len(data) < before.st_size and (
                more := file.read(before.st_size + 1 - len(data))
            ):
                data += more
            after = os.fstat(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP:
            detail = f"leads to {os.readlink(path)}" if path.is_symlink() else error.strerror
            raise Unusable(
                "link_not_followed", value="link", limit="inside the source", detail=detail
            ) from None
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        no_file = error.errno in (errno.ENXIO, errno.EISDIR)
        reason = "gone" if missing else "not_a_file" if no_file else "unreadable"
        raise Unusable(reason, detail=error.strerror) from None
    if len(data) != before.st_size or (after.st_size, after.st_mtime_ns) != (
        before.st_size,
        before.st_mtime_ns,
    ):
        raise Unusable("changed_while_read", value=after.st_size, limit=before.st_size)
    return data


def decode(data: bytes, config: "DecodeConfig") -> Decoded:
    """Turn a file's bytes into upright 8-bit sRGB.

    Size, mode and number of frames are checked in the header, before any pixel is decoded. There is
    one full decode, and metadata is read after it; where it fails, warns or stops early, the file
    is refused. What no checksum or decoder can notice is listed in `docs/images.md`. 16-bit grey is
    scaled, not clipped; transparency is blended on white; a colour profile that is not sRGB is
    converted (perceptual intent), a broken one ignored; of a multi-image JPEG or a TIFF the first
    image is taken. Sets Pillow's own pixel limit for this process.

    Raises:
        Unusable: whatever is wrong, with a reason out of the closed list.
    """
    check_length(len(data), config)
    Image.MAX_IMAGE_PIXELS = config.max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return _decode(image, data, config)
        except Unusable:
            raise
        except Image.DecompressionBombError as error:
            raise Unusable("too_many_pixels", limit=config.max_pixels, detail=error) from None
        except MemoryError:
            raise out_of_memory(config) from None
        except UnidentifiedImageError:
            raise _unidentified(data) from None
        except Exception as error:  # Hostile bytes make Pillow raise nearly anything.
            reason = (
                "truncated"
                if "truncated" in str(error).lower() or _ends_early(data)
                else "decode_failed"
            )
            raise Unusable(reason, detail=f"{type(error).__name__}: {error}") from None


def _decode(image: Image.Image, data: bytes, config: "DecodeConfig") -> Decoded:
    size = Size(image.height, image.width)
    form, mode = image.format or "", image.mode
    _check_header(size, mode, config)
    if form not in ("MPO", "TIFF") and getattr(image, "is_animated", False):
        raise Unusable("animated", value=form, limit="1 frame", detail="more than one frame")
    try:
        containers.check(data)
    except containers.Damaged as damaged:
        raise _damaged(damaged, form) from None
    tags = dict(
        getattr(image, "tag_v2", {})
    )  # Pillow turns a TIFF while it loads, and forgets how it was turned.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", _METADATA_WARNINGS)
        image.load()
    dpi = _dpi(image)
    left = _orientation(image)  # What remains to be done: a TIFF is upright by now.
    orientation = _valid_orientation(tags.get(_ORIENTATION_TAG, left))
    turned_by_pillow = left != orientation
    upright = _to_rgb(image, zero_is_white=tags.get(_PHOTOMETRIC_TAG) == _ZERO_IS_WHITE)
    if left in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[left])
    pixels = np.ascontiguousarray(upright)
    stored = Size(size.width, size.height) if turned_by_pillow and orientation >= 5 else size
    return Decoded(
        pixels=pixels, format=form, mode=mode, stored=stored, orientation=orientation, dpi=dpi
    )


def _check_header(size: Size, mode: str, config: "DecodeConfig") -> None:
    """Refuse by the header what cannot be used, before any pixel is decoded."""
    if size.area > config.max_pixels:
        raise Unusable("too_many_pixels", value=size.area, limit=config.max_pixels)
    if min(size) < config.min_side_px:
        raise Unusable("too_small", value=min(size), limit=config.min_side_px)
    if mode in _DEEP_MODES:
        raise Unusable("mode_not_allowed", value=mode, limit="8 or 16 bits per channel")
    if (needed := _PIXEL_BYTES * size.area) > config.memory_bytes:
        raise out_of_memory(config, needed)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 of a loaded image; an EXIF block that cannot be read costs the rotation
    only."""
    try:
        return _valid_orientation(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # The pixels are whole: they were decoded before.
        return 1


def _valid_orientation(value: Any) -> int:
    """1-8; anything else is 1."""
    return int(value) if value in range(1, 9) else 1


def _dpi(image: Image.Image) -> float | None:
    """Horizontal dots per inch, where the file holds them: Pillow makes up 72 for some JPEGs and 1
    for a TIFF."""
    try:
        by_tag = image.format in ("JPEG", "MPO", "TIFF") and image.info.get("jfif_unit") not in (
            1,
            2,
        )
        if by_tag and _X_RESOLUTION_TAG not in image.getexif():
            return None
        dpi = float(image.info["dpi"][0])
    except Exception:
        return None
    return round(dpi, 3) if math.isfinite(dpi) and dpi > 0 else None


def _to_rgb(image: Image.Image, *, zero_is_white: bool) -> Image.Image:
    """Any mode as RGB: sRGB colours, blended on white.

    Args:
        image: Loaded.
        zero_is_white: The TIFF says that 0 means white. Pillow turns 8 bits by itself, and leaves
            16 as they are.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)  # (H, W)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        image = Image.fromarray(255 - grey if zero_is_white else grey)
    alpha = None
    if image.has_transparency_data:
        # Pillow un-premultiplies on the way to straight alpha; La has no direct one to RGBA.
        straight = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha, image = straight.getchannel("A"), straight.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is None:
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Apply an embedded profile that fits the image's mode; without a usable one, convert
    plainly."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            known = "srgb" in (source.profile.profile_description or "").lower()
            if _PROFILE_SPACES.get(space) == image.mode and not (known and image.mode == "RGB"):
                converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
                assert converted is not None
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # Broken profiles are common and say nothing about the pixels.
    return image if image.mode == "RGB" else image.convert("RGB")


def _unidentified(data: bytes) -> Unusable:
    """Why Pillow recognised nothing: a format that is not allowed, a broken header, or no image at
    all."""
    head = data.lstrip()[:512]
    if head.startswith(b"<") and b"<svg" in head:
        return Unusable("format_not_allowed", value="SVG", limit=" ".join(FORMATS))
    name = next((name for offset, magic, name in _KNOWN if data[offset:].startswith(magic)), None)
    if name is None:
        return Unusable("not_an_image", value=f"starts with {data[:12]!r}")
    if name not in FORMATS:
        return Unusable("format_not_allowed", value=name, limit=" ".join(FORMATS))
    try:
        containers.check(data)
    except containers.Damaged as damaged:
        return _damaged(damaged, name)
    reason = "truncated" if _ends_early(data) else "decode_failed"
    return Unusable(reason, value=name, detail=f"starts like {name}, but its header cannot be read")


def _damaged(damaged: containers.Damaged, form: str) -> Unusable:
    return Unusable(
        "truncated" if damaged.early_end else "decode_failed", value=form, detail=damaged
    )


def _ends_early(data: bytes) -> bool:
    """Whether a file that could not be decoded lacks its own format's end."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") > len(data)
    if data[4:8] == b"ftyp":
        position = 0
        while position + 8 <= len(data):
            length = int.from_bytes(data[position : position + 4], "big")
            if (
                length < 8
            ):  # 0: to the end of the file; 1: a 64-bit length, which no image here needs.
                return False
            position += length
        return position != len(data)
    return False
