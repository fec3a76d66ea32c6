"""Scenes become pixels: anti-aliased shapes on patterned grounds, graded flaws, watermarks with
their true box."""

import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from demo.scenes import COLOURS, Scene, Shape
from training.buckets.geometry import Box, Size
from training.seeds import Purpose, numpy_generator

OVERSAMPLE = 4


class Drawn(NamedTuple):
    """A finished image and what only its pixels tell."""

    image: Image.Image
    """RGB, `scene.size`."""
    watermark_box: Box | None
    """Tight around the watermark's ink, upright pixels; None without a watermark."""


def draw(scene: Scene) -> Drawn:
    """Draw one scene: ground, shapes, flaw, then the watermark on top (a flaw never hides it)."""
    rng = numpy_generator(scene.grain, Purpose.DEMO, "pixels")
    image = Image.fromarray(_ground(scene, rng))
    for shape in scene.shapes:
        _paint(image, shape, scene.size, rng)
    image = spoil(image, scene.flaw, (9 - scene.quality) / 8, rng)
    box = _stamp(image, scene) if scene.watermark else None
    return Drawn(image, box)


def spoil(image: Image.Image, flaw: str, severity: float, rng: np.random.Generator) -> Image.Image:
    """Lower the quality of an RGB image by one visible flaw.

    Strength is relative to the image's size, so that a flaw survives the shrinking to a bucket.

    Args:
        image: RGB.
        flaw: One of `demo.scenes.FLAWS`.
        severity: 0 (untouched) to 1 (ruined).
        rng: Draws the noise.
    """
    if severity <= 0:
        return image
    short = min(image.size)
    if flaw == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.004 * short + 0.034 * short * severity))
    if flaw == "wash":
        return Image.blend(image, Image.new("RGB", image.size, (186, 186, 184)), 0.78 * severity)
    scale = 100 / short
    small = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    if flaw == "noise":
        field = rng.normal(0.0, 68.0 * severity, (small[1], small[0], 3)).astype(np.float32)
        planes = [
            Image.fromarray(field[..., i]).resize(image.size, Image.Resampling.BILINEAR)
            for i in range(3)
        ]
        noisy = np.asarray(image, np.float32) + np.stack(
            [np.asarray(plane) for plane in planes], axis=-1
        )
        return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))
    packed = io.BytesIO()
    thumbnail = image.resize(small, Image.Resampling.BILINEAR)
    thumbnail.save(packed, "JPEG", quality=round(6 + 30 * (1 - severity) ** 2), subsampling=2)
    with Image.open(packed) as cheap:
        return cheap.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Background pixels, (H, W, 3) uint8: two tones of one colour mixed by the pattern."""
    height, width = scene.size
    base = _jitter(COLOURS[scene.background], rng) * 0.86 + 128 * 0.14
    tone = base * 0.62 + (255 if base.mean() < 150 else 60) * 0.38
    short = min(height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cos, sin = math.cos(scene.slant), math.sin(scene.slant)
    u, v = (x * cos + y * sin), (y * cos - x * sin)
    period = scene.period * short
    if scene.pattern == "plain":
        mix = np.zeros((height, width), np.float32)
    elif scene.pattern == "gradient":
        span = abs(cos) * width + abs(sin) * height
        mix = 1.25 * (u - u.min()) / span
        tone = base * 0.35 + (255 if base.mean() < 150 else 30) * 0.65
    elif scene.pattern == "striped":
        mix = _wave(u, period)
    elif scene.pattern == "checkered":
        mix = _wave(u, 2 * period) * _wave(v, 2 * period)
        mix += (1 - _wave(u, 2 * period)) * (1 - _wave(v, 2 * period))
    else:
        du, dv = (u / period) % 1 - 0.5, (v / period) % 1 - 0.5
        mix = np.clip((0.27 - np.hypot(du, dv)) * period + 0.5, 0, 1)
    pixels = base + (tone - base) * np.clip(mix, 0, 1)[..., None]
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _wave(position: np.ndarray, period: float) -> np.ndarray:
    """A square wave with edges one pixel soft."""
    phase = (position / period) % 1
    distance = np.minimum(np.abs(phase - 0.25), np.abs(phase - 1.25))
    return np.clip((0.25 - distance) * period + 0.5, 0, 1)


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour, np.float32) + rng.uniform(-10, 10, 3), 0, 255)


def _paint(image: Image.Image, shape: Shape, size: Size, rng: np.random.Generator) -> None:
    radius = shape.radius * min(size)
    side = 2 * math.ceil(radius * 1.1) + 2
    mask = Image.new("L", (side * OVERSAMPLE, side * OVERSAMPLE), 0)
    _outline(ImageDraw.Draw(mask), shape, side * OVERSAMPLE / 2, radius * OVERSAMPLE)
    mask = mask.reduce(OVERSAMPLE)
    left, top = round(shape.x * size.width - side / 2), round(shape.y * size.height - side / 2)
    red, green, blue = (int(value) for value in _jitter(COLOURS[shape.colour], rng))
    image.paste((red, green, blue), (left, top), mask)


def _outline(pen: ImageDraw.ImageDraw, shape: Shape, centre: float, radius: float) -> None:
    if shape.kind in ("circle", "ring"):
        pen.ellipse([centre - radius, centre - radius, centre + radius, centre + radius], fill=255)
        if shape.kind == "ring":
            hole = radius * 0.52
            pen.ellipse([centre - hole, centre - hole, centre + hole, centre + hole], fill=0)
        return
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    corners = [
        (centre + radius * (x * cos - y * sin), centre + radius * (x * sin + y * cos))
        for x, y in _polygon(shape.kind)
    ]
    pen.polygon(corners, fill=255)


def _polygon(kind: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a figure within the unit circle or nearly so, y downwards."""
    if kind == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if kind == "triangle":
        return [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)]
    if kind == "diamond":
        return [(0.0, -1.05), (0.68, 0.0), (0.0, 1.05), (-0.68, 0.0)]
    if kind == "cross":
        a, b = 0.32, 0.98
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if kind == "star":
        spokes = [(1.05 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
        return [(length * math.sin(turn), -length * math.cos(turn)) for length, turn in spokes]
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            16 * math.sin(t) ** 3 / 16.5,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5
            - 0.12,
        )
        for t in turns
    ]


def _stamp(image: Image.Image, scene: Scene) -> Box:
    """Lay half-transparent words over the image; returns the box of their ink."""
    height, width = scene.size
    wanted = scene.watermark_scale * width
    trial = ImageFont.load_default(32).getbbox(scene.watermark)
    points = max(9.0, min(32 * wanted / (trial[2] - trial[0]), 0.16 * height))
    font = ImageFont.load_default(points)
    edge = max(1, round(points / 16))
    x0, y0, x1, y1 = font.getbbox(scene.watermark, stroke_width=edge)
    ink_height, ink_width = math.ceil(y1 - y0), math.ceil(x1 - x0)
    margin = round(0.03 * min(height, width))
    left = {"left": margin, "right": width - margin - ink_width}.get(
        scene.corner.split("_")[-1], (width - ink_width) // 2
    )
    top = margin if scene.corner.startswith("top") else height - margin - ink_height
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    pen.text(
        (left - x0, top - y0), scene.watermark, font=font, fill=(255, 255, 255, 205),
        stroke_width=edge, stroke_fill=(20, 20, 20, 175),
    )  # fmt: skip
    image.paste(layer, (0, 0), layer)
    ink = layer.getchannel("A").getbbox()
    assert ink is not None
    return Box(float(ink[1]), float(ink[0]), float(ink[3]), float(ink[2]))
