"""A source's own sentence comes before a model's."""

import polars as pl

from training.data import captions
from training.data.tables import TABLES


def test_sentences_of_sources_stand_once_per_image():
    listing = pl.DataFrame(
        {"source": ["s"] * 4, "source_id": list("abcd"), "caption": [None, "second", "third", None]},
    )
    raw = pl.DataFrame({"source": ["s"] * 5, "source_id": list("abcde"), "image_id": ["1", "1", "1", "2", "3"]})
    found = captions.from_sources(listing, raw)
    assert found.rows() == [("1", "sidecar", "second"), ("2", "sidecar", None), ("3", "sidecar", None)]


def table(*rows):
    return pl.DataFrame(rows, schema=TABLES["captions"].schema, orient="row")


def test_the_sources_own_sentence_wins_and_empty_ones_never_do():
    rows = [
        ("1", "blip", "made"), ("1", "sidecar", "given"), ("2", "sidecar", None), ("2", "zoe", "z"),
        ("2", "blip", "b"), ("3", "sidecar", "  "), ("4", "blip", ""), ("4", "zoe", "z"),
    ]  # fmt: skip
    found = captions.choose(table(*rows))
    assert found.rows() == [("1", "given"), ("2", "b"), ("4", "z")]
    assert captions.choose(table()).is_empty()
