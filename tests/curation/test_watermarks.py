"""Thresholds on boxes, over one model or several."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from training.curation import watermarks
from training.tables.schemas import TABLES
from training.tables.table import SCORED_BOX


def box(confidence, y0=0.0):
    return {"y0": y0, "x0": 0.0, "y1": y0 + 1, "x1": 1.0, "confidence": confidence}


def table(*rows):
    return pl.DataFrame(rows, schema=TABLES["watermark_boxes"].schema, orient="row")


def test_boxes_of_all_models_count_from_the_threshold_on():
    found = watermarks.above(
        table(
            ("1", "m", [box(0.3), box(0.29)]),
            ("1", "n", [box(0.9)]),
            ("2", "m", []),
            ("3", "m", [box(0.1)]),
        ),
        0.3,
    )
    assert found.rows() == [("1", [box(0.9), box(0.3)], True), ("2", [], False), ("3", [], False)]
    assert found.schema["boxes"] == pl.List(SCORED_BOX)


def test_nothing_looked_at_is_no_row():
    empty = watermarks.above(table(), 0.3)
    assert empty.is_empty()
    assert empty.schema["boxes"] == pl.List(SCORED_BOX)


@given(st.lists(st.lists(st.floats(0, 1), max_size=4), max_size=6), st.floats(0, 1))
def test_it_is_a_filter(images, threshold):
    rows = [
        (str(i), "m", [box(c, y) for y, c in enumerate(found)]) for i, found in enumerate(images)
    ]
    for image_id, boxes, marked in watermarks.above(table(*rows), threshold).iter_rows():
        expected = [box(c, y) for y, c in enumerate(images[int(image_id)]) if c >= threshold]
        assert boxes == sorted(expected, key=lambda b: (-b["confidence"], b["y0"]))
        assert marked == bool(expected)
