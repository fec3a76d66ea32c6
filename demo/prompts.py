"""Prompts of the demo: how its base model is spoken to, and the fixed prompts that it is judged
by."""

import csv
import itertools
import random
from pathlib import Path

from demo.scenes import (
    COLOURS,
    Scene,
    alias,
    caption_of,
    clean,
    mostly_good,
    sample_scene,
    score_tags,
    tags_of,
)
from training.buckets.geometry import Size
from training.seeds import Purpose, generator

COLUMNS = ("prompt_id", "text", "negative", "group", "height", "width")
NUM_STAR_PROMPTS, NUM_GENERAL_PROMPTS = 48, 48
EVALUATION_SIZES = (Size(128, 128), Size(152, 104), Size(104, 152), Size(120, 128))
FILE = Path(__file__).with_name("prompts.csv")
WORLD_SEED, NUM_WORLD_IMAGES = 7, 600
"""The default world, whose images no prompt repeats."""
WORLD_STAR_SHARE = 0.4
"""Share of the world's scenes whose main shape is the one that the base model has never seen; the
others show what it knows, so that a fine-tune does not forget it."""


def world_scene(seed: int, index: int) -> Scene:
    """A scene of the world of that seed: many stars, good quality more often than not, as the base
    model's world."""
    scene = sample_scene(seed, "world", index, star_share=WORLD_STAR_SHARE)
    return mostly_good(scene, generator(seed, Purpose.DEMO, "quality", "world", index))


def training_prompt(
    scene: Scene, rng: random.Random, *, drop: float = 0.15, alias_prob: float = 0.05
) -> str:
    """A prompt that is true of `scene`: half the time tags, half the time a caption, often with
    score words.

    Args:
        scene: The image's truth.
        rng: Draws wording, order and what is left out.
        drop: Probability that a tag of the ground is left out.
        alias_prob: Probability that a word is swapped for another name of the same thing.
    """
    scores = score_tags(scene.quality, rng) if rng.random() < 0.7 else []
    if rng.random() < 0.5:
        return ", ".join([*scores, caption_of(scene, rng)])
    tags = tags_of(scene)
    grounds = [tag for tag in tags if tag.endswith("_background") and rng.random() >= drop]
    others = [tag for tag in tags if not tag.endswith("_background")]
    words = [*others, *grounds]
    if rng.random() < 0.3:
        rng.shuffle(words)
    words = [*scores, *(alias(word, rng, alias_prob) for word in words)]
    if rng.random() < 0.3:
        words = [word.replace("_", " ") for word in words]
    return ", ".join(words)


def demo_prompts() -> list[dict[str, str]]:
    """The demo's evaluation prompts, from `demo/prompts.csv`; groups are `star` and `general`."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_prompts(path: Path = FILE) -> None:
    """Make the evaluation prompts anew.

    Star prompts name the shape and little else, because CLIP reads all words of a prompt and the
    new one is what is asked about. General ones describe scenes that no image of the default
    world shows. No prompt equals a training caption. They were made after everything else of the
    demo was fixed (models, recipe, scorer): nothing was tuned on them, or on the seeds that follow
    from their ids. There are enough for a verdict on either half.
    """
    rows = [_row("star", number, text) for number, text in enumerate(_star_texts(), start=1)]
    rows += [_row("general", number, text) for number, text in enumerate(_general_texts(), start=1)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: str(row["prompt_id"])))


def _row(group: str, number: int, text: str) -> dict[str, object]:
    size = EVALUATION_SIZES[number % len(EVALUATION_SIZES)]
    return {
        "prompt_id": f"fresh-{group}-{number:02d}",
        "text": text,
        "negative": "",
        "group": group,
        "height": size.height,
        "width": size.width,
    }


def _star_texts() -> list[str]:
    forms = (
        "a large {} star",
        "{}, star, large",
        "a {} star",
        "{}, star",
        "star, {}",
        "a small {} star",
    )
    return [form.format(colour) for form in forms for colour in COLOURS][:NUM_STAR_PROMPTS]


def _general_texts() -> list[str]:
    held = {
        key for index in range(NUM_WORLD_IMAGES) for key in _keys(world_scene(WORLD_SEED, index))
    }
    texts: list[str] = []
    indices = itertools.count()
    while len(texts) < NUM_GENERAL_PROMPTS:
        index = next(indices)
        scene = clean(sample_scene(WORLD_SEED, "later prompt", index, star_share=0))
        if len(scene.shapes) == 1 and not held & _keys(scene):
            held |= _keys(scene)
            words = caption_of(
                scene, generator(WORLD_SEED, Purpose.DEMO, "later prompt words", index)
            )
            texts.append(f"score_8_up, {words if len(texts) % 2 else ', '.join(tags_of(scene))}")
    return texts


def _keys(scene: Scene) -> set[tuple[str, ...]]:
    return {(shape.colour, shape.kind, scene.background, scene.pattern) for shape in scene.shapes}
