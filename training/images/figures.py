"""Small images as Markdown for Dagster's metadata: charts that show inline, contact sheets behind
one click.

Dagster shows Markdown inline only below 1,000 characters (measured), and keeps metadata twice in
its event log: charts are bare SVG paths, sheets are JPEGs of at most 32 KB. Free of torch, because
assets call it while they report.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.buckets.geometry import Box, Placement

MAX_INLINE = 1_000
"""Characters from which Dagster hides Markdown behind a link."""
MAX_SHEET = 32_000
"""Characters of a contact sheet's Markdown."""
INK, PAPER, MUTED = "#1f2430", "#ffffff", "#6b7280"
_FILL = "#4f43dd"
_WIDTH, _HEIGHT = 300, 60
_NUM_BINS = 24
_MAX_LABEL = 24
_CUT_AWAY = 0.35
_SOURCE_PX, _CROP_COLOUR, _WATERMARK_COLOUR = 192, "#ffd400", "#e5202a"
_TILE_PX, _COLUMNS, _GAP_PX, _CAPTION_PX = 96, 8, 4, 13


def bars(counts: Sequence[tuple[str, float]]) -> str:
    """A bar chart with a label under each bar; labels are thinned out until the chart fits inline.

    Args:
        counts: Label and non-negative value per bar, left to right; up to about 40 bars fit.
    """
    if not counts:
        return "nothing to show"
    # No bars, all labels; then every second, third, ... label; then none.
    for every in (1, 2, 3, 4, 6, 8, len(counts) + 1):
        labels = [
            (place, label)
            for place, (label, _) in enumerate(counts)
            if place % every == 0 and every <= len(counts)
        ]
        chart = _chart([value for _, value in counts], labels)
        if len(chart) < MAX_INLINE:
            return chart
    raise AssertionError(f"a chart of {len(counts)} bars does not fit inline")


def histogram(values: Iterable[float]) -> str:
    """The distribution of `values` in 24 bars, with its ends under it; non-finite ones are left
    out."""
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    if not len(finite):
        return "nothing to show"
    low, high = float(finite.min()), float(finite.max())
    # np.histogram refuses ranges that 24 bins cannot part; equal values stand in the middle.
    places = (
        (finite - low) / (high - low) * _NUM_BINS
        if high > low
        else np.full(len(finite), _NUM_BINS / 2)
    )
    counts = np.bincount(places.astype(np.int64).clip(0, _NUM_BINS - 1), minlength=_NUM_BINS)
    return _chart(counts.tolist(), [(1, f"{low:.4g}"), (_NUM_BINS - 2, f"{high:.4g}")])


def shares(rows: Sequence[tuple[str, float, float]]) -> str:
    """Pairs of bars, found and wanted, with their percentages under them.

    Args:
        rows: Label, share found and share wanted, each between 0 and 1; three or four rows fit.
    """
    bars_of = [value for _, found, wanted in rows for value in (found, wanted, 0.0)]
    labels = [
        (3 * place + 1, f"{label}: {found:.0%} of {wanted:.0%}")
        for place, (label, found, wanted) in enumerate(rows)
    ]
    return _chart(bars_of, labels)


def sparkline(values: Sequence[float]) -> str:
    """A curve over equal steps, thinned to 60 points, with its first and last value; non-finite
    ones are gaps."""
    kept = sorted(
        {round(place) for place in np.linspace(0, len(values) - 1, min(len(values), 60)).tolist()}
    )
    points = [(place, values[place]) for place in kept if math.isfinite(values[place])]
    if not points:
        return "nothing to show"
    low, high = min(value for _, value in points), max(value for _, value in points)
    right, span = max(len(values) - 1, 1), (high - low) or 1.0
    path = " ".join(
        f"{place * _WIDTH / right:.0f},{_HEIGHT - 2 - (value - low) / span * (_HEIGHT - 4):.0f}"
        for place, value in points
    )
    text = f"{points[0][1]:.4g} to {points[-1][1]:.4g}"
    body = f"<polyline points='{path}' fill='none' stroke='{_FILL}'/>{_text(_WIDTH / 2, text)}"
    return _svg_markdown(body, "curve")


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    columns: int = _COLUMNS,
) -> str:
    """Images in rows as one JPEG in Markdown of at most 32,000 characters.

    Args:
        images: `(H, W, 3)` uint8, of any sizes; each is fitted into a square of 96 px.
        captions: One per image, written under it and cut to its width.
        columns: Images in a row.
    """
    if not images:
        return "no images"
    sheet = _tiles(images, captions, columns)
    for scale in (1.0, 0.75, 0.5, 0.35):
        size = (max(round(sheet.width * scale), 1), max(round(sheet.height * scale), 1))
        smaller = sheet if scale == 1.0 else sheet.resize(size, Image.Resampling.LANCZOS)
        for quality in (85, 70, 55, 40):
            markdown = f"![{len(images)} images]({data_uri(jpeg(smaller, quality), 'image/jpeg')})"
            if len(markdown) <= MAX_SHEET:
                return markdown
    raise AssertionError(f"{len(images)} images do not fit into a contact sheet: show fewer")


