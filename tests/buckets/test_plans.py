"""Bucket plans against the lists that their authors publish, or that their tools were seen to
make."""

import pytest

from training import toml
from training.buckets.geometry import Size
from training.buckets.plans import BucketConfig, plan
from training.errors import ConfigError

# Images per bucket of bigASP's page, width x height.
PAGE = """832x1216 1216x832 832x1152 1152x896 896x1152 768x1344 1024x1024 896x1088 704x1408 1344x768 768x1280 704x1344
960x1088 1152x832 960x1024 1088x896 1024x960 1088x960 1280x768 1344x704 1472x704 1408x704 1600x640 1728x576 1536x640
1664x576"""

# SDXL report, appendix I, height x width.
PAPER = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896
1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512
1984x512 2048x512"""

# BPModel at 768: from each side of 512 to 1728 the longest other side with at most 768 x 1152
# pixels, and the square.
ARB_768 = """512x1728 576x1536 640x1344 704x1216 768x1152 832x1024 896x960 960x896 1024x832 1088x768 1152x768 1216x704
1280x640 1344x640 1408x576 1472x576 1536x576 1600x512 1664x512 1728x512 768x768
576x1472 576x1408 640x1280 768x1088 512x1600 512x1664"""

# At 1024: base 1024, 1024 x 1536 pixels, sides 960 to 2389.
ARB_1024 = """960x1600 1024x1536 1088x1408 1152x1344 1216x1280 1280x1216 1344x1152 1408x1088 1472x1024 1536x1024
1600x960 1024x1472 1024x1024"""


def pairs(text, *, width_first=False):
    sizes = [tuple(map(int, word.split("x"))) for word in text.split()]
    return sorted({Size(b, a) if width_first else Size(a, b) for a, b in sizes})


def test_the_published_lists():
    assert list(plan(BucketConfig(plan="bigasp_v1"))) == pairs(PAGE, width_first=True)
    assert len(pairs(PAGE)) == 26
    assert list(plan(BucketConfig(plan="sdxl_paper"))) == pairs(PAPER)
    assert len(pairs(PAPER)) == 40


def test_kohyas_list_has_the_sizes_that_its_tool_makes():
    full = plan(BucketConfig(plan="kohya"))  # Kohaku XL Delta: 1024 x 1024, sides 256 to 4096
    assert len(full) == 97
    assert min(size.area for size in full) == 851_968
    assert max(size.area for size in full) == 1_048_576
    assert {Size(256, 4096), Size(4096, 256), Size(1024, 1024), Size(832, 1216)} <= set(full)
    narrow = plan(BucketConfig(plan="kohya", min_side=512, max_side=2048))
    assert len(narrow) == 33
    assert set(narrow) < set(full)
    assert {Size(w, h) for h, w in narrow} == set(narrow), "as tall as wide"
    # A square of 512 with sides 256 to 1024, worked out by hand.
    small = plan(BucketConfig(plan="kohya", area=512 * 512, min_side=256, max_side=1024))
    expected = "256x1024 320x768 384x640 448x576 512x512 "
    expected += "576x448 640x384 704x320 768x320 832x256 896x256 960x256 1024x256 320x704 256x832 256x896 256x960"
    assert list(small) == pairs(expected)


def naifu(base_res, max_size, divisible, min_dim, dim_limit):
    """NovelAI's generator as naifu-diffusion has it (data/buckets.py, branch main-archived), walked
    literally; sizes (width, height)."""
    budget, found = max_size[0] * max_size[1], []
    width = min_dim
    while width * min_dim <= budget and width <= dim_limit:
        height, passed = min_dim, False
        while width * (height + divisible) <= budget and height + divisible <= dim_limit:
            passed = passed or (width, height) == base_res
            height += divisible
        if passed and (width, height) != base_res:
            found.append(base_res)
        found.append((width, height))
        width += divisible
    height = min_dim
    while height * min_dim <= budget and height <= dim_limit:
        width = min_dim
        while (width + divisible) * height <= budget and width + divisible <= dim_limit:
            width += divisible
        found.append((width, height))
        height += divisible
    return sorted({Size(h, w) for w, h in found})


BPMODEL = {
    768: (
        {"base_res": (768, 768), "max_size": (768, 1152), "min_dim": 512, "dim_limit": 1792},
        ARB_768,
    ),
    1024: (
        {"base_res": (1024, 1024), "max_size": (1024, 1536), "min_dim": 960, "dim_limit": 2389},
        ARB_1024,
    ),
}


@pytest.mark.parametrize("resolution", BPMODEL)
def test_both_of_bpmodels_settings(resolution):
    options, listed = BPMODEL[resolution]
    sizes = plan(BucketConfig(plan="arb", divisible=64, max_ar_error=4.0, **options))
    width_first = {
        name: value[::-1] if isinstance(value, tuple) else value for name, value in options.items()
    }
    assert list(sizes) == naifu(divisible=64, **width_first)
    assert list(sizes) == pairs(listed)
    base = options["base_res"][0]
    assert Size(base, base) in sizes


def test_kohaku_and_768_are_the_defaults():
    assert plan(BucketConfig(plan="arb")) == plan(BucketConfig(plan="arb", **BPMODEL[768][0]))


@pytest.mark.parametrize("scale", [2, 8])
def test_a_scaled_plan_is_the_plan_divided(scale):
    full = plan(BucketConfig())
    assert [(s.height * scale, s.width * scale) for s in plan(BucketConfig(scale=scale))] == list(
        full
    )


def test_custom_sizes_come_sorted_and_from_toml():
    config = toml.build(BucketConfig, {"plan": "custom", "sizes": [[1024, 768], [768, 1024]]})
    assert plan(config) == (Size(768, 1024), Size(1024, 768))
    assert toml.build(BucketConfig, {"plan": "arb", "base_res": [512, 512]}).base_res == (512, 512)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"plan": "nonesuch"}, "plan='nonesuch' must be one of .*bigasp_v1"),
        ({"scale": 3}, "size 512x.* or|multiples of 8 px after division by scale=3"),
        ({"scale": 64}, "multiples of 8 px after division by scale=64"),
        ({"area": 65536}, r"area=65536 is no option of plan 'bigasp_v1' \(none\)"),
        (
            {"plan": "kohya", "sizes": [[64, 64]]},
            r"sizes=.* is no option of plan 'kohya' \(area, min_side",
        ),
        ({"plan": "kohya", "area": 100}, "plan 'kohya' with these options has no size"),
        ({"plan": "kohya", "step": 0}, "step=0 must be greater than 0"),
        ({"plan": "kohya", "no_upscale": True, "step": 12}, "step=12 must be a multiple of 8"),
        ({"plan": "kohya", "no_upscale": True, "allow_upscale": True}, "exclude each other"),
        ({"plan": "custom"}, "sizes must list"),
        ({"plan": "custom", "sizes": [[64, 60]]}, "64x60 .* multiples of 8"),
        ({"plan": "custom", "sizes": [[64, -64]]}, "64x-64 .* positive"),
        ({"plan": "custom", "sizes": [[64, 64], [64, 64]]}, "64x64 stands twice"),
        ({"plan": "custom", "sizes": [[64, 64, 3]]}, "must be a list of 2"),
        ({"plan": "arb", "min_dim": 5000}, "plan 'arb' with these options has no size"),
        ({"plan": "arb", "base_res": 768}, "base_res=768 must be a list"),
    ],
)
def test_what_makes_no_plan_is_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        toml.build(BucketConfig, values)
