"""Measures of images against sums written out by hand; letter boxes; the index and its alarm."""

import colorsys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage

from training.evaluation import overbaked


def noise(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def block_means(levels, side):
    """Means of square blocks, written out by hand."""
    height, width = levels.shape[:2]
    rows = [
        [levels[y : y + side, x : x + side].mean(axis=(0, 1)) for x in range(0, width, side)]
        for y in range(0, height, side)
    ]
    return np.array(rows)


@given(seed=st.integers(0, 2**32), height=st.integers(3, 80), width=st.integers(3, 140))
@settings(max_examples=20)
def test_measures_are_what_they_say(seed, height, width):
    image = noise(height, width, seed)
    found = overbaked.measure(image)
    levels = image.astype(np.float64) / 255
    coarse = block_means(levels, 1 if min(height, width) < 64 else 2)
    # Saturation times value of HSV is the largest minus the smallest level.
    chroma = [s * v for _, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in coarse.reshape(-1, 3))]
    luma = 0.299 * levels[..., 0] + 0.587 * levels[..., 1] + 0.114 * levels[..., 2]
    kernel = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 4
    fine = ndimage.convolve(luma, kernel)[1:-1, 1:-1]
    assert found["saturation"] == pytest.approx(np.mean(chroma), abs=1e-6)
    assert found["contrast"] == pytest.approx((coarse @ [0.299, 0.587, 0.114]).std(), abs=1e-5)
    assert found["detail"] == pytest.approx(np.sqrt((fine**2).mean()), abs=1e-5)


