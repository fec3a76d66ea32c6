"""Rules that hold of tables, and what they say when they do not."""

import polars as pl
import pytest

from assets import checks, prompt_sets, sample_images, training_set
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.evaluation.prompt_sets import make_frame
from training.tables.schemas import TABLES

BASIS = {"inputs": {}, "models": {}}


def finding(store, name):
    return getattr(checks, name)(store=store)


def commit(store, stage, key, frame):
    store.writer.commit(stage, key, Made(frame=frame), BASIS, seconds=0)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "foundry.toml").write_text(
        'format = 1\n[encodings.sdxl]\n[prompt_sets.s]\nfile = "x.csv"\n'
    )
    return Store(tmp_path)


@pytest.mark.parametrize(
    ("text", "split", "found"),
    [("A red cat.", "train", True), ("a cat that is red", "train", True), ("Second Tag, first_tag", "train", True),
     ("first tag", "train", False), ("a red cat", "validation", False)],
)  # fmt: skip
def test_a_prompt_that_is_a_caption_a_made_caption_or_the_tags_of_a_training_image_is_found(
    store, text, split, found
):
    tags = [{"name": name, "category": "general"} for name in ("first_tag", "second_tag")]
    row = {"image_id": "0", "split": split, "caption": "a red cat", "made_caption": "a cat that is red", "tags": tags,
           "words": [], "boxes": [], "stable": False}  # fmt: skip
    commit(
        store,
        training_set.training_set,
        "sdxl",
        pl.DataFrame([row], schema=TABLES["training_set"].schema),
    )
    prompt = {
        "prompt_id": "p1",
        "text": text,
        "negative": "",
        "group": "g",
        "height": 8,
        "width": 8,
    }
    commit(store, prompt_sets.prompt_sets, "s", make_frame([prompt]))
    result = finding(store, "prompts_never_trained")
    assert result.passed is not found
    assert result.metadata["found"].text == ("p1" if found else "")


@pytest.mark.parametrize(
    ("digests", "equal"), [(["a", "b"], 0), (["a", "a"], 2), (["a", None, None], 0)]
)
def test_equal_images_are_found_and_those_that_were_not_drawn_are_none(store, digests, equal):
    rows = [{"prompt_id": f"p{number}", "sha256": digest} for number, digest in enumerate(digests)]
    commit(
        store,
        sample_images.sample_images,
        "demo@8",
        pl.DataFrame(rows, schema=TABLES["sample_images"].schema),
    )
    result = finding(store, "images_not_blank")
    assert result.passed is (equal == 0)
    assert result.metadata["equal"].value == equal
