"""Bucket plans against their published list, and assignment against a plain loop over all
buckets."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.buckets import bucket_assignments, crops, plans
from training.buckets.geometry import Size
from training.buckets.plans import BucketConfig, UpCropConfig, plan
from training.tables.schemas import TABLES, rejections
from training.tables.table import Reason


def frame(sizes):
    height, width = zip(*sizes, strict=True) if sizes else ((), ())
    ids = [f"{row:064x}" for row in range(len(sizes))]
    return pl.DataFrame(
        {"image_id": ids, "shard": ["s000000"] * len(ids), "height": height, "width": width},
        schema={"image_id": pl.String, "shard": pl.String, "height": pl.Int32, "width": pl.Int32},
    )


def nearest_by_hand(size, sizes):
    distances = [abs(math.log(b.aspect) - math.log(size.width / size.height)) for b in sizes]
    first = next(i for i, d in enumerate(distances) if d <= min(distances) + 1e-12)
    return sizes[first]


def covers(size, bucket):
    return size.height >= bucket.height and size.width >= bucket.width


CONFIGS = [
    BucketConfig(),
    BucketConfig(scale=8),
    BucketConfig(plan="sdxl_paper"),
    BucketConfig(plan="kohya", max_side=2048),
    BucketConfig(plan="arb"),
    BucketConfig(plan="custom", sizes=((512, 512), (256, 768))),
]


@settings(max_examples=80)
@given(
    sizes=st.lists(
        st.tuples(st.integers(16, 6000), st.integers(16, 6000)), min_size=1, max_size=40
    ),
    config=st.sampled_from(CONFIGS),
    grow=st.booleans(),
)
def test_every_image_is_placed_in_the_nearest_bucket_it_covers_or_rejected(sizes, config, grow):
    config = replace(config, allow_upscale=grow)
    placed, rejected = bucket_assignments.assign(frame(sizes), config)
    assert placed.height + len(rejected) == len(sizes)
    assert TABLES["bucket_assignments"].conform(placed).height == placed.height
    plan = plans.plan(config)
    for row in placed.iter_rows(named=True):
        size, bucket = (
            Size(row["height"], row["width"]),
            Size(row["bucket_height"], row["bucket_width"]),
        )
        resized = Size(row["resized_height"], row["resized_width"])
        mine = [item for item in plan if covers(size, item)]
        assert bucket == nearest_by_hand(size, mine or plan)
        assert mine or grow
        assert resized == crops.cover(size, bucket, upscale=grow)
        assert resized.height == bucket.height or resized.width == bucket.width
        assert covers(resized, bucket)
        assert (row["slack_height"], row["slack_width"]) == (
            resized.height - bucket.height,
            resized.width - bucket.width,
        )
        assert row["area_kept"] == pytest.approx(bucket.area / resized.area)
        assert grow or covers(size, resized)
    by_id = dict(zip(frame(sizes)["image_id"], sizes, strict=True))
    for row in rejected:
        size = Size(*by_id[row["image_id"]])
        if row["reason"] == Reason.NO_BUCKET:
            assert config.plan == "arb"
            assert float(row["value"]) > float(row["limit"]) == 4
        else:
            assert not grow
            assert not any(covers(size, item) for item in plan)
            assert (row["value"], row["limit"]) == (str(size), str(nearest_by_hand(size, plan)))
    assert rejections("bucket_assignments.sdxl", rejected).height == len(rejected)


def test_a_image_just_too_small_for_the_nearest_bucket_takes_the_next_it_covers():
    placed, _ = bucket_assignments.assign(frame([(1020, 1030)]), BucketConfig())
    assert placed.select("bucket_height", "bucket_width").row(0) == (960, 1024)


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=30))
def test_without_upscaling_kohya_cuts_each_image_to_its_own_steps(sizes):
    config = BucketConfig(plan="kohya", no_upscale=True)
    placed, rejected = bucket_assignments.assign(frame(sizes), config)
    assert placed.height + len(rejected) == len(sizes)
    for row in placed.iter_rows(named=True):
        size, bucket = (
            Size(row["height"], row["width"]),
            Size(row["bucket_height"], row["bucket_width"]),
        )
        resized = Size(row["resized_height"], row["resized_width"])
        assert bucket.height % 64 == bucket.width % 64 == 0
        assert covers(size, resized)
        assert covers(resized, bucket)
        # Rounding one side up by half a pixel may let the other have a step more.
        assert bucket.area < 1024 * 1024 + 64 * max(bucket)
        if size.area <= 1024 * 1024:
            assert resized == size
            assert bucket == Size(size.height // 64 * 64, size.width // 64 * 64)
    small = {row["image_id"] for row in rejected}
    for image_id, (height, width) in zip(frame(sizes)["image_id"], sizes, strict=True):
        if min(height, width) >= 64 and height * width <= 1024 * 1024:
            assert image_id not in small
        if min(height, width) < 64:
            assert image_id in small


def test_without_upscaling_every_image_gets_the_size_that_kohya_gives_it():
    table = pl.read_csv(Path(__file__).with_name("kohya_no_upscale.csv"), comment_prefix="#")
    assert table.height == 300
    for (area, step), rows in table.group_by("area", "step", maintain_order=True):
        config = BucketConfig(plan="kohya", no_upscale=True, area=area, step=step)
        placed, rejected = bucket_assignments.assign(
            frame(rows.select("height", "width").rows()), config
        )
        assert rejected == []
        wanted = rows.select(pl.exclude("area", "step").cast(pl.Int32))
        assert placed.select(wanted.columns).rows() == wanted.rows()


def test_kohyas_own_sizes_of_hand_worked_images():
    # 3000 x 2000: sqrt(area x 2/3) = 836.09 wide, in steps 832; 832 x 1.5 = 1248 high, in steps
    # 1216: 0.684. By height 1254.14, in steps 1216; 811 wide, in steps 768: 0.632, farther from
    # 2/3.
    placed, _ = bucket_assignments.assign(
        frame([(3000, 2000), (700, 900)]), BucketConfig(plan="kohya", no_upscale=True)
    )
    shown = placed.select("bucket_height", "bucket_width", "resized_height", "resized_width").rows()
    assert shown == [(1216, 832, 1248, 832), (640, 896, 700, 900)]


def with_tags(sizes, tags=()):
    return frame(sizes).with_columns(
        tags=pl.Series([list(tags)] * len(sizes), dtype=pl.List(pl.String))
    )


def test_padding_takes_its_share_of_those_that_lose_much_and_spares_drawings():
    sizes = [(1100, 3000)] * 400 + [(1024, 1024)] * 50
    images = with_tags(sizes)
    up_crop = UpCropConfig(share=0.25)
    placed, _ = bucket_assignments.assign(images, BucketConfig(), up_crop)
    padded = placed.filter("padded")
    assert 70 <= padded.height <= 130
    assert (padded["width"] == 3000).all(), "a square loses nothing and is never padded"
    for row in padded.iter_rows(named=True):
        bucket = Size(row["bucket_height"], row["bucket_width"])
        resized = Size(row["resized_height"], row["resized_width"])
        assert resized == crops.contain(Size(row["height"], row["width"]), bucket)
        assert (row["padding_height"], row["padding_width"]) == (
            bucket.height - resized.height,
            bucket.width - resized.width,
        )
        assert (row["slack_height"], row["slack_width"], row["area_kept"]) == (0, 0, 1.0)
    # The draw belongs to the image: neither its neighbours nor their order matter.
    some, _ = bucket_assignments.assign(images.reverse().head(120), BucketConfig(), up_crop)
    wanted = dict(placed.select("image_id", "padded").iter_rows())
    assert all(
        wanted[image_id] == chosen
        for image_id, chosen in some.select("image_id", "padded").iter_rows()
    )
    drawn, _ = bucket_assignments.assign(
        with_tags(sizes, ["star", "lineart"]), BucketConfig(), up_crop
    )
    assert not drawn["padded"].any()
    everything, _ = bucket_assignments.assign(
        images, BucketConfig(), UpCropConfig(share=1.0, min_cut=0.0)
    )
    assert everything["padded"].all()


def test_the_report_of_a_hand_counted_assignment():
    placed, _ = bucket_assignments.assign(
        frame([(1024, 1024)] * 5 + [(1216, 832)] * 3 + [(2048, 2048), (640, 1600)]), BucketConfig()
    )
    found = bucket_assignments.report(placed, (2, 4))
    assert found.buckets.select("height", "width", "images", "share").rows() == [
        (1024, 1024, 6, 0.6), (1216, 832, 3, 0.3), (640, 1600, 1, 0.1),
    ]  # fmt: skip
    assert found.numbers["buckets with a single image"] == 1
    assert found.numbers["left over by batches of 2"] == 0 + 1 + 1
    assert found.numbers["left over by batches of 4"] == 2 + 3 + 1
    assert (found.numbers["enlarged"], found.numbers["padded"]) == (0, 0)
    assert found.numbers["mean share of area kept"] == 1.0
    grown, _ = bucket_assignments.assign(frame([(100, 100)]), BucketConfig(allow_upscale=True))
    assert bucket_assignments.report(grown, ()).numbers["enlarged"] == 1


def test_a_plan_that_no_image_fits_is_told_in_one_line():
    line = bucket_assignments.nothing_fits(frame([(100, 200), (300, 300)]), BucketConfig())
    assert line.startswith(
        "bucket plan 'bigasp_v1': none of 2 images fits, the largest has 300x300 px"
    )
    smallest = min((size.area, size) for size in plan(BucketConfig()))[1]
    assert f"its smallest bucket is {smallest}" in line
    own = BucketConfig(plan="kohya", no_upscale=True)
    assert "it needs larger ones" in bucket_assignments.nothing_fits(frame([(20, 30)]), own)


@pytest.mark.parametrize("order", [[(1, 2), (2, 1)], [(2, 1), (1, 2)]])
def test_ties_go_to_the_first_in_the_plan(order):
    sizes = np.array(order)
    assert bucket_assignments._nearest(np.array([[300, 300], [700, 700]]), sizes).tolist() == [0, 0]


def test_no_images_give_no_rows():
    placed, rejected = bucket_assignments.assign(frame([]), BucketConfig())
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
    placed, rejected = bucket_assignments.assign(many, BucketConfig())
    assert placed.height + len(rejected) == num
