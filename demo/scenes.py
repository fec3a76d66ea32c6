"""What a demo image holds, and its words: shapes, colours, backgrounds, quality, watermark, tags
and captions.

A scene is the ground truth; `demo.drawing` makes its pixels, `demo.images` a folder of them.
"""

import math
import random
from dataclasses import dataclass, replace

from training.buckets.geometry import Size
from training.seeds import Purpose, generator

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "heart", "star")
TAUGHT_LATER = "star"
"""The concept that the base model is ignorant of."""
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 50),
    "green": (35, 150, 65),
    "blue": (40, 80, 210),
    "purple": (140, 55, 185),
    "white": (246, 246, 246),
    "black": (24, 24, 28),
}
PATTERNS = ("plain", "striped", "dotted", "gradient", "checkered")
FLAWS = ("blur", "noise", "jpeg", "wash")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right", "bottom")
WATERMARK_WORDS = ("SAMPLE", "DEMO", "(c) foundry", "preview", "www.demo.test", "PROOF", "@drawn")

ALIASES = {
    "red": ("scarlet", "crimson"),
    "blue": ("azure",),
    "white": ("ivory",),
    "circle": ("disc",),
    "diamond": ("rhombus",),
    "cross": ("plus",),
    "ring": ("donut",),
    "star": ("pentagram",),
    "large": ("big",),
    "small": ("little",),
    "striped_background": ("stripes",),
    "dotted_background": ("polka_dots",),
    "checkered_background": ("checkerboard",),
}
"""Canonical tag → other names of the same thing, the demo's alias table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One filled figure; lengths are shares of the image's shorter side."""

    kind: str
    colour: str
    y: float
    """Centre, share of the height."""
    x: float
    """Centre, share of the width."""
    radius: float
    """Half of the figure's extent, share of the shorter side."""
    angle: float
    """Rotation in radians."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One image before it is drawn: everything that is true of it."""

    size: Size
    shapes: tuple[Shape, ...]
    large: bool
    """Whether a lone shape is large; two shapes have no size."""
    background: str
    """Colour name."""
    pattern: str
    period: float
    """Distance between stripes, dots or squares, share of the shorter side."""
    slant: float
    """Direction of the pattern in radians."""
    quality: int
    """1 (ruined) to 9 (untouched)."""
    flaw: str
    """How a quality below 9 shows."""
    watermark: str
    """Its words; empty for none."""
    corner: str
    """Where the watermark stands."""
    watermark_scale: float
    """Width of the watermark, share of the image's width."""
    grain: int
    """Seeds noise and colour jitter."""


def sample_scene(
    seed: int, *key: int | str, star_share: float = 0.28, watermark_share: float = 0.15
) -> Scene:
    """Draw one scene; equal seeds and keys give equal scenes.

    Args:
        seed: The world's seed.
        key: Names the image within the world.
        star_share: Probability that the main shape is a star; 0 gives a world without any star.
        watermark_share: Probability of a watermark.
    """
    rng = generator(seed, Purpose.DEMO, "scene", *key)
    background = rng.choice(list(COLOURS))
    two = rng.random() < 0.12
    large = rng.random() < 0.5
    size = _sample_size(rng)
    return Scene(
        size=size,
        shapes=_sample_shapes(rng, size, background, star_share=star_share, two=two, large=large),
        large=large,
        background=background,
        pattern=rng.choice(PATTERNS),
        period=rng.uniform(0.18, 0.3),
        slant=rng.choice((0.0, math.pi / 2, math.pi / 4, -math.pi / 4)) + rng.uniform(-0.1, 0.1),
        quality=rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 9)),
        flaw=rng.choice(FLAWS),
        watermark=rng.choice(WATERMARK_WORDS) if rng.random() < watermark_share else "",
        corner=rng.choice(CORNERS),
        watermark_scale=rng.uniform(0.34, 0.55),
        grain=rng.getrandbits(31),
    )


def mostly_good(scene: Scene, rng: random.Random) -> Scene:
    """The same scene, in good quality more often than not."""
    return replace(scene, quality=rng.choice((6, 7, 8, 9, 9))) if rng.random() < 0.6 else scene


def clean(scene: Scene) -> Scene:
    """The same scene in best quality and without a watermark."""
    return replace(scene, quality=9, watermark="")


def _sample_size(rng: random.Random) -> Size:
    if rng.random() < 0.75:
        aspect = math.exp(rng.uniform(math.log(0.62), math.log(1.6)))
    else:
        aspect = math.exp(rng.uniform(math.log(0.48), math.log(2.9)))
    top = 420.0 if rng.random() < 0.1 else 250.0
    side = math.exp(rng.uniform(math.log(142.0), math.log(top)))
    height, width = side / math.sqrt(aspect), side * math.sqrt(aspect)
    shrink = min(1.0, 600.0 / max(height, width))
    return Size(round(height * shrink), round(width * shrink))


