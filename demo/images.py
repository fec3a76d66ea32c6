"""Writes the demo world: a folder of drawn images with sidecars and a share of trouble, and the
truth beside it.

    python -m demo.images FOLDER

`pictures/` is what a user's folder looks like; `truth.jsonl`, `aliases.csv` and the scripted
judgements in `labels/pairs/demo.jsonl` lie outside it, where a workspace keeps them.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from demo import trouble
from demo.drawing import draw
from demo.prompts import NUM_WORLD_IMAGES, WORLD_SEED, world_scene
from demo.scenes import ALIASES, Scene, alias, all_tags, caption_of, clean, sample_scene, tags_of
from training.buckets.geometry import Box, Size
from training.seeds import Purpose, generator

PAIRS_PER_IMAGE = 5
START = datetime(2024, 1, 1, tzinfo=UTC)
Row = dict[str, Any]
"""One file's truth: path (relative to `pictures/`), image_id, kind, tags, caption, quality (0 for
junk), junk, watermark_box ([y0, x0, y1, x1] upright pixels), height, width (upright; null where
nothing can be decoded), copy_of."""


class World:
    """Collects files of one demo world and what is true of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.images = folder / "pictures"
        self.seed = seed
        self.rows: list[Row] = []

    def add(self, name: str, data: bytes, kind: str, **truth: Any) -> Row:
        """Write one image file and remember its truth."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        row: Row = {
            "path": name,
            "image_id": hashlib.sha256(data).hexdigest(),
            "kind": kind,
            "tags": [],
            "caption": None,
            "quality": None,
            "junk": False,
            "watermark_box": None,
            "height": None,
            "width": None,
            "copy_of": None,
            **truth,
        }
        self.rows.append(row)
        return row

    def add_scene(self, name: str, data: bytes, kind: str, scene: Scene, box: Box | None) -> Row:
        """Write an image of `scene` with its sidecars."""
        rng = generator(self.seed, Purpose.DEMO, "sidecar", name)
        row = self.add(
            name,
            data,
            kind,
            tags=tags_of(scene),
            caption=caption_of(scene, rng),
            quality=scene.quality,
            watermark_box=None if box is None else list(box),
            height=scene.size.height,
            width=scene.size.width,
        )
        self._write_sidecars(name, row, rng)
        return row

    def _write_sidecars(self, name: str, row: Row, rng: random.Random) -> None:
        """Tags as text for most, more in JSON for some, nothing for a few; now and then under
        another name."""
        path = self.images / name
        tags = [alias(tag, rng, 0.12) for tag in row["tags"] if tag != "watermark"]
        if rng.random() < 0.85:
            path.with_suffix(".txt").write_text(", ".join(tags) + "\n", "utf-8")
        if rng.random() < 0.5:
            content = {
                "caption": row["caption"],
                "tags": tags,
                "rating": rng.choice(["general", "general", "general", "sensitive"]),
                "favourites": max(0, round(rng.gauss(row["quality"] ** 2, 8))),
                "created_at": (START + timedelta(hours=rng.randrange(24 * 700))).isoformat(),
            }
            path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def write_world(
    folder: Path, *, num_images: int = NUM_WORLD_IMAGES, seed: int = WORLD_SEED
) -> Path:
    """Draw a demo world; equal arguments give equal bytes.

    Args:
        folder: Made when missing; receives `pictures/`, `truth.jsonl`, `aliases.csv` and
            `labels/pairs/demo.jsonl`.
        num_images: Drawn images of full use; about a fifth of that comes on top as trouble.
        seed: Names the world.

    Returns:
        The folder of images, `folder / "pictures"`.
    """
    world = World(folder, seed)
    _add_images(world, num_images)
    _add_copies(world, num_images)
    _add_junk(world, num_images)
    _add_trouble(world, num_images)
    lines = [json.dumps(row, ensure_ascii=False) for row in world.rows]
    (folder / "truth.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    write_aliases(folder / "aliases.csv", num_images=num_images, seed=seed)
    pairs = folder / "labels" / "pairs" / "demo.jsonl"
    pairs.parent.mkdir(parents=True, exist_ok=True)
    judged = judge_pairs(world.rows, PAIRS_PER_IMAGE * num_images, seed)
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in judged), "utf-8")
    return world.images


def _add_images(world: World, count: int) -> None:
    turned = set(
        generator(world.seed, Purpose.DEMO, "turned").sample(range(count), math.ceil(count / 36))
    )
    for index in range(count):
        scene = world_scene(world.seed, index)
        rng = generator(world.seed, Purpose.DEMO, "file", index)
        drawn = draw(scene)
        folder = rng.choice(("drawings", "downloads/2024", "downloads/2025"))
        if index in turned:
            data = trouble.turned(drawn.image, rng.choice(sorted(trouble.INVERSE_TURN)))
            world.add_scene(
                f"{folder}/img_{index:04d}.jpg", data, "turned", scene, drawn.watermark_box
            )
            continue
        extension = rng.choices(("jpg", "png", "webp"), (5, 2, 2))[0]
        data = trouble.encode(drawn.image, extension)
        world.add_scene(
            f"{folder}/img_{index:04d}.{extension}", data, "good", scene, drawn.watermark_box
        )


def _add_copies(world: World, count: int) -> None:
    """Equal bytes, equal pixels in another encoding, and nearly equal images (shrunk and packed
    anew)."""
    rng = generator(world.seed, Purpose.DEMO, "copies")
    originals = [row for row in world.rows if row["kind"] == "good"]
    each = math.ceil(count / 36)
    for number, row in enumerate(rng.sample(originals, 3 * each)):
        data = (world.images / row["path"]).read_bytes()
        shared = {
            key: row[key]
            for key in ("tags", "caption", "quality", "watermark_box", "height", "width")
        }
        shared["copy_of"] = row["image_id"]
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        if number < each:
            extension = row["path"].rpartition(".")[2]
            world.add(f"copies/again_{number:03d}.{extension}", data, "exact_copy", **shared)
        elif number < 2 * each:
            data = trouble.encode(image, "webp", lossless=True)
            world.add(f"copies/same_{number:03d}.webp", data, "pixel_copy", **shared)
        else:
            scale = rng.uniform(0.88, 0.97)
            small = image.resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
            )
            shared |= {"height": small.height, "width": small.width}
            if row["watermark_box"]:
                shared["watermark_box"] = [value * scale for value in row["watermark_box"]]
            world.add(
                f"copies/near_{number:03d}.jpg",
                trouble.encode(small, "jpg", quality=86),
                "near_copy",
                **shared,
            )


def _add_junk(world: World, count: int) -> None:
    for index in range(max(2, math.ceil(count / 15))):
        image = trouble.draw_junk(world.seed, "world", index)
        size = {"height": image.height, "width": image.width}
        world.add(
            f"downloads/junk_{index:03d}.jpg",
            trouble.encode(image, "jpg"),
            "junk",
            quality=0,
            junk=True,
            **size,
        )


def _add_trouble(world: World, count: int) -> None:
    """Damaged files, images smaller than any bucket, odd encodings and odd names."""
    for name, data in trouble.damaged(world.seed):
        world.add(f"trouble/{name}", data, "broken")
    for index in range(math.ceil(count / 50)):
        scene = clean(sample_scene(world.seed, "tiny", index, watermark_share=0.0))
        rng = generator(world.seed, Purpose.DEMO, "tiny", index)
        drawn = draw(replace(scene, size=Size(rng.randint(40, 90), rng.randint(40, 90))))
        size = {"height": drawn.image.height, "width": drawn.image.width}
        data = trouble.encode(drawn.image, "png")
        world.add(f"trouble/tiny_{index}.png", data, "tiny", tags=tags_of(scene), quality=9, **size)
    for name, scene, data in trouble.odd_modes(world.seed):
        world.add_scene(f"trouble/{name}", data, name.partition(".")[0], scene, None)
    names = (
        "étoile ⭐ 星.png",
        "\"quoted\" 'name' & more.png",
        "<img src=x onerror=alert(1)>.png",
        "a|b;c`d $(e).png",
    )
    for number, name in enumerate(names):
        scene = clean(sample_scene(world.seed, "odd name", number))
        world.add_scene(
            f"trouble/{name}", trouble.encode(draw(scene).image, "png"), "odd_name", scene, None
        )


def write_aliases(
    path: Path, *, num_images: int = NUM_WORLD_IMAGES, seed: int = WORLD_SEED
) -> None:
    """Tag, category, count among the drawn images, aliases; danbooru's layout for tag completion,
    no header."""
    scenes = [world_scene(seed, index) for index in range(num_images)]
    counts = {tag: sum(tag in tags_of(scene) for scene in scenes) for tag in all_tags()}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            writer.writerow([tag, 0, count, ",".join(ALIASES.get(tag, ()))])


def judge_pairs(rows: list[Row], count: int, seed: int) -> list[dict[str, str]]:
    """Pairwise judgements of a patient rater who sees true quality through slight noise.

    Args:
        rows: Truth of the world's files; good images and junk are judged, each image once under
            its id.
        count: Judgements to make: 84 % among good images, the rest with junk on one side or on
            both.
        seed: Names the world.

    Returns:
        One JSON-ready object per judgement: pair_id, a, b, outcome (a, b, tie, both_junk, skip),
        rater, source, created_at.
    """
    usable = {
        row["image_id"]: row["quality"]
        for row in rows
        if row["kind"] in ("good", "turned", "odd_name")
    }
    junk = sorted(row["image_id"] for row in rows if row["junk"])
    good = sorted(usable)
    pairs = []
    for index in range(count):
        rng = generator(seed, Purpose.DEMO, "pair", index)
        draw_kind = rng.random()
        if draw_kind < 0.84:
            a, b = rng.sample(good, 2)
        elif draw_kind < 0.93:
            a, b = rng.sample([rng.choice(good), rng.choice(junk)], 2)
        else:
            a, b = rng.sample(junk, 2)
        pairs.append(
            {
                "pair_id": f"demo-{index:05d}",
                "a": a,
                "b": b,
                "outcome": _outcome(usable.get(a), usable.get(b), rng),
                "rater": "demo",
                "origin": "scripted",
                "created_at": (START + timedelta(seconds=20 * index)).isoformat(),
            }
        )
    return pairs


def _outcome(quality_a: int | None, quality_b: int | None, rng: random.Random) -> str:
    """The rater's word; None stands for junk."""
    if rng.random() < 0.01:
        return "skip"
    if quality_a is None or quality_b is None:
        return "both_junk" if quality_a is quality_b else "a" if quality_b is None else "b"
    difference = quality_a - quality_b + rng.gauss(0, 0.7)
    return "tie" if abs(difference) < 0.5 else "a" if difference > 0 else "b"


def main() -> None:
    """Write the default world to the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=NUM_WORLD_IMAGES)
    parser.add_argument("--seed", type=int, default=WORLD_SEED)
    arguments = parser.parse_args()
    print(write_world(arguments.folder, num_images=arguments.num_images, seed=arguments.seed))


if __name__ == "__main__":
    main()
