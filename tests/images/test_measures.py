"""What is measured on an image, against formulas, SciPy and the usual definition of pHash."""

import numpy as np
import pytest
from drawn_images import STORED_AS, encode, quadrants, textured
from PIL import Image, ImageFilter
from scipy.fft import dctn

from training.config.workspace import DecodeConfig
from training.images import decoding, measures

CONFIG = DecodeConfig()


def facts(pixels, fmt="PNG", **options):
    data = encode(pixels, fmt, **options)
    return measures.measure(data, "id", decoding.decode(data, CONFIG))


def test_facts_say_what_is_there():
    exif = Image.Exif()
    exif[274] = 6
    data = encode(np.ascontiguousarray(STORED_AS[6](quadrants())), "PNG", exif=exif)
    found = measures.measure(data, "id", decoding.decode(data, CONFIG))
    assert (found.image_id, found.bytes, found.format, found.mode) == (
        "id",
        len(data),
        "PNG",
        "RGB",
    )
    assert (found.height, found.width, found.stored_height, found.stored_width) == (48, 64, 64, 48)
    assert found.orientation == 6
    assert found.pixel_digest == facts(quadrants(), "BMP").pixel_digest
    assert found.pixel_digest != facts(quadrants()[:, ::-1].copy()).pixel_digest
    assert (
        facts(np.zeros((16, 36, 3), np.uint8)).pixel_digest
        != facts(np.zeros((24, 24, 3), np.uint8)).pixel_digest
    )


def test_brightness_contrast_and_sharpness():
    flat = facts(np.full((64, 64, 3), 51, np.uint8))
    assert (flat.brightness, flat.contrast, flat.sharpness) == (pytest.approx(0.2), 0.0, 0.0)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    assert facts(halves).brightness == pytest.approx(0.5)
    assert facts(halves).contrast == pytest.approx(0.5)
    sharp = textured(300, 400)
    soft = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(4)))
    assert facts(soft).sharpness < facts(sharp).sharpness / 2


def distance(a, b):
    return (a ^ b).bit_count()


def test_the_hash_is_the_usual_one():
    # imagehash's definition with SciPy's DCT; bits whose coefficient is within rounding of the
    # median may differ.
    luma = Image.fromarray(textured()).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(luma, dtype=float), type=2)[:8, :8]
    margin = np.abs(low - np.median(low)).ravel()
    bits = (low > np.median(low)).ravel()
    ours = [c == "1" for c in f"{facts(textured()).phash:064b}"]
    assert all(a == b for a, b, m in zip(ours, bits, margin, strict=True) if m > 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_hashes_of_copies_are_near_and_of_others_far(seed):
    original = facts(textured(seed=seed))
    copy = facts(textured(seed=seed), "JPEG", quality=70)
    shrunk = facts(
        np.asarray(Image.fromarray(textured(seed=seed)).resize((96, 72), Image.Resampling.LANCZOS))
    )
    assert distance(original.phash, copy.phash) <= 3
    assert distance(original.phash, shrunk.phash) <= 3
    assert distance(original.phash, facts(textured(seed=seed + 100)).phash) > 10
    mirrored = facts(textured(seed=seed)[:, ::-1].copy())
    assert distance(original.phash_mirrored, mirrored.phash) <= 3
    assert distance(original.phash, mirrored.phash) > 10


def test_the_hash_of_a_flat_image_is_degenerate_and_steady():
    assert {facts(np.full((40, 40, 3), value, np.uint8)).phash for value in (1, 90, 255)} == {
        1 << 63
    }