def _sample_shapes(
    rng: random.Random, size: Size, background: str, *, star_share: float, two: bool, large: bool
) -> tuple[Shape, ...]:
    """One or two shapes inside the central square, so that CLIP's centre crop shows what the words
    say."""
    others = [kind for kind in SHAPES if kind != TAUGHT_LATER]
    first = TAUGHT_LATER if rng.random() < star_share else rng.choice(others)
    second = rng.choice([kind for kind in others if kind != first])
    colours = [colour for colour in COLOURS if colour != background]
    rng.shuffle(colours)
    if two:
        side = rng.choice((-0.2, 0.2))
        radii = [rng.uniform(0.19, 0.24) for _ in range(2)]
        places = [(-0.2 + rng.uniform(-0.04, 0.04), side), (0.2 + rng.uniform(-0.04, 0.04), -side)]
        rng.shuffle(places)
    else:
        radii = [rng.uniform(0.33, 0.42) if large else rng.uniform(0.17, 0.22)]
        places = [
            (rng.uniform(-0.6, 0.6) * (0.5 - radii[0]), rng.uniform(-0.6, 0.6) * (0.5 - radii[0]))
        ]
    short = min(size)
    return tuple(
        Shape(
            kind=kind,
            colour=colour,
            y=0.5 + down * short / size.height,
            x=0.5 + right * short / size.width,
            radius=radius,
            angle=rng.uniform(-0.2, 0.2),
        )
        for kind, colour, radius, (down, right) in zip(
            (first, second), colours, radii, places, strict=False
        )
    )


def tags_of(scene: Scene) -> list[str]:
    """Canonical tags, in the order a person would name them; quality is not among them."""
    tags: list[str] = []
    for shape in scene.shapes:
        tags += [shape.colour, shape.kind]
    tags.append("two_shapes" if len(scene.shapes) == 2 else "large" if scene.large else "small")
    tags += [f"{scene.background}_background", f"{scene.pattern}_background"]
    if scene.watermark:
        tags.append("watermark")
    return list(dict.fromkeys(tags))


def all_tags() -> list[str]:
    """Every tag a scene can have, sorted."""
    backgrounds = [f"{word}_background" for word in (*COLOURS, *PATTERNS)]
    return sorted([*SHAPES, *COLOURS, *backgrounds, "large", "small", "two_shapes", "watermark"])


def caption_of(scene: Scene, rng: random.Random) -> str:
    """One sentence about the scene; `rng` picks among wordings."""
    pattern = "" if scene.pattern == "plain" and rng.random() < 0.5 else f"{scene.pattern} "
    ground = f"on a {pattern}{scene.background} background"
    names = [f"{shape.colour} {shape.kind}" for shape in scene.shapes]
    if len(names) == 2:
        subject = f"{_a(names[0])} and {_a(names[1])}"
    else:
        subject = _a(f"{'large' if scene.large else 'small'} {names[0]}")
    sentence = f"{subject} {ground}"
    if scene.watermark and rng.random() < 0.7:
        sentence += " with a watermark"
    return sentence


def score_tags(quality: int, rng: random.Random) -> list[str]:
    """One to three of bigASP's score words that are true of `quality` (1–9)."""
    words = [f"score_{quality}", *(f"score_{k}_up" for k in range(1, quality + 1))]
    return rng.sample(words, min(rng.randint(1, 3), len(words)))


def alias(tag: str, rng: random.Random, prob: float) -> str:
    """`tag`, or with probability `prob` another name of it where one exists."""
    names = ALIASES.get(tag, ())
    return rng.choice(names) if names and rng.random() < prob else tag


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def mutate(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one word wrong: mostly the shape or its colour."""
    what = rng.choice(("kind", "kind", "colour", "colour", "background", "pattern", "large"))
    if what == "background":
        others = [
            name for name in COLOURS if name not in (scene.background, scene.shapes[0].colour)
        ]
        return replace(scene, background=rng.choice(others))
    if what == "pattern":
        return replace(
            scene, pattern=rng.choice([name for name in PATTERNS if name != scene.pattern])
        )
    if what == "large" and len(scene.shapes) == 1:
        return replace(scene, large=not scene.large)
    place = rng.randrange(len(scene.shapes))
    shape = scene.shapes[place]
    if what == "colour":
        taken = {other.colour for other in scene.shapes} | {scene.background}
        wrong = replace(shape, colour=rng.choice([name for name in COLOURS if name not in taken]))
    else:
        kinds = {other.kind for other in scene.shapes}
        wrong = replace(shape, kind=rng.choice([name for name in SHAPES if name not in kinds]))
    return replace(scene, shapes=(*scene.shapes[:place], wrong, *scene.shapes[place + 1 :]))
