"""Which prompt an image from elsewhere was made from: by id, by what the file says, by a number in
its name."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training.buckets.geometry import Size
from training.config.evaluation import LoraConfig, SamplingConfig
from training.errors import EvaluationError
from training.evaluation import external_images, prompt_sets
from training.sampling import image_prompts
from training.sampling.png_parameters import parameters, write_png
from training.sampling.sampling import file_name

PIXELS = np.zeros((8, 8, 3), dtype=np.uint8)
TEXTS = [
    "a red cat, sitting",
    "a dog <lora:fur:0.7>",
    "fünf Bäume\nNegative space, tall",
    "tree, Steps: many",
]
IDS = ["hands-1", "hands-10", "hands-2", "x y"]


def rows(tmp_path, *names, ids=IDS, texts=TEXTS, model="m"):
    return image_prompts.rows_of(model, [tmp_path / name for name in names], texts, ids)


def test_a_name_that_is_or_begins_with_a_prompts_id_is_that_prompts(tmp_path):
    names = ["hands-10.png", "hands-1.png", "hands-1_00003.webp", "hands-10-42.png", "x y (2).jpg"]
    assert rows(tmp_path, *names) == [1, 0, 0, 1, 3]
    assert rows(tmp_path, *(file_name(prompt_id) for prompt_id in IDS)) == [0, 1, 2, 3]


@given(
    ids=st.lists(
        st.from_regex(r"[a-z0-9]{1,4}(-[a-z0-9]{1,3})?", fullmatch=True), min_size=1, unique=True
    )
)
def test_ids_of_any_form_find_their_rows(ids):
    from pathlib import Path

    texts = [f"prompt {number}" for number in range(len(ids))]
    assert rows(Path("/nowhere"), *(f"{name}.png" for name in ids), ids=ids, texts=texts) == list(
        range(len(ids))
    )


def as_exif(text):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(
        "utf-16-be"
    )  # as A1111's piexif writes it
    return exif


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_the_prompt_that_a1111_writes_into_a_file_is_read(tmp_path, suffix, row):
    # Names say another row, and would have to be numbers.
    path = tmp_path / f"0000{(row + 1) % 4}-123.{suffix}"
    said = f"{TEXTS[row]} <lora:style:1>\nNegative prompt: text\nSteps: 30, Sampler: Euler a, Seed: 1, Size: 8x8"
    if suffix == "png":
        info = PngInfo()
        info.add_itxt("parameters", said)
        Image.fromarray(PIXELS).save(path, pnginfo=info)
    else:
        Image.fromarray(PIXELS).save(path, exif=as_exif(said))
    assert rows(tmp_path, path.name) == [row]


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_the_prompt_that_we_write_is_read(tmp_path, row):
    config = SamplingConfig(loras=(LoraConfig(path="a.safetensors"),))
    said = parameters(TEXTS[row], "", seed=1, size=Size(8, 8), model="m", config=config)
    write_png(tmp_path / "any name.png", PIXELS, said)
    assert rows(tmp_path, "any name.png") == [row]


def test_damaged_files_and_foreign_metadata_are_left_to_the_name(tmp_path):
    (tmp_path / "2.png").write_bytes(b"no image")
    info = PngInfo()
    info.add_text("parameters", "another prompt\nSteps: 3")
    Image.fromarray(PIXELS).save(tmp_path / "1-7.png", pnginfo=info)
    assert rows(tmp_path, "2.png", "1-7.png", "0.png") == [2, 1, 0]


@pytest.mark.parametrize(
    ("model", "names", "expected"),
    [
        ("m", ["00003-1234567.png", "00001-99.png"], [3, 1]),
        ("m", ["seed9_prompt3.png", "seed9_prompt0.png"], [3, 0]),
        ("sdxl-1.0", ["sdxl-1.0-3.png", "sdxl-1.0-2.png"], [3, 2]),
        (
            "mine",
            ["sd15_v2-3.png", "sd15_v2-0.png"],
            [3, 0],
        ),  # the first number is the model's: GhostReview's rule
        ("m", ["3-1.png", "3-2.png", "2-1.png"], [3, 3, 2]),
    ],
)
def test_a_number_in_the_name_is_the_row(tmp_path, model, names, expected):
    assert rows(tmp_path, *names, model=model) == expected


def test_what_nothing_tells_is_named(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"cat\.png: its name is no prompt's id, the file holds no prompt"
    ):
        rows(tmp_path, "hands-1.png", "cat.png")


def test_our_own_prompt_file_and_images_are_scored_as_they_are(tmp_path):
    made = [{"prompt_id": name, "text": text.replace("\n", " "), "negative": "", "group": "g", "height": 8, "width": 8}
            for name, text in zip(IDS, TEXTS, strict=True)]  # fmt: skip
    prompt_sets.write_prompts(tmp_path / "prompts.csv", prompt_sets.make_frame(made))
    read = external_images.read_prompts(tmp_path / "prompts.csv")
    folder = tmp_path / "images" / "run@8"
    folder.mkdir(parents=True)
    for name in IDS:
        Image.fromarray(PIXELS).save(
            folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.png"
        )
    (model,) = external_images.find_models(tmp_path / "images", read)
    by_file = {
        path.name: read.prompt_ids[row] for path, row in zip(model.files, model.rows, strict=True)
    }
    assert by_file == {file_name(name): name for name in IDS}


def test_an_id_that_repeats_is_named(tmp_path):
    pd.DataFrame({"prompt_id": ["a", "a"], "Prompts": ["x", "y"]}).to_csv(
        tmp_path / "p.csv", index=False
    )
    with pytest.raises(
        EvaluationError, match=r"p\.csv:3: prompt_id 'a' is empty or stands above already"
    ):
        external_images.read_prompts(tmp_path / "p.csv")