def placed_source(
    pixels: np.ndarray, placement: Placement, watermarks: Sequence[Box]
) -> np.ndarray:
    """A source image, small: what is cut away dark, the crop framed in yellow, watermark boxes in
    red.

    Args:
        pixels: `(H, W, 3)` uint8, the upright source.
        placement: Where it went in its bucket; a padded image is framed whole.
        watermarks: In pixels of the source.
    """
    small = fit(pixels, _SOURCE_PX, _SOURCE_PX)
    scale = small.height / pixels.shape[0]
    per_y = placement.resized.height / placement.original.height
    per_x = placement.resized.width / placement.original.width
    height = min(placement.bucket.height, placement.resized.height) / per_y
    width = min(placement.bucket.width, placement.resized.width) / per_x
    top, left = placement.crop_top / per_y, placement.crop_left / per_x
    crop = Box(top, left, top + height, left + width)
    y0, x0, y1, x1 = (round(side * scale) for side in crop)
    dark = small.point(lambda level: level * _CUT_AWAY)
    dark.paste(small.crop((x0, y0, x1, y1)), (x0, y0))
    small, draw = dark, ImageDraw.Draw(dark)
    for box, colour in [(crop, _CROP_COLOUR), *((box, _WATERMARK_COLOUR) for box in watermarks)]:
        y0, x0, y1, x1 = (round(side * scale) for side in box)
        corner = (min(x1, small.width) - 1, min(y1, small.height) - 1)
        if corner[0] > max(x0, 0) and corner[1] > max(y0, 0):
            draw.rectangle([(max(x0, 0), max(y0, 0)), corner], outline=colour, width=2)
    return np.asarray(small)


def fit(picture: np.ndarray | Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image to the largest size that fits into `height` and `width`, both pixels, keeping
    its shape."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    scale = min(height / image.height, width / image.width)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def write(
    draw: ImageDraw.ImageDraw,
    top: int,
    left: int,
    text: str,
    *,
    width: int,
    size: int,
    colour: str = INK,
) -> None:
    """Write one line, cut with an ellipsis to `width` pixels."""
    font = ImageFont.load_default(size)
    line = " ".join(text.split())[:200]
    shown = line
    while shown and draw.textlength(shown, font=font) > width:
        line = line[:-1]
        shown = f"{line.rstrip()}…"
        if not line:
            return
    draw.text((left, top), shown, fill=colour, font=font)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The bytes of a baseline JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes, media_type: str) -> str:
    """`content` as a `data:` address."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _tiles(images: Sequence[np.ndarray], captions: Sequence[str] | None, most: int) -> Image.Image:
    step = _TILE_PX + _GAP_PX
    row = step + (_CAPTION_PX if captions else 0)
    columns = min(len(images), most)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step + _GAP_PX, rows * row + _GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(images):
        top = _GAP_PX + number // columns * row
        left = _GAP_PX + number % columns * step
        small = fit(picture, _TILE_PX, _TILE_PX)
        sheet.paste(
            small, (left + (_TILE_PX - small.width) // 2, top + (_TILE_PX - small.height) // 2)
        )
        if captions and number < len(captions):
            write(
                draw,
                top + _TILE_PX + 1,
                left,
                captions[number],
                width=_TILE_PX,
                size=9,
                colour=MUTED,
            )
    return sheet


def _chart(values: Sequence[float], labels: Sequence[tuple[int, str]]) -> str:
    """Bars of one path, each as wide as its share, under them `labels` by place."""
    highest, share = max(values) or 1, _WIDTH / len(values)
    heights = [round(value / highest * _HEIGHT) or (1 if value else 0) for value in values]
    width = max(round(share * 0.85), 1)
    path = "".join(
        f"M{place * share:.0f} {_HEIGHT}v-{height}h{width}v{height}"
        for place, height in enumerate(heights)
        if height
    )
    texts = "".join(
        _text(min(max((place + 0.42) * share, _half(label)), _WIDTH - _half(label)), label)
        for place, label in labels
    )
    return _svg_markdown(f"<path d='{path}' fill='{_FILL}'/>{texts}", "chart")


def _half(label: str) -> float:
    """Half of a label's width at most, so that none is cut at the chart's ends."""
    return 2.4 * len(label[:_MAX_LABEL])


def _text(middle: float, text: str) -> str:
    return f"<text x='{middle:.0f}' y='71'>{escape(text[:_MAX_LABEL])}</text>"


def _svg_markdown(body: str, name: str) -> str:
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='74' font-size='8' text-anchor='middle' "
        f"font-family='sans-serif'>{body}</svg>"
    )
    return f"![{name}]({data_uri(svg.encode(), 'image/svg+xml')})"
