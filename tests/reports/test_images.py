"""Images keep to their room, and give way in quality before size."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.reports import images


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    longest=st.integers(16, 256),
    limit=st.integers(1500, 9000),
)
def test_a_image_keeps_to_its_bytes_and_shape_and_is_never_enlarged(height, width, longest, limit):
    noise = np.random.default_rng(height * 201 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    content = images.encode(Image.fromarray(noise), longest, limit)
    assert len(content) <= limit
    with Image.open(io.BytesIO(content)) as found:
        assert max(found.size) <= min(longest, max(height, width))
        scale = max(found.size) / max(height, width)
        assert found.size == pytest.approx((max(width * scale, 1), max(height * scale, 1)), abs=2)


def test_a_image_with_room_keeps_its_size():
    gray = Image.new("RGB", (300, 200), "gray")
    with Image.open(io.BytesIO(images.encode(gray, 512, 60_000))) as found:
        assert found.size == (300, 200)


@pytest.mark.parametrize(("count", "room"), [(1, 40_000), (7, 40_000), (60, 120_000)])
def test_all_rules_together_fit_into_their_room(tmp_path, count, room):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    css, lost = images.rules_of_files(
        [(f"p{n}s0", tmp_path / "a.png") for n in range(count)], 256, room
    )
    assert room / 6 < len(css) <= room
    assert re.findall(r"\.(p\d+s0)\{", css) == [f"p{n}s0" for n in range(count)]
    assert lost == []


def test_images_that_cannot_be_read_have_no_rule_and_are_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    files = [(name, tmp_path / f"{name}.png") for name in ("gone", "a", "cut", "text")]
    css, lost = images.rules_of_files(files, 256, 40_000)
    assert re.findall(r"\.(\w+)\{", css) == ["a"]
    assert sorted(lost) == ["cut", "gone", "text"]


def test_the_room_is_one_of_characters_and_not_of_bytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    # Whole, the image has fewer bytes than there are characters, but base64 makes four characters
    # of three bytes.
    room = int(len(images.encode(Image.fromarray(noise), 64, 1_000_000)) * 1.2)
    assert len(images.rules_of_files([("p", tmp_path / "a.png")], 64, room)[0]) <= room
