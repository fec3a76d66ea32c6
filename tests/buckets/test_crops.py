"""Placements cover, stay inside and invert; pixels, conditioning and boxes agree on where things
are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.buckets import crops
from training.buckets.geometry import Box, Placement, Size
from training.buckets.plans import BucketConfig, plan
from training.errors import DataError
from training.images import saliency

bucket_sizes = st.sampled_from(plan(BucketConfig(scale=8)))
margins = st.tuples(st.integers(0, 400), st.integers(0, 400))


@given(
    bucket=bucket_sizes,
    margin=margins,
    mode=st.sampled_from(["random", "centre", "subject"]),
    seed=st.integers(0, 2**40),
    box=st.none() | st.tuples(*[st.floats(0, 1)] * 4),
    avoid=st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=3),
)
def test_a_placement_covers_the_bucket_and_stays_inside(bucket, margin, mode, seed, box, avoid):
    original = Size(bucket.height + margin[0], bucket.width + margin[1])
    importance = np.random.default_rng(seed).random((7, 5), dtype=np.float32)
    p = crops.place(
        original,
        bucket,
        "a",
        crops.CropPolicy(mode=mode, seed=seed, generation=0),
        crops.CropTarget(
            crop_box=None if box is None else box_of(original, box),
            avoid=[box_of(original, item) for item in avoid],
            importance=importance,
        ),
    )
    assert p.resized.height == bucket.height or p.resized.width == bucket.width
    assert 0 <= p.crop_top <= p.resized.height - bucket.height
    assert 0 <= p.crop_left <= p.resized.width - bucket.width
    assert p.resized.height <= original.height
    assert p.resized.width <= original.width
    assert (p.pad_top, p.pad_left, p.padded) == (0, 0, False)


def box_of(size, fractions):
    y, x = sorted((fractions[0], fractions[2])), sorted((fractions[1], fractions[3]))
    return Box(y[0] * size.height, x[0] * size.width, y[1] * size.height, x[1] * size.width)


@given(
    bucket=bucket_sizes,
    size=st.tuples(st.integers(40, 900), st.integers(40, 900)),
    upscale=st.booleans(),
)
def test_a_padded_image_lies_whole_in_the_middle_of_its_bucket(bucket, size, upscale):
    p = crops.place(
        Size(*size),
        bucket,
        "a",
        crops.CropPolicy(mode="random", seed=0, generation=0, upscale=upscale),
        crops.CropTarget(padded=True),
    )
    assert p.resized.height <= bucket.height
    assert p.resized.width <= bucket.width
    assert upscale or (p.resized.height <= size[0] and p.resized.width <= size[1])
    if upscale or size[0] >= bucket.height or size[1] >= bucket.width:
        assert p.resized.height == bucket.height or p.resized.width == bucket.width
    assert (p.crop_top, p.crop_left) == (0, 0)
    for pad, side in ((p.pad_top, 0), (p.pad_left, 1)):
        assert 0 <= bucket[side] - p.resized[side] - 2 * pad <= 1
    shape = np.array(p.resized) / np.array(size)
    assert abs(shape[0] / shape[1] - 1) <= 1 / min(p.resized) + 1 / min(size), (
        "one scale for both sides"
    )


def test_the_random_crop_is_keyed_by_generation_and_image():
    def offsets(generation, image_id, seed=0):
        p = crops.place(
            Size(600, 900),
            Size(128, 128),
            image_id,
            crops.CropPolicy(mode="random", seed=seed, generation=generation),
        )
        return p.crop_top, p.crop_left

    assert offsets(1, "a") == offsets(1, "a")
    drawn = {offsets(g, i, s) for g in range(3) for i in "abc" for s in range(2)}
    assert len(drawn) > 10
    assert {top for top, _ in drawn} == {0}


def test_random_crops_reach_both_ends_of_the_slack():
    original, bucket = Size(128, 132), Size(128, 128)
    lefts = {
        crops.place(
            original, bucket, "a", crops.CropPolicy(mode="random", seed=0, generation=g)
        ).crop_left
        for g in range(80)
    }
    assert lefts == {0, 1, 2, 3, 4}


def test_centre_halves_the_overhang():
    p = crops.place(
        Size(256, 301), Size(128, 128), "a", crops.CropPolicy(mode="centre", seed=0, generation=0)
    )
    assert p == Placement(Size(256, 301), Size(128, 151), 0, 11, Size(128, 128), False)


def test_a_crop_box_wins_and_is_kept_inside_when_it_fits():
    original, bucket = Size(256, 800), Size(128, 128)
    box = Box(100, 600, 120, 660)
    p = crops.place(
        original,
        bucket,
        "a",
        crops.CropPolicy(mode="random", seed=0, generation=3),
        crops.CropTarget(crop_box=box),
    )
    mapped = crops.map_box(box, p)
    assert mapped is not None
    assert mapped.x1 - mapped.x0 == pytest.approx(30)
    assert (mapped.x0 + mapped.x1) / 2 == pytest.approx(64, abs=0.5)


def test_growing_is_refused():
    with pytest.raises(DataError, match="127x500 px is smaller than its bucket of 128x128"):
        crops.place(
            Size(127, 500),
            Size(128, 128),
            "a",
            crops.CropPolicy(mode="centre", seed=0, generation=0),
        )


@settings(max_examples=40, deadline=None)
@given(
    bucket=bucket_sizes,
    margin=margins,
    generation=st.integers(0, 5),
    flip=st.booleans(),
    padded=st.booleans(),
)
def test_conditioning_inverts_to_the_source_pixel(bucket, margin, generation, flip, padded):
    original = Size(bucket.height + margin[0], bucket.width + margin[1])
    # Red holds the row, green the column: each pixel says where in the source it was.
    y, x = np.mgrid[0 : original.height, 0 : original.width]
    pixels = np.zeros((*original, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (
        y * 255 // (original.height - 1),
        x * 255 // (original.width - 1),
    )
    p = crops.place(
        original,
        bucket,
        "a",
        crops.CropPolicy(mode="random", seed=1, generation=generation, flip=flip),
        crops.CropTarget(padded=padded),
    )
    cut = crops.apply(pixels, p)
    assert cut.shape == (*bucket, 3)
    assert cut.flags.c_contiguous
    for row, column in (
        (4, 5),
        (bucket.height // 2, bucket.width // 3),
        (bucket.height - 5, bucket.width - 5),
    ):
        unflipped = bucket.width - 1 - column if flip else column
        if not (
            4 <= row - p.pad_top < p.resized.height - 4
            and 4 <= unflipped - p.pad_left < p.resized.width - 4
        ):
            continue
        source_y = (p.crop_top + row - p.pad_top + 0.5) * original.height / p.resized.height - 0.5
        source_x = (
            p.crop_left + unflipped - p.pad_left + 0.5
        ) * original.width / p.resized.width - 0.5
        assert cut[row, column, 0] == pytest.approx(source_y * 255 / (original.height - 1), abs=2.5)
        assert cut[row, column, 1] == pytest.approx(source_x * 255 / (original.width - 1), abs=2.5)


def test_pixels_are_those_of_pillows_lanczos():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    p = Placement(Size(200, 300), Size(128, 192), 0, 7, Size(128, 128), True)
    whole = Image.fromarray(pixels).resize((192, 128), Image.Resampling.LANCZOS)
    expected = whole.crop((7, 0, 135, 128)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(crops.apply(pixels, p), np.asarray(expected))


def test_a_image_of_another_size_is_refused():
    p = crops.place(
        Size(200, 300), Size(128, 128), "a", crops.CropPolicy(mode="centre", seed=0, generation=0)
    )
    with pytest.raises(DataError, match="300x200"):
        crops.apply(np.zeros((300, 200, 3), np.uint8), p)


@given(
    bucket=bucket_sizes,
    over=st.tuples(st.integers(0, 63), st.integers(0, 63)),
    mode=st.sampled_from(["random", "centre", "subject"]),
    box=st.none() | st.tuples(*[st.floats(0, 1)] * 4),
    generation=st.integers(0, 5),
)
def test_a_image_that_keeps_its_size_is_cut_along_both_sides(bucket, over, mode, box, generation):
    own = Size(bucket.height + over[0], bucket.width + over[1])
    p = crops.place(
        own,
        bucket,
        "a",
        crops.CropPolicy(mode=mode, seed=0, generation=generation),
        crops.CropTarget(
            resized=own,
            crop_box=None if box is None else box_of(own, box),
            importance=np.ones((7, 5), np.float32),
        ),
    )
    assert p.resized == own
    assert 0 <= p.crop_top <= over[0]
    assert 0 <= p.crop_left <= over[1]
    if mode == "centre" and box is None:
        assert (p.crop_top, p.crop_left) == (over[0] // 2, over[1] // 2)
    pixels = np.random.default_rng(generation).integers(0, 256, (*own, 3), dtype=np.uint8)
    shown = pixels[
        p.crop_top : p.crop_top + bucket.height, p.crop_left : p.crop_left + bucket.width
    ]
    assert np.array_equal(crops.apply(pixels, p), shown), "not resized at all"


def test_random_crops_along_both_sides_reach_all_corners():
    own, bucket = Size(130, 131), Size(128, 128)
    corners = {
        (p.crop_top, p.crop_left)
        for p in (
            crops.place(
                own,
                bucket,
                "a",
                crops.CropPolicy(mode="random", seed=0, generation=g),
                crops.CropTarget(resized=own),
            )
            for g in range(200)
        )
    }
    assert corners == {(top, left) for top in range(3) for left in range(4)}


@settings(max_examples=40, deadline=None)
@given(bucket=bucket_sizes, generation=st.integers(0, 20), flip=st.booleans(), padded=st.booleans())
def test_a_mapped_box_is_where_the_pixels_are(bucket, generation, flip, padded):
    original = Size(bucket.height * 2, bucket.width * 2 + 60)
    box = Box(original.height // 4, original.width // 3, original.height // 2, original.width // 2)
    pixels = np.zeros((*original, 3), np.uint8)
    pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = 255
    p = crops.place(
        original,
        bucket,
        "b",
        crops.CropPolicy(mode="random", seed=2, generation=generation, flip=flip),
        crops.CropTarget(padded=padded),
    )
    mapped = crops.map_box(box, p)
    assert mapped is not None
    rows, columns = np.nonzero(crops.apply(pixels, p)[..., 0] > 190)  # the padding is 128
    assert mapped == pytest.approx(
        (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1), abs=1.0
    )


@settings(max_examples=40, deadline=None)
@given(
    bucket=bucket_sizes, margin=margins, generation=st.integers(0, 20), flip=st.booleans(), padded=st.booleans(),
    cut=st.booleans(),
)  # fmt: skip
def test_the_told_crop_is_where_a_marker_lies_in_the_whole_image_as_it_is_seen(
    bucket, margin, generation, flip, padded, cut
):
    original = Size(bucket.height + margin[0], bucket.width + margin[1])
    p = crops.place(
        original,
        bucket,
        "c",
        crops.CropPolicy(mode="random", seed=3, generation=generation, flip=flip),
        crops.CropTarget(padded=padded, resized=original if cut else None),
    )
    # One pixel of the resized image, so that nothing is blurred: the marker lies in the middle of
    # what is kept.
    row, column = (
        p.crop_top + bucket.height // 2 - p.pad_top,
        p.crop_left + bucket.width // 3 - p.pad_left,
    )
    whole = np.zeros((*p.resized, 3), np.uint8)
    whole[row, column] = 255
    seen = whole[:, ::-1] if flip else whole
    encoded = crops.apply(whole, p._replace(original=p.resized))
    (y, x), (whole_y, whole_x) = (np.argwhere(image[..., 0] == 255)[0] for image in (encoded, seen))
    pad_left = bucket.width - p.resized.width - p.pad_left if flip else p.pad_left
    pads = (p.pad_top, pad_left) if padded else (0, 0)
    assert crops.told_crop(p, 2) == (whole_y - y + pads[0], whole_x - x + pads[1])


def test_what_was_cut_off_a_mirrored_image_on_the_left():
    # 1,280 wide for a bucket of 832: 21 columns are cut off on the left, 427 on the right, which is
    # the left mirrored.
    p = Placement(Size(2000, 2105), Size(1216, 1280), 0, 21, Size(1216, 832), False)
    assert [crops.told_crop(p, version) for version in (1, 2)] == [(0, 21), (0, 21)]
    assert [crops.told_crop(p._replace(flip=True), version) for version in (1, 2)] == [
        (0, 21),
        (0, 427),
    ]


def test_a_box_outside_of_the_crop_is_gone():
    p = Placement(Size(100, 200), Size(100, 200), 0, 100, Size(100, 100), False)
    assert crops.map_box(Box(0, 0, 50, 100), p) is None
    assert crops.map_box(Box(-5, 90, 50, 500), p) == Box(0, 0, 50, 100)


def test_padding_is_grey_on_both_sides_and_nowhere_else():
    p = crops.place(
        Size(200, 100),
        Size(128, 96),
        "a",
        crops.CropPolicy(mode="random", seed=0, generation=0),
        crops.CropTarget(padded=True),
    )
    assert p == Placement(
        Size(200, 100), Size(128, 64), 0, 0, Size(128, 96), False, pad_top=0, pad_left=16
    )
    cut = crops.apply(np.full((200, 100, 3), 7, np.uint8), p)
    assert (cut[:, :16] == 128).all()
    assert (cut[:, 80:] == 128).all()
    assert (cut[:, 16:80] == 7).all()


def test_a_watermark_is_kept_out_where_the_slack_allows_it():
    original, bucket = Size(128, 320), Size(128, 128)
    mark = Box(100, 140, 120, 180)  # in the middle: only crops left or right of it are without
    seen = set()
    for generation in range(40):
        for mode in ("random", "centre"):
            p = crops.place(
                original,
                bucket,
                "a",
                crops.CropPolicy(mode=mode, seed=0, generation=generation),
                crops.CropTarget(avoid=[mark]),
            )
            assert crops.map_box(mark, p) is None
            seen.add(p.crop_left)
    assert min(seen) < 12
    assert max(seen) >= 180
    assert len(seen) > 10, "what is left of the slack is still drawn from"
    wide = Box(0, 0, 20, 320)  # unavoidable: everything is as good as anything
    free = {
        crops.place(
            original,
            bucket,
            "a",
            crops.CropPolicy(mode="random", seed=0, generation=g),
            crops.CropTarget(avoid=[wide]),
        ).crop_left
        for g in range(40)
    }
    assert max(free) - min(free) > 150
    big_and_small = [Box(0, 0, 128, 100), Box(0, 280, 16, 320)]
    p = crops.place(
        original,
        bucket,
        "a",
        crops.CropPolicy(mode="centre", seed=0, generation=0),
        crops.CropTarget(avoid=big_and_small),
    )
    assert [crops.map_box(box, p) for box in big_and_small] == [None, None]
    assert p.crop_left == 100


def test_what_stands_out_stays_in_the_crop():
    """The head of a tall portrait, which a centre crop would cut, and a thing at the right end of a
    wide image."""
    rng = np.random.default_rng(0)
    tall = np.full((600, 200, 3), 90, np.uint8)
    tall[40:130, 60:140] = rng.integers(0, 256, (90, 80, 3))
    wide = np.full((200, 700, 3), 160, np.uint8)
    wide[90:140, 600:660] = rng.integers(0, 256, (50, 60, 3))
    for pixels, box in ((tall, Box(40, 60, 130, 140)), (wide, Box(90, 600, 140, 660))):
        original, bucket = Size(*pixels.shape[:2]), Size(128, 128)
        importance = saliency.importance(pixels)
        offsets = set()
        for generation in range(20):
            p = crops.place(
                original,
                bucket,
                "a",
                crops.CropPolicy(mode="subject", seed=0, generation=generation),
                crops.CropTarget(importance=importance),
            )
            offsets.add((p.crop_top, p.crop_left))
            mapped = crops.map_box(box, p)
            scale = p.resized.height / original.height
            area = (box.y1 - box.y0) * (box.x1 - box.x0) * scale * scale
            assert (mapped.y1 - mapped.y0) * (mapped.x1 - mapped.x0) > 0.9 * area
        assert len(offsets) > 1, "generations still differ"
        centre = crops.place(
            original, bucket, "a", crops.CropPolicy(mode="centre", seed=0, generation=0)
        )
        assert crops.map_box(box, centre) is None
    with pytest.raises(DataError, match="needs the image's importance map"):
        crops.place(
            Size(600, 200),
            Size(128, 128),
            "a",
            crops.CropPolicy(mode="subject", seed=0, generation=0),
        )


def test_upscaling_covers_the_bucket_when_it_is_allowed():
    p = crops.place(
        Size(60, 90),
        Size(128, 128),
        "a",
        crops.CropPolicy(mode="centre", seed=0, generation=0, upscale=True),
    )
    assert (p.resized, p.crop_left) == (Size(128, 192), 32)
