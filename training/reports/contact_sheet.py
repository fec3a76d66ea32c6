"""The grid that is looked at first: a row per prompt, a column per checkpoint, equal seeds, as one
JPEG.

Free of torch, because assets call it while they report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from training.images.figures import INK, MUTED, PAPER, fit, jpeg, write

MAX_BYTES = 2_000_000
"""Size of the JPEG, at most; its quality and then its size give way."""
_MARGIN_PX, _GAP_PX, _HEADER_PX, _CAPTION_PX, _SIDE_PX = 16, 8, 26, 16, 190
_CELL_PAPER, _LINE = "#f3f4f6", "#e5e7eb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of the grid."""

    title: str
    """Its id."""
    text: str
    """What is asked for; wrapped beside the images."""
    images: Sequence[np.ndarray | None]
    """`(H, W, 3)` uint8 per checkpoint; None where there is none."""
    captions: Sequence[str] = ()
    """A line under each image, such as its scores."""


def grid(rows: Sequence[Row], checkpoints: Sequence[str], *, cell_px: int = 192) -> bytes:
    """Draw the grid.

    Args:
        rows: One per prompt, each with an image per checkpoint.
        checkpoints: Heads of the columns.
        cell_px: Side of the square that an image is fitted into.

    Returns:
        A JPEG of at most 2,000,000 bytes.
    """
    assert rows, "a grid has a row"
    assert all(len(row.images) == len(checkpoints) for row in rows), "one image per checkpoint"
    caption_px = _CAPTION_PX if any(row.captions for row in rows) else 0
    step = cell_px + _GAP_PX
    width = _MARGIN_PX + _SIDE_PX + len(checkpoints) * step + _MARGIN_PX
    sheet = Image.new(
        "RGB",
        (width, _MARGIN_PX + _HEADER_PX + len(rows) * (step + caption_px) + _MARGIN_PX),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(checkpoints):
        left = _MARGIN_PX + _SIDE_PX + column * step
        write(draw, _MARGIN_PX, left, name, width=cell_px, size=14)
    for number, row in enumerate(rows):
        top = _MARGIN_PX + _HEADER_PX + number * (step + caption_px)
        draw.line(
            [(_MARGIN_PX, top - _GAP_PX // 2), (width - _MARGIN_PX, top - _GAP_PX // 2)], fill=_LINE
        )
        _draw_row(sheet, draw, row, top, cell_px)
    return _compress(sheet)


def _draw_row(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, top: int, cell_px: int
) -> None:
    write(draw, top + 2, _MARGIN_PX, row.title, width=_SIDE_PX - 14, size=12)
    for number, line in enumerate(_wrap(row.text, 28)[: max((cell_px - 22) // 15, 1)]):
        write(
            draw,
            top + 20 + number * 15,
            _MARGIN_PX,
            line,
            width=_SIDE_PX - 14,
            size=11,
            colour=MUTED,
        )
    for column, image in enumerate(row.images):
        left = _MARGIN_PX + _SIDE_PX + column * (cell_px + _GAP_PX)
        draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), fill=_CELL_PAPER)
        if image is None:
            write(
                draw,
                top + cell_px // 2 - 6,
                left + 8,
                "no image",
                width=cell_px - 16,
                size=11,
                colour=MUTED,
            )
        else:
            small = fit(image, cell_px, cell_px)
            sheet.paste(
                small, (left + (cell_px - small.width) // 2, top + (cell_px - small.height) // 2)
            )
        if column < len(row.captions):
            write(
                draw,
                top + cell_px + 1,
                left,
                row.captions[column],
                width=cell_px,
                size=11,
                colour=INK,
            )


def _wrap(text: str, columns: int) -> list[str]:
    """Words in lines of at most `columns` characters; a longer word is cut by whoever draws it."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _compress(sheet: Image.Image) -> bytes:
    while True:
        for quality in (90, 80, 70, 60):
            content = jpeg(sheet, quality)
            if len(content) <= MAX_BYTES:
                return content
        sheet = sheet.resize(
            (sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS
        )
