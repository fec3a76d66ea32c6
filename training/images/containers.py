"""What a file's own container says of its wholeness, for the formats whose decoders do not look:
PNG and GIF.

Pillow skips the checksums of a PNG's pixels and takes a GIF whose end is missing. The other formats
have no checksum, and their decoders find an early end themselves.
"""

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_GIF = (b"GIF87a", b"GIF89a")


class Damaged(Exception):  # noqa: N818 - it describes the file; nothing went wrong here.
    """A container that is not whole."""

    def __init__(self, detail: str, *, early_end: bool) -> None:
        """`detail` is one line; `early_end` tells a missing end from wrong content."""
        self.early_end = early_end
        super().__init__(detail)


def check(data: bytes) -> None:
    """Check the lengths and checksums of a PNG and the blocks of a GIF; other formats pass. Decodes
    no pixel.

    Raises:
        Damaged: the file ends early, or a checksum or a block is wrong.
    """
    if data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(_GIF):
        _check_gif(data)


def _check_png(data: bytes) -> None:
    """Every chunk up to IEND against its CRC-32. Bytes after IEND are no part of the image."""
    view, at = memoryview(data), len(_PNG)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if not (name.isalpha() and name.isascii()):
            raise Damaged(f"PNG: {name!r} at byte {at} is no chunk name", early_end=False)
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Damaged(
                f"PNG: chunk {name.decode()} at byte {at} has a wrong checksum", early_end=False
            )
        if name == b"IEND":
            return
        at = end
    raise Damaged("PNG: the file ends before its IEND chunk", early_end=True)


def _check_gif(data: bytes) -> None:
    """Every block up to the trailer. Bytes after it are no part of the image. Source: GIF89a
    specification."""
    try:
        at = 13 + _colours_bytes(data[10])
        while (kind := data[at]) != 0x3B:
            if kind == 0x2C:  # An image: descriptor, colours, code size, blocks of data.
                at = _skip_blocks(data, at + 11 + _colours_bytes(data[at + 9]))
            elif kind == 0x21:  # An extension: label, blocks of data.
                at = _skip_blocks(data, at + 2)
            else:
                raise Damaged(
                    f"GIF: byte {at} is {kind:#04x}, which begins no block", early_end=False
                )
    except IndexError:
        raise Damaged("GIF: the file ends before its trailer", early_end=True) from None


def _colours_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    while size := data[at]:
        at += 1 + size
    return at + 1
