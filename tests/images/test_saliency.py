"""The map says where an image is unlike the rest of itself; a flat one is even."""

import numpy as np
import pytest

from training.images.saliency import importance


@pytest.mark.parametrize("size", [(400, 300), (90, 1000), (64, 64), (31, 47)])
def test_the_map_has_the_images_shape_and_sum_one(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = importance(pixels)
    assert found.dtype == np.float32
    assert max(found.shape) <= 64
    assert found.sum() == pytest.approx(1, abs=1e-4)
    assert found.min() >= 0
    assert found.shape[0] / found.shape[1] == pytest.approx(size[0] / size[1], rel=0.6)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_patch_of_detail_outweighs_everything_around_it(corner):
    pixels = np.full((320, 320, 3), 120, np.uint8)
    y, x = corner[0] * 220 + 20, corner[1] * 220 + 20
    pixels[y : y + 60, x : x + 60] = np.random.default_rng(1).integers(0, 256, (60, 60, 3))
    found = importance(pixels)
    rows, columns = (slice(side * 32, side * 32 + 32) for side in corner)
    assert found[rows, columns].sum() > 0.6


def test_a_flat_image_has_no_subject():
    found = importance(np.full((100, 200, 3), 77, np.uint8))
    assert (found == found[0, 0]).all()


def test_of_two_equal_patches_the_upper_one_weighs_more():
    pixels = np.full((400, 400, 3), 120, np.uint8)
    patch = np.random.default_rng(1).integers(0, 256, (60, 60, 3))
    pixels[40:100, 170:230] = pixels[300:360, 170:230] = patch
    found = importance(pixels)
    assert found[:32].sum() > found[32:].sum()
