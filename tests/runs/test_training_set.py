"""A frozen set has both captions, and turns left and right with its mirrored images."""

import polars as pl
import pytest

from training.curation.tags import swap_sides
from training.errors import DataError
from training.runs.training_set import freeze
from training.tables.schemas import TABLES


def selected(**changes):
    table = TABLES["selected_images"]
    row = {
        **dict.fromkeys(table.columns), "image_id": "a" * 64, "shard": "s000000", "height": 90, "width": 80,
        "kept": True, "split": "train", "stable": False, "tags": [], "words": [], "boxes": [], "flip": False, **changes,
    }  # fmt: skip
    return pl.DataFrame([row], schema=table.schema)


def frozen(row, padded=False):
    side = pl.lit(64, pl.Int32)
    assigned = row.select("image_id", bucket_height=side, bucket_width=side, padded=pl.lit(padded))
    return freeze(row, assigned, row.select("image_id")).row(0, named=True)


def tags(*names):
    return [{"name": name, "category": "general"} for name in names]


def test_both_captions_and_tags_of_a_mirrored_image_are_turned():
    row = selected(
        flip=True,
        caption="Left of it",
        made_caption="the right hand",
        tags=tags("looking_left", "looking_right", "on_left", "sky"),
    )
    found = frozen(row)
    assert (found["caption"], found["made_caption"]) == ("Right of it", "the left hand")
    assert found["tags"] == tags("looking_left", "looking_right", "on_right", "sky")


def test_others_stay_as_they_are_and_padding_is_a_tag():
    row = selected(caption="left", tags=tags("on_left"))
    assert (frozen(row)["caption"], frozen(row)["made_caption"], frozen(row)["tags"]) == (
        "left",
        None,
        tags("on_left"),
    )
    assert [tag["name"] for tag in frozen(row, padded=True)["tags"]] == ["on_left", "letterboxed"]


def test_sides_are_whole_words():
    assert swap_sides("Left, leftover right_arm RIGHT") == "Right, leftover left_arm LEFT"


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="no training image is left"):
        frozen(selected(split="validation"))
