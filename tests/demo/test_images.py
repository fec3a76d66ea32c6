import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.stats import spearmanr

from demo import trouble
from demo.drawing import draw, spoil
from demo.images import judge_pairs, write_world
from demo.prompts import COLUMNS, NUM_WORLD_IMAGES, demo_prompts, world_scene, write_prompts
from demo.scenes import FLAWS, SHAPES, all_tags, caption_of, clean, mutate, sample_scene, tags_of
from training.seeds import Purpose, generator, numpy_generator

NUM_IMAGES = 72
COPIES = 2
"""Of each kind of copy, ceil(NUM_PICTURES / 36)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_images=NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def truth(world):
    return [json.loads(line) for line in (world / "truth.jsonl").read_text("utf-8").splitlines()]


def upright(world, row):
    with Image.open(world / "pictures" / row["path"]) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def test_two_processes_draw_the_same_bytes(tmp_path):
    program = (
        "import sys; from pathlib import Path; from demo.images import write_world;"
        "write_world(Path(sys.argv[1]), num_images=10, seed=3)"
    )
    digests = []
    for salt in ("1", "2"):
        folder = tmp_path / salt
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests.append(
            [
                (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest())
                for path in files
            ]
        )
    assert len(digests[0]) > 20
    assert digests[0] == digests[1]


def test_another_seed_is_another_world(tmp_path):
    write_world(tmp_path / "a", num_images=4, seed=1)
    write_world(tmp_path / "b", num_images=4, seed=2)
    texts = [(tmp_path / name / "truth.jsonl").read_text("utf-8") for name in "ab"]
    ids = [{json.loads(line)["image_id"] for line in text.splitlines()} for text in texts]
    assert len(ids[0] & ids[1]) <= 2, "only the empty file and the error page may be equal"


def test_drawing_needs_no_torch():
    program = "import sys, demo.images, demo.prompts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_image_file_has_one_line_of_truth_under_its_digest(world, truth):
    files = {
        p
        for p in (world / "pictures").rglob("*")
        if p.is_file() and p.suffix not in (".txt", ".json")
    }
    assert {world / "pictures" / row["path"] for row in truth} == files
    for row in truth:
        assert (
            row["image_id"]
            == hashlib.sha256((world / "pictures" / row["path"]).read_bytes()).hexdigest()
        )


def test_counts_of_trouble(truth):
    kinds = Counter(row["kind"] for row in truth)
    assert kinds["good"] + kinds["turned"] == NUM_IMAGES
    for kind in ("turned", "exact_copy", "pixel_copy", "near_copy", "tiny"):
        assert kinds[kind] == COPIES, kind
    assert (kinds["junk"], kinds["broken"], kinds["odd_name"]) == (5, 5, 4)
    for kind in ("grey16", "cmyk", "transparent", "palette", "animated"):
        assert kinds[kind] == 1


def test_sizes_boxes_and_tags_are_true_of_the_files(world, truth):
    known = set(all_tags())
    boxed = 0
    for row in truth:
        assert set(row["tags"]) <= known
        if row["kind"] == "broken":
            continue
        image = upright(world, row)
        assert (image.height, image.width) == (row["height"], row["width"])
        if row["watermark_box"]:
            boxed += 1
            y0, x0, y1, x1 = row["watermark_box"]
            assert 0 <= y0 < y1 <= row["height"]
            assert 0 <= x0 < x1 <= row["width"]
            assert "watermark" in row["tags"]
    assert boxed >= 5


def test_turned_files_lie_on_their_side_and_stand_upright_by_exif():
    scene = clean(sample_scene(1, "turned"))
    image = draw(scene).image
    for orientation in trouble.INVERSE_TURN:
        data = trouble.turned(image, orientation)
        with Image.open(io.BytesIO(data)) as stored:
            assert stored.getexif()[0x0112] == orientation
            back = ImageOps.exif_transpose(stored)
        assert back.size == image.size
        assert np.abs(np.asarray(back, float) - np.asarray(image, float)).mean() < 4


def test_copies_are_what_they_say(world, truth):
    by_id = {row["image_id"]: row for row in truth if row["copy_of"] is None}
    for row in truth:
        if row["kind"] == "exact_copy":
            assert row["image_id"] == row["copy_of"]
        elif row["kind"] == "pixel_copy":
            assert row["image_id"] != row["copy_of"]
            original = upright(world, by_id[row["copy_of"]])
            assert np.array_equal(np.asarray(original), np.asarray(upright(world, row)))
        elif row["kind"] == "near_copy":
            original = upright(world, by_id[row["copy_of"]])
            small = upright(world, row)
            assert small.size != original.size
            difference = np.abs(
                np.asarray(original.resize(small.size), float) - np.asarray(small, float)
            ).mean()
            assert difference < 12


def test_broken_files_cannot_be_decoded(world, truth):
    for row in (row for row in truth if row["kind"] == "broken"):
        with pytest.raises(OSError), Image.open(world / "pictures" / row["path"]) as image:
            image.load()


def test_odd_encodings_have_the_modes_they_are_named_after(world, truth):
    modes = {}
    for row in truth:
        if row["kind"] in ("grey16", "cmyk", "transparent", "palette", "animated"):
            with Image.open(world / "pictures" / row["path"]) as image:
                modes[row["kind"]] = (image.mode, getattr(image, "n_frames", 1))
    assert modes["grey16"][0].startswith("I")
    assert modes["cmyk"] == ("CMYK", 1)
    assert modes["transparent"] == ("RGBA", 1)
    assert modes["palette"] == ("P", 1)
    assert modes["animated"][1] == 3


def test_sidecars_name_the_truth_through_the_alias_table(world, truth):
    with (world / "aliases.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    canonical = {
        other: name for name, _, _, others in table for other in others.split(",") if other
    }
    used = 0
    for row in truth:
        path = (world / "pictures" / row["path"]).with_suffix(".txt")
        if path.exists():
            words = path.read_text("utf-8").strip().split(", ")
            used += sum(word in canonical for word in words)
            assert {canonical.get(word, word) for word in words} == set(row["tags"]) - {"watermark"}
    assert used >= 5
    stars = sum("star" in row["tags"] for row in truth if row["kind"] in ("good", "turned"))
    assert {name: int(count) for name, _, count, _ in table}["star"] == stars


def test_two_fifths_of_the_world_are_stars_and_most_of_it_is_good():
    scenes = [world_scene(7, index) for index in range(NUM_WORLD_IMAGES)]
    assert 0.34 <= np.mean([scene.shapes[0].kind == "star" for scene in scenes]) <= 0.46
    assert 0.66 <= np.mean([scene.quality >= 6 for scene in scenes]) <= 0.9
    assert {scene.quality for scene in scenes} == set(range(1, 10))
    assert not any(
        "star" in tags_of(sample_scene(7, "base", i, star_share=0.0)) for i in range(200)
    )


@pytest.mark.parametrize("flaw", FLAWS)
def test_every_flaw_grows_with_its_severity(flaw):
    image = draw(clean(sample_scene(5, "flaw"))).image
    errors = []
    for severity in (0.0, 0.125, 0.5, 1.0):
        spoiled = spoil(image, flaw, severity, numpy_generator(0, Purpose.DEMO, "flaw"))
        assert spoiled.size == image.size
        errors.append(np.abs(np.asarray(spoiled, float) - np.asarray(image, float)).mean())
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[1] > 0.3


def test_watermark_ink_lies_in_its_box_and_nowhere_else():
    checked = 0
    for index in range(30):
        scene = sample_scene(11, index, watermark_share=1.0)
        drawn = draw(scene)
        bare = draw(replace(scene, watermark="")).image
        changed = np.abs(np.asarray(drawn.image, int) - np.asarray(bare, int)).sum(-1) > 0
        y0, x0, y1, x1 = (int(value) for value in drawn.watermark_box)
        inside = changed[y0:y1, x0:x1].sum()
        assert inside == changed.sum()
        assert inside > 20
        checked += 1
    assert checked == 30


def test_words_follow_the_scene():
    for index in range(100):
        scene = sample_scene(2, index)
        words = caption_of(scene, generator(0, Purpose.DEMO, index))
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind}" in words
        other = mutate(scene, generator(0, Purpose.DEMO, "mutate", index))
        assert set(tags_of(other)) != set(tags_of(scene)) or len(scene.shapes) == 2
        assert all(shape.kind in SHAPES for shape in other.shapes)


def test_judgements_follow_true_quality_with_slight_noise(world, truth):
    lines = (world / "labels" / "pairs" / "demo.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == 5 * NUM_IMAGES
    assert len({pair["pair_id"] for pair in pairs}) == len(pairs)
    quality = {row["image_id"]: row["quality"] for row in truth if row["copy_of"] is None}
    junk = {row["image_id"] for row in truth if row["junk"]}
    right = []
    for pair in [*pairs, *judge_pairs(truth, 2000, 7)]:
        assert pair["a"] != pair["b"]
        assert pair["outcome"] in ("a", "b", "tie", "both_junk", "skip")
        if pair["outcome"] == "both_junk":
            assert {pair["a"], pair["b"]} <= junk
        if pair["outcome"] in ("a", "b") and quality[pair["a"]] != quality[pair["b"]]:
            right.append((quality[pair["a"]] > quality[pair["b"]]) == (pair["outcome"] == "a"))
    assert 0.93 < np.mean(right) < 1.0
    wins = Counter(pair[pair["outcome"]] for pair in pairs if pair["outcome"] in ("a", "b"))
    met = Counter(pair[side] for pair in pairs for side in "ab")
    ids = [image_id for image_id in met if image_id not in junk]
    assert spearmanr([wins[i] / met[i] for i in ids], [quality[i] for i in ids]).statistic > 0.8


def test_judgements_of_the_same_truth_are_equal(truth):
    assert judge_pairs(truth, 50, 7) == judge_pairs(truth, 50, 7)


def test_evaluation_prompts_are_fixed_and_unlike_every_training_caption(tmp_path):
    write_prompts(tmp_path / "prompts.csv")
    committed = Path(sys.modules[write_prompts.__module__].__file__).with_name("prompts.csv")
    assert (tmp_path / "prompts.csv").read_bytes() == committed.read_bytes()
    rows = demo_prompts()
    assert tuple(rows[0]) == COLUMNS
    groups = Counter(row["group"] for row in rows)
    assert min(groups["star"], groups["general"]) >= 30, "fewer get no verdict"
    scenes = [world_scene(7, index) for index in range(NUM_WORLD_IMAGES)]
    captions = {
        caption_of(scene, generator(7, Purpose.DEMO, s, i))
        for i, scene in enumerate(scenes)
        for s in range(3)
    }
    lists = {frozenset(tags_of(scene)) for scene in scenes}
    for row in rows:
        words = row["text"].removeprefix("score_8_up, ")
        assert words not in captions
        assert frozenset(words.split(", ")) not in lists
        assert ("star" in words.replace(",", "").split()) == (row["group"] == "star")
        assert int(row["height"]) % 8 == 0
        assert int(row["width"]) % 8 == 0
