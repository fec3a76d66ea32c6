"""Images that tests of decoding draw themselves, and how files of them are made."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 180, 60), (50, 60, 220), (120, 120, 120)
SAVED = {
    "JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {},
    "TIFF": {"compression": "tiff_lzw"}, "AVIF": {},
}  # fmt: skip
"""Formats that are taken, with options of `encode`."""


def quadrants(height=48, width=64):
    """Four colours, so that every one of the eight orientations looks different. (H, W, 3)."""
    pixels = np.empty((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    pixels[:h, :w], pixels[:h, w:], pixels[h:, :w], pixels[h:, w:] = RED, GREEN, BLUE, GREY
    return pixels


def encode(image, fmt, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def textured(height=96, width=128, seed=0):
    """Smooth structure of several scales; neighbours of it hash differently. (H, W, 3)."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 8, width // 8, 3), dtype=np.uint8
    )
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


# What turns the stored image upright, so its inverse stores it turned. TIFF 6.0, tag 274.
STORED_AS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def png(height, width, depth, colour, rows, extra=b""):
    """A PNG by hand: Pillow cannot write all that it reads. `rows`: bytes of each row without
    filter byte."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )
