"""Charts show inline in Dagster, sheets stay small, and both are images that a browser can
draw."""

import base64
import io
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.images import figures

labels = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
values = st.floats(0, 1e9)


def svg_of(markdown):
    assert len(markdown) < 1_000
    head, _, content = markdown.rstrip(")").partition(",")
    assert head.endswith("](data:image/svg+xml;base64")
    return ElementTree.fromstring(base64.b64decode(content))


@given(st.lists(st.tuples(labels, values), min_size=1, max_size=40))
def test_bars_always_show_inline_and_are_valid_svg(counts):
    svg = svg_of(figures.bars(counts))
    shown = [node.text or "" for node in svg if node.tag.endswith("text")]
    assert all(any(label.startswith(text) for label, _ in counts) for text in shown)


def test_few_bars_keep_all_their_labels_and_their_heights():
    svg = svg_of(figures.bars([("a<b&", 1), ("896×1152", 4), ("none", 0)]))
    assert [node.text for node in svg if node.tag.endswith("text")] == ["a<b&", "896×1152", "none"]
    path = next(node for node in svg if node.tag.endswith("path")).get("d")
    assert path == "M0 60v-15h85v15M100 60v-60h85v60"


def test_long_labels_are_not_cut_at_the_ends_of_the_chart():
    svg = svg_of(figures.bars([(f"{number}04×152", 12 - number) for number in range(1, 9)]))
    texts = [node for node in svg if node.tag.endswith("text")]
    assert len(texts) == 8
    assert float(texts[0].get("x")) >= 2.3 * len(texts[0].text)
    assert float(texts[-1].get("x")) <= 300 - 2.3 * len(texts[-1].text)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32)))
def test_histograms_show_inline_whatever_the_values(numbers):
    markdown = figures.histogram(numbers)
    finite = [number for number in numbers if math.isfinite(number)]
    if not finite:
        assert markdown == "nothing to show"
        return
    texts = [node.text for node in svg_of(markdown) if node.tag.endswith("text")]
    # As numbers: of 0.0 and -0.0 either is the smallest.
    assert [float(text) for text in texts] == [
        float(f"{end:.4g}") for end in (min(finite), max(finite))
    ]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500))
def test_sparklines_stay_inside_their_frame(numbers):
    svg = svg_of(figures.sparkline(numbers))
    line = next(node for node in svg if node.tag.endswith("polyline")).get("points")
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert all(0 <= x <= 300 and 2 <= y <= 58 for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@pytest.mark.parametrize("count", [1, 3, 8, 16, 96])
def test_a_contact_sheet_holds_all_images_within_its_limit(count):
    rng = np.random.default_rng(count)
    pictures = [
        rng.integers(0, 256, (40 + 7 * n % 90, 130, 3), dtype=np.uint8) for n in range(count)
    ]
    markdown = figures.contact_sheet(
        pictures, [f"caption {n} that is far too long to fit" for n in range(count)]
    )
    assert len(markdown) <= figures.MAX_SHEET
    image = Image.open(io.BytesIO(base64.b64decode(markdown.rstrip(")").partition(",")[2])))
    assert image.format == "JPEG"
    columns = min(count, 8)
    assert image.width / image.height == pytest.approx(
        (columns * 100 + 4) / (-(-count // 8) * 113 + 4), rel=0.02
    )


def test_images_keep_their_shape_and_their_place():
    red, blue = (
        np.full(shape, colour, np.uint8)
        for shape, colour in (((10, 40, 3), (255, 0, 0)), ((64, 16, 3), (0, 0, 255)))
    )
    markdown = figures.contact_sheet([red, blue])
    sheet = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(markdown.rstrip(")").partition(",")[2]))).convert(
            "RGB"
        )
    )
    assert sheet.shape == (104, 204, 3)
    assert sheet[52, 52, 0] > 230
    assert sheet[52, 52, 2] < 30
    assert sheet[20, 52].min() > 230  # a flat image leaves paper above it
    assert sheet[20, 152, 2] > 230
    assert sheet[52, 110].min() > 230


def test_nothing_gives_words_and_not_an_error():
    assert figures.contact_sheet([]) == "no images"
    assert figures.bars([]) == figures.histogram([]) == figures.sparkline([]) == "nothing to show"


def test_figures_and_sheets_leave_torch_alone():
    code = "import sys, training.images.figures, training.reports.contact_sheet; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shares_stand_in_pairs_with_their_percentages():
    svg = svg_of(figures.shares([("75", 0.5, 0.25), ("150", 0.5, 0.75)]))
    assert [node.text for node in svg if node.tag.endswith("text")] == [
        "75: 50% of 25%",
        "150: 50% of 75%",
    ]
    path = next(node for node in svg if node.tag.endswith("path")).get("d")
    assert [int(part.split("h")[0]) for part in path.split("v-")[1:]] == [40, 20, 40, 60]
