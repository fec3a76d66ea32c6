"""A source's own sentence and a model's are kept apart."""

import polars as pl

from training.curation import captions
from training.tables.schemas import TABLES


def test_sentences_of_sources_stand_once_per_image():
    listing = pl.DataFrame(
        {
            "source": ["s"] * 4,
            "source_id": list("abcd"),
            "caption": [None, "second", "third", None],
        },
    )
    raw = pl.DataFrame(
        {"source": ["s"] * 5, "source_id": list("abcde"), "image_id": ["1", "1", "1", "2", "3"]}
    )
    found = captions.from_sources(listing, raw)
    assert found.rows() == [
        ("1", "sidecar", "second"),
        ("2", "sidecar", None),
        ("3", "sidecar", None),
    ]


def table(*rows):
    return pl.DataFrame(rows, schema=TABLES["captions"].schema, orient="row")


def test_an_image_has_its_own_sentence_and_one_that_a_model_made_and_no_empty_ones():
    rows = [
        ("1", "blip", "made"), ("1", "sidecar", "given"), ("2", "sidecar", None), ("2", "zoe", "z"),
        ("2", "blip", "b"), ("3", "sidecar", "  "), ("4", "blip", ""), ("4", "zoe", "z"), ("5", "sidecar", "only"),
    ]  # fmt: skip
    found = captions.choose(table(*rows))
    assert found.columns == ["image_id", "caption", "made_caption"]
    assert found.rows() == [
        ("1", "given", "made"),
        ("2", None, "b"),
        ("4", None, "z"),
        ("5", "only", None),
    ]
    assert captions.choose(table()).is_empty()
