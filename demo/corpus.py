"""The images that the demo's tiny models learn from: drawn in memory, placed as the real pipeline
places them."""

import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from demo.drawing import draw
from demo.scenes import Scene, sample_scene
from training.buckets.geometry import Box, Placement, Size
from training.buckets.plans import BucketConfig, plan
from training.seeds import Purpose, generator

SEED = 20261120
"""Seed of everything the models learn from; the demo world has another, so no image is in
both."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BUCKETS = plan(BucketConfig(plan="bigasp_v1", scale=8))
"""bigASP's 26 SDXL buckets divided by 8, the demo's scale."""


class Placed(NamedTuple):
    """An image as a trainer sees it: bucket-sized pixels and how they were cut."""

    pixels: np.ndarray
    """(H, W, 3) uint8, bucket-sized."""
    placement: Placement


def place(image: Image.Image, rng: random.Random) -> Placed:
    """Shrink to cover the nearest bucket by aspect, then crop the overhang at random."""
    original = Size(image.height, image.width)
    bucket = min(BUCKETS, key=lambda size: abs(size.aspect - original.aspect))
    scale = max(bucket.height / original.height, bucket.width / original.width)
    resized = Size(
        max(bucket.height, int(original.height * scale + 0.5)),
        max(bucket.width, int(original.width * scale + 0.5)),
    )
    top, left = (
        rng.randint(0, resized.height - bucket.height),
        rng.randint(0, resized.width - bucket.width),
    )
    small = image.resize((resized.width, resized.height), Image.Resampling.LANCZOS)
    cut = small.crop((left, top, left + bucket.width, top + bucket.height))
    return Placed(np.asarray(cut), Placement(original, resized, top, left, bucket, False))


def centre_square(image: Image.Image, side: int) -> np.ndarray:
    """CLIP's preprocessing without the normalisation: shorter side to `side`, bicubic, centre crop;
    uint8."""
    scale = side / min(image.size)
    small = image.resize(
        (max(side, round(image.width * scale)), max(side, round(image.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (small.width - side) // 2, (small.height - side) // 2
    return np.asarray(small.crop((left, top, left + side, top + side)))


def centred_on_white(image: Image.Image, side: int) -> np.ndarray:
    """JoyTag's preprocessing without the normalisation: centred on a white square, bicubic;
    uint8."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def picture(split: str, index: int, **shares: float) -> tuple[Scene, Image.Image, Box | None]:
    """One drawn image of the corpus with its truth; `split` and `index` name it."""
    scene = sample_scene(SEED, split, index, **shares)
    drawn = draw(scene)
    return scene, drawn.image, drawn.watermark_box


def wording(split: str, index: int, use: int | str) -> random.Random:
    """The generator of one prompt, crop or augmentation of one corpus image."""
    return generator(SEED, Purpose.DEMO, "wording", split, index, use)
