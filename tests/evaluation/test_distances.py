"""CMMD and KID against double loops over pairs in fp64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation import distances


def cloud(seed, count, width=6, shift=0.0):
    found = np.random.default_rng(seed).normal(size=(count, width)) + shift
    return found / np.linalg.norm(found, axis=1, keepdims=True)


clouds = st.tuples(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 9), st.floats(0, 3))


def pairs(a, b, kernel, same=False):
    values = [
        kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)
    ]
    return math.fsum(values) / len(values)


@given(clouds)
def test_cmmd_is_the_published_estimator(drawn):
    seed, n, m, shift = drawn
    a, b = cloud(seed, n), cloud(seed + 1, m, shift=shift)

    def kernel(x, y):
        return math.exp(-math.fsum((x - y) ** 2) / (2 * 10**2))

    expected = 1000 * (pairs(a, a, kernel) + pairs(b, b, kernel) - 2 * pairs(a, b, kernel))
    assert distances.cmmd(a, b) == pytest.approx(expected, abs=1e-9)


@given(clouds)
def test_kid_is_unbiased_and_cubic(drawn):
    seed, n, m, shift = drawn
    a, b = cloud(seed, n), cloud(seed + 1, m, shift=shift)
    width = a.shape[1]

    def kernel(x, y):
        # The polynomial kernel as published, (x y / d + 1)^3, of vectors of length sqrt(d).
        return (math.fsum(x * math.sqrt(width) * y * math.sqrt(width)) / width + 1) ** 3

    expected = (
        pairs(a, a, kernel, same=True) + pairs(b, b, kernel, same=True) - 2 * pairs(a, b, kernel)
    )
    assert distances.kid(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("measure", [distances.cmmd, distances.kid])
def test_blocks_do_not_matter_and_order_of_sides_neither(measure, monkeypatch):
    a, b = cloud(1, 37, 12), cloud(2, 23, 12, shift=0.3)
    whole = measure(a, b)
    assert measure(b, a) == pytest.approx(whole, abs=1e-10)
    monkeypatch.setattr(distances, "_BLOCK_ROWS", 5)
    assert measure(a, b) == pytest.approx(whole, abs=1e-10)
    assert measure(a.astype(np.float32), b) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("measure", [distances.cmmd, distances.kid])
def test_more_of_another_kind_is_farther(measure):
    real, same, other = cloud(1, 400, 16), cloud(2, 400, 16), cloud(3, 400, 16, shift=0.5)
    assert measure(other, real) > 5 * abs(measure(same, real))


def test_of_equal_distributions_kid_is_zero_on_average_and_cmmd_above():
    found = np.array([(distances.kid(cloud(n, 20, 8), cloud(n + 1, 20, 8)),
                       distances.cmmd(cloud(n, 20, 8), cloud(n + 1, 20, 8))) for n in range(0, 400, 2)])  # fmt: skip
    mean, error = found.mean(axis=0), found.std(axis=0) / math.sqrt(len(found))
    assert abs(mean[0]) < 4 * error[0]
    assert mean[1] > 10 * error[1]


@pytest.mark.parametrize("measure", [distances.cmmd, distances.kid])
def test_one_image_has_no_distance(measure):
    assert math.isnan(measure(cloud(0, 1), cloud(1, 5)))
    assert math.isnan(measure(cloud(0, 5), cloud(1, 1)))
