"""Bucket plans against their published list, and assignment against a plain loop over all buckets."""

import math
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import BucketConfig
from training.data import buckets, crops
from training.data.geometry import Size
from training.data.tables import TABLES, rejections
from training.errors import ConfigError

# Images per bucket of bigASP's page, width x height.
PAGE = """832x1216 1216x832 832x1152 1152x896 896x1152 768x1344 1024x1024 896x1088 704x1408 1344x768 768x1280 704x1344
960x1088 1152x832 960x1024 1088x896 1024x960 1088x960 1280x768 1344x704 1472x704 1408x704 1600x640 1728x576 1536x640
1664x576"""


def frame(sizes):
    height, width = zip(*sizes, strict=True) if sizes else ((), ())
    ids = [f"{row:064x}" for row in range(len(sizes))]
    return pl.DataFrame(
        {"image_id": ids, "shard": ["s000000"] * len(ids), "height": height, "width": width},
        schema={"image_id": pl.String, "shard": pl.String, "height": pl.Int32, "width": pl.Int32},
    )


def test_bigasp_v1_is_the_list_of_its_page():
    page = {Size(int(h), int(w)) for w, h in (word.split("x") for word in PAGE.split())}
    assert len(page) == 26
    assert buckets.plan("bigasp_v1") == tuple(sorted(page))


@pytest.mark.parametrize("scale", [2, 8, 64])
def test_a_scaled_plan_is_the_plan_divided(scale):
    full = buckets.plan("bigasp_v1")
    assert [(s.height * scale, s.width * scale) for s in buckets.plan("bigasp_v1", scale)] == list(full)


def test_unknown_plan_and_odd_scale_are_refused():
    with pytest.raises(ConfigError, match="nonesuch"):
        buckets.plan("nonesuch")
    with pytest.raises(ConfigError, match="scale=3"):
        buckets.plan("bigasp_v1", 3)


def nearest_by_hand(size, scale):
    distances = [abs(math.log(b.aspect) - math.log(size.width / size.height)) for b in buckets.plan("bigasp_v1", scale)]
    first = next(i for i, d in enumerate(distances) if d <= min(distances) + 1e-12)
    return buckets.plan("bigasp_v1", scale)[first]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(16, 6000), st.integers(16, 6000)), min_size=1, max_size=40),
    scale=st.sampled_from([1, 8]),
)
def test_every_picture_is_placed_in_the_nearest_bucket_or_rejected(sizes, scale):
    placed, rejected = buckets.assign(frame(sizes), BucketConfig(scale=scale))
    assert placed.height + len(rejected) == len(sizes)
    assert TABLES["bucket_assignments"].conform(placed).height == placed.height
    for row in placed.iter_rows(named=True):
        size, bucket = Size(row["height"], row["width"]), Size(row["bucket_height"], row["bucket_width"])
        resized = Size(row["resized_height"], row["resized_width"])
        assert bucket == nearest_by_hand(size, scale)
        assert resized == crops.cover(size, bucket)
        assert resized.height == bucket.height or resized.width == bucket.width
        assert (row["slack_height"], row["slack_width"]) == (
            resized.height - bucket.height,
            resized.width - bucket.width,
        )
        assert row["area_kept"] == pytest.approx(bucket.area / resized.area)
        assert resized.height <= size.height
        assert resized.width <= size.width
    by_id = dict(zip(frame(sizes)["image_id"], sizes, strict=True))
    for row in rejected:
        size = Size(*by_id[row["image_id"]])
        bucket = nearest_by_hand(size, scale)
        assert size.height < bucket.height or size.width < bucket.width
        assert (row["value"], row["limit"]) == (str(size), str(bucket))
    assert rejections("bucket_assignments.sdxl", rejected).height == len(rejected)


@pytest.mark.parametrize("order", [[(1, 2), (2, 1)], [(2, 1), (1, 2)]])
def test_ties_go_to_the_first_in_the_plan(order):
    sizes = np.array(order)
    assert buckets._nearest(np.array([[300, 300], [700, 700]]), sizes).tolist() == [0, 0]


def test_no_pictures_give_no_rows():
    placed, rejected = buckets.assign(frame([]), BucketConfig())
    assert placed.height == 0
    assert rejected == []
    assert placed.schema == TABLES["bucket_assignments"].schema


def test_assignment_is_vectorised():
    rng = np.random.default_rng(0)
    num = 200_000
    many = pl.DataFrame(
        {
            "image_id": [str(i) for i in range(num)],
            "shard": ["s000000"] * num,
            "height": rng.integers(1000, 5000, num).astype(np.int32),
            "width": rng.integers(1000, 5000, num).astype(np.int32),
        }
    )
    started = time.perf_counter()
    placed, rejected = buckets.assign(many, BucketConfig())
    assert placed.height + len(rejected) == num
    assert time.perf_counter() - started < 3.0  # A loop in Python takes 10 s; this takes 0.1 s.