def scene(seed, side=192):
    """An image with the spectrum of photographs, 1 / f, each channel partly its own."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    radius[0, 0] = np.inf
    grey, *own = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / radius) for _ in range(4)
    )
    planes = [grey / grey.std() + 0.6 * one / one.std() for one in own]
    return Image.fromarray((128 + 38 * np.stack(planes, axis=2)).clip(0, 255).astype(np.uint8))


def bake(image, colour=1.4, contrast=1.25, sharpness=2.0):
    vivid = ImageEnhance.Color(image).enhance(colour)
    return ImageEnhance.Sharpness(ImageEnhance.Contrast(vivid).enhance(contrast)).enhance(sharpness)


def grain(image, deviation, channels):
    noise = np.random.default_rng(7).normal(0, deviation, (image.height, image.width, channels))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def measures_of(images):
    return overbaked.collect([overbaked.measure(np.asarray(image)) for image in images])


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(1.5))  # what a small VAE leaves of an image


IMAGES = [scene(seed) for seed in range(12)]
VARIED = [bake(scene(20 + place), place / 9, 0.8, 3) for place in range(20)]
"""Training images as the demo has them: of all colours, soft in contrast, finer than what is
drawn."""


@pytest.mark.parametrize("decode", [lambda image: image, blurred])
@pytest.mark.parametrize("training", [IMAGES, [scene(seed) for seed in range(20, 40)], VARIED])
def test_the_alarm_fires_on_an_over_baked_set(decode, training):
    drawn = [decode(image) for image in IMAGES]
    summary = overbaked.summarise(
        measures_of([bake(image) for image in drawn]), measures_of(drawn), measures_of(training)
    )
    assert summary["overbaked_index"] > 0.5
    assert overbaked.alarms(summary)


@pytest.mark.parametrize(
    "change",
    [lambda image: image, lambda image: bake(image, 1.05, 1.02, 1.2)]
    + [lambda image, d=d, c=c: grain(image, d, c) for d in (8, 16, 25) for c in (1, 3)],
)
@pytest.mark.parametrize("decode", [lambda image: image, blurred])
def test_the_alarm_is_silent_on_the_base_and_on_film_grain(change, decode):
    drawn = [decode(image) for image in IMAGES]
    summary = overbaked.summarise(
        measures_of([change(image) for image in drawn]), measures_of(drawn), measures_of(drawn)
    )
    assert summary["overbaked_index"] < 0.25
    assert overbaked.alarms(summary) == []


def test_coloured_grain_on_a_monochrome_set_is_no_alarm():
    grey = [image.convert("L").convert("RGB") for image in IMAGES]
    summary = overbaked.summarise(
        measures_of([grain(one, 20, 3) for one in grey]), measures_of(grey), measures_of(grey)
    )
    assert overbaked.alarms(summary) == []


def test_what_over_baking_does_raises_its_measure():
    y, x = np.mgrid[:64, :64]
    soft = np.stack(
        [96 + 40 * np.sin(x / 9), 110 + 30 * np.cos(y / 11), 128 + 20 * np.sin((x + y) / 13)],
        axis=2,
    )
    soft += np.random.default_rng(0).normal(scale=6, size=(64, 64, 1))
    before = overbaked.measure(soft.astype(np.uint8))
    grey = soft.mean(axis=2, keepdims=True)
    vivid = overbaked.measure((grey + 1.5 * (soft - grey)).clip(0, 255).astype(np.uint8))
    hard = overbaked.measure((128 + 1.5 * (soft - 128)).clip(0, 255).astype(np.uint8))
    sharp = overbaked.measure(
        np.asarray(
            Image.fromarray(soft.astype(np.uint8)).filter(ImageFilter.UnsharpMask(1, 300, 0))
        )
    )
    assert vivid["saturation"] > 1.3 * before["saturation"]
    assert hard["contrast"] > 1.3 * before["contrast"]
    assert sharp["detail"] > 1.3 * before["detail"]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2)])
def test_tiny_images_have_measures(size):
    assert overbaked.measure(np.full((*size, 3), 7, dtype=np.uint8))["detail"] == 0


@pytest.mark.parametrize("colour", [0, 255, 119])
@pytest.mark.parametrize("turned", [False, True])
def test_a_letter_box_is_found(colour, turned):
    image = noise(100, 100)
    image[:8], image[-5:] = colour, colour
    image = image.transpose(1, 0, 2) if turned else image
    assert overbaked.has_uniform_border(image)
    blurred = np.asarray(Image.fromarray(image).convert("YCbCr").convert("RGB"))
    assert overbaked.has_uniform_border(blurred)


def test_what_is_no_letter_box():
    assert not overbaked.has_uniform_border(noise(100, 100))
    assert not overbaked.has_uniform_border(np.full((100, 100, 3), 255, dtype=np.uint8))
    one_side = noise(100, 100)
    one_side[:10] = 0
    assert not overbaked.has_uniform_border(one_side)
    thin = noise(100, 100)
    thin[:1], thin[-1:] = 0, 0
    assert not overbaked.has_uniform_border(thin)
    small = noise(40, 40)
    small[:1], small[-1:] = 0, 0  # 2 % of 40 lines would be less than one
    assert not overbaked.has_uniform_border(small)
    y, x = np.mgrid[:100, :100]
    disc = np.full((100, 100, 3), 255, dtype=np.uint8)
    disc[(y - 50) ** 2 + (x - 50) ** 2 < 30**2] = 40
    assert not overbaked.has_uniform_border(disc), "a plain background is no letter box"


def levels(mean, spread=0.1, count=50, seed=0):
    rng = np.random.default_rng(seed)
    found = {name: mean + spread * rng.normal(size=count) for name in overbaked.MEASURES}
    return found | {overbaked.BORDER: np.zeros(count)}


def test_the_index_is_the_geometric_mean_of_both_excesses():
    own, base, training = levels(0.9, seed=1), levels(0.3, seed=2), levels(0.5, seed=3)
    excesses = []
    for name, unit in (("saturation", 0.3), ("contrast", 0.15)):
        reference = max(np.mean(base[name]), np.mean(training[name]))
        excesses.append((np.mean(own[name]) / reference - 1) / unit)
    assert overbaked.index(own, base, training) == pytest.approx(scipy.stats.gmean(excesses))


@given(base=st.floats(0, 1), training=st.floats(0, 1), share=st.floats(0, 1))
def test_the_look_of_the_training_set_of_the_base_and_between_is_not_over_baked(
    base, training, share
):
    between = min(max(base, training), base + share * (training - base))
    assert overbaked.index(levels(between, 0), levels(base, 0), levels(training, 0)) == 0


@pytest.mark.parametrize("name", ["saturation", "contrast", "detail"])
def test_one_measure_alone_is_not_over_baked(name):
    own = levels(0.5, 0) | {name: np.full(50, 0.9)}
    assert overbaked.index(own, levels(0.5, 0), levels(0.4, 0)) == 0


def test_the_summary_holds_what_there_is():
    own, boxed = levels(0.9), levels(0.5)
    boxed[overbaked.BORDER][:10] = 1
    whole = overbaked.summarise(own, levels(0.4), boxed)
    assert whole["overbaked_index"] > 0
    assert (whole["border_share"], whole["border_share_base"], whole["border_share_train"]) == (
        0,
        0,
        0.2,
    )
    assert whole["saturation_mean"] == pytest.approx(own["saturation"].mean())
    assert "overbaked_index" not in overbaked.summarise(own, levels(0.4), None)
    assert set(overbaked.summarise(own, None, None)) == {
        *(f"{name}_mean" for name in overbaked.MEASURES),
        "border_share",
    }


def test_the_last_checkpoint_before_the_alarm_is_named():
    calm, hot = (
        {"overbaked_index": 0.1, "border_share": 0.0},
        {"overbaked_index": 0.6, "border_share": 0.0},
    )
    run = [("a@1", calm), ("a@2", calm), ("a@3", hot), ("a@4", calm)]
    assert overbaked.last_before_alarm(run) == "a@2"
    assert overbaked.last_before_alarm(run[:2]) == "a@2"
    assert overbaked.last_before_alarm(run[2:]) is None
    assert overbaked.last_before_alarm([]) is None


def test_borders_raise_the_alarm_where_neither_base_nor_training_images_have_them():
    boxed = {"border_share": 0.3, "border_share_base": 0.0, "border_share_train": 0.05}
    assert overbaked.alarms(boxed) == [
        "30% of the images have uniform borders, 5% of the references"
    ]
    assert overbaked.alarms(boxed | {"border_share_train": 0.25}) == []
    assert overbaked.alarms({"border_share": 0.9}) == [], "nothing to compare with"
