"""Placements cover, stay inside and invert; pixels, conditioning and boxes agree on where things are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.data import buckets, crops
from training.data.geometry import Box, Placement, Size
from training.errors import DataError

bucket_sizes = st.sampled_from(buckets.plan("bigasp_v1", 8))
margins = st.tuples(st.integers(0, 400), st.integers(0, 400))


@given(
    bucket=bucket_sizes,
    margin=margins,
    mode=st.sampled_from(["random", "centre"]),
    seed=st.integers(0, 2**40),
    box=st.none() | st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_placement_covers_the_bucket_and_stays_inside(bucket, margin, mode, seed, box):
    original = Size(bucket.height + margin[0], bucket.width + margin[1])
    crop_box = None
    if box is not None:
        y, x = sorted((box[0], box[2])), sorted((box[1], box[3]))
        h, w = original
        crop_box = Box(y[0] * h, x[0] * w, y[1] * h, x[1] * w)
    p = crops.place(original, bucket, mode=mode, seed=seed, generation=0, image_id="a", crop_box=crop_box)
    assert p.resized.height == bucket.height or p.resized.width == bucket.width
    assert 0 <= p.crop_top <= p.resized.height - bucket.height
    assert 0 <= p.crop_left <= p.resized.width - bucket.width
    assert p.resized.height <= original.height
    assert p.resized.width <= original.width


def test_the_random_crop_is_keyed_by_generation_and_image():
    def offsets(generation, image_id, seed=0):
        p = crops.place(
            Size(600, 900), Size(128, 128), mode="random", seed=seed, generation=generation, image_id=image_id
        )
        return p.crop_top, p.crop_left

    assert offsets(1, "a") == offsets(1, "a")
    drawn = {offsets(g, i, s) for g in range(3) for i in "abc" for s in range(2)}
    assert len(drawn) > 10
    assert {top for top, _ in drawn} == {0}


def test_random_crops_reach_both_ends_of_the_slack():
    original, bucket = Size(128, 132), Size(128, 128)
    lefts = {
        crops.place(original, bucket, mode="random", seed=0, generation=g, image_id="a").crop_left for g in range(80)
    }
    assert lefts == {0, 1, 2, 3, 4}


def test_centre_halves_the_overhang():
    p = crops.place(Size(256, 301), Size(128, 128), mode="centre", seed=0, generation=0, image_id="a")
    assert p == Placement(Size(256, 301), Size(128, 151), 0, 11, Size(128, 128), False)


def test_a_crop_box_wins_and_is_kept_inside_when_it_fits():
    original, bucket = Size(256, 800), Size(128, 128)
    box = Box(100, 600, 120, 660)
    p = crops.place(original, bucket, mode="random", seed=0, generation=3, image_id="a", crop_box=box)
    mapped = crops.map_box(box, p)
    assert mapped is not None
    assert mapped.x1 - mapped.x0 == pytest.approx(30)
    assert (mapped.x0 + mapped.x1) / 2 == pytest.approx(64, abs=0.5)


def test_growing_is_refused():
    with pytest.raises(DataError, match="127x500 px is smaller than its bucket of 128x128"):
        crops.place(Size(127, 500), Size(128, 128), mode="centre", seed=0, generation=0, image_id="a")


@settings(max_examples=40, deadline=None)
@given(bucket=bucket_sizes, margin=margins, generation=st.integers(0, 5), flip=st.booleans())
def test_conditioning_inverts_to_the_source_pixel(bucket, margin, generation, flip):
    original = Size(bucket.height + margin[0], bucket.width + margin[1])
    # Red holds the row, green the column: each pixel says where in the source it was.
    y, x = np.mgrid[0 : original.height, 0 : original.width]
    pixels = np.zeros((*original, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = y * 255 // (original.height - 1), x * 255 // (original.width - 1)
    p = crops.place(original, bucket, mode="random", seed=1, generation=generation, image_id="a", flip=flip)
    cut = crops.apply(pixels, p)
    assert cut.shape == (*bucket, 3)
    assert cut.flags.c_contiguous
    for row, column in ((4, 5), (bucket.height // 2, bucket.width // 3), (bucket.height - 5, bucket.width - 5)):
        unflipped = bucket.width - 1 - column if flip else column
        source_y = (p.crop_top + row + 0.5) * original.height / p.resized.height - 0.5
        source_x = (p.crop_left + unflipped + 0.5) * original.width / p.resized.width - 0.5
        assert cut[row, column, 0] == pytest.approx(source_y * 255 / (original.height - 1), abs=2.5)
        assert cut[row, column, 1] == pytest.approx(source_x * 255 / (original.width - 1), abs=2.5)


def test_pixels_are_those_of_pillows_lanczos():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    p = Placement(Size(200, 300), Size(128, 192), 0, 7, Size(128, 128), True)
    whole = Image.fromarray(pixels).resize((192, 128), Image.Resampling.LANCZOS)
    expected = whole.crop((7, 0, 135, 128)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(crops.apply(pixels, p), np.asarray(expected))


def test_a_picture_of_another_size_is_refused():
    p = crops.place(Size(200, 300), Size(128, 128), mode="centre", seed=0, generation=0, image_id="a")
    with pytest.raises(DataError, match="300x200"):
        crops.apply(np.zeros((300, 200, 3), np.uint8), p)


@settings(max_examples=40, deadline=None)
@given(bucket=bucket_sizes, generation=st.integers(0, 20), flip=st.booleans())
def test_a_mapped_box_is_where_the_pixels_are(bucket, generation, flip):
    original = Size(bucket.height * 2, bucket.width * 2 + 60)
    box = Box(original.height // 4, original.width // 3, original.height // 2, original.width // 2)
    pixels = np.zeros((*original, 3), np.uint8)
    pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = 255
    p = crops.place(original, bucket, mode="random", seed=2, generation=generation, image_id="b", flip=flip)
    mapped = crops.map_box(box, p)
    assert mapped is not None
    rows, columns = np.nonzero(crops.apply(pixels, p)[..., 0] > 127)
    assert mapped == pytest.approx((rows.min(), columns.min(), rows.max() + 1, columns.max() + 1), abs=1.0)


def test_a_box_outside_of_the_crop_is_gone():
    p = Placement(Size(100, 200), Size(100, 200), 0, 100, Size(100, 100), False)
    assert crops.map_box(Box(0, 0, 50, 100), p) is None
    assert crops.map_box(Box(-5, 90, 50, 500), p) == Box(0, 0, 50, 100)
