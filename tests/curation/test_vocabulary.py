"""A vocabulary is what the tables say of a set's tags, and is read back as it was written."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.curation import vocabulary
from training.curation.vocabulary import Vocabulary
from training.errors import DamageError
from training.tables.schemas import TABLES

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def known(rows):
    table = TABLES["tag_vocabulary"]
    full = [
        {**dict.fromkeys(table.columns), "tag": tag, "category": category, "aliases": aliases}
        for tag, category, aliases in rows
    ]
    return pl.DataFrame(full, schema=table.schema)


def test_categories_and_aliases_of_the_sets_tags_and_words():
    table = known(
        [("1girl", "general", ["sole_female"]), ("looking_left", "general", ["gaze_left"]), ("miku", "character", []),
         ("left_wing_club", "copyright", []), ("unused", "artist", ["x"])]
    )  # fmt: skip
    tags = [
        "1girl",
        "looking_right",
        "looking_left",
        "miku",
        "right_wing_club",
        "letterboxed",
        "unheard_of",
        "6+boys",
    ]
    found = vocabulary.from_tables(table, tags, ["newest"])
    assert found.category == {
        "1girl": "people", "looking_right": "general", "looking_left": "general", "miku": "character",
        "right_wing_club": "copyright", "letterboxed": "meta", "unheard_of": "general", "6+boys": "people",
        "newest": "special",
    }  # fmt: skip
    assert found.aliases == {"1girl": ("sole_female",), "looking_left": ("gaze_left",)}


@settings(max_examples=25)
@given(
    aliases=st.dictionaries(names, st.lists(names, min_size=1, max_size=3).map(tuple), max_size=5)
)
def test_what_is_written_is_read_back_and_equal_ones_have_equal_files(tmp_path_factory, aliases):
    folder = tmp_path_factory.mktemp("vocabulary")
    one = Vocabulary(dict.fromkeys([*aliases, "a"], "general"), aliases)
    backwards = Vocabulary(
        dict(reversed(list(one.category.items()))), dict(reversed(list(aliases.items())))
    )
    sha256 = vocabulary.write(folder / "one.parquet", one)
    assert vocabulary.write(folder / "two.parquet", backwards) == sha256
    assert vocabulary.read(folder / "one.parquet", sha256) == one


def test_a_vocabulary_that_changed_or_is_gone_is_damage(tmp_path):
    path = tmp_path / "vocabulary.parquet"
    sha256 = vocabulary.write(path, Vocabulary({"a": "general"}, {}))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DamageError, match=r"vocabulary\.parquet: .* says SHA-256"):
        vocabulary.read(path, sha256)
    with pytest.raises(DamageError, match="no such file"):
        vocabulary.read(tmp_path / "absent.parquet", sha256)
