"""How far the images of a checkpoint are, as a whole, from images that it never trained on:
CMMD and KID.

Both compare clouds of CLIP embeddings and both depend on how many images there are: their number,
and what as many real images get, are told with them. FID is left out: it needs thousands of
images.
"""

import math
from collections.abc import Callable

import numpy as np

SIGMA, SCALE = 10.0, 1000.0
"""Width of CMMD's kernel and its factor. Source: Jayasumana et al., arXiv:2401.09603, section 5,
and their code."""
MIN_IMAGES = 2
"""Of each side: fewer have no spread."""
_BLOCK_ROWS = 2048
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of the products of all pairs and the sums of their squared lengths."""


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """1000 times the squared maximum mean discrepancy with a Gaussian kernel of width 10.

    The published estimator, so that published numbers compare: pairs of an image with itself
    count, which makes it biased upwards, by about 1 / n, and never negative but for rounding.

    Args:
        a: `(N, d)` embeddings of length 1.
        b: `(M, d)`, of the same CLIP.

    Returns:
        NaN with fewer than 2 images on a side.
    """
    if min(len(a), len(b)) < MIN_IMAGES:
        return math.nan
    means = [_mean_kernel(x, y, _gaussian) for x, y in ((a, a), (b, b), (a, b))]
    return SCALE * (means[0] + means[1] - 2 * means[2])


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """The kernel distance of Binkowski et al. with the cubic kernel, on CLIP embeddings instead of
    Inception's.

    `k(x, y) = (x y / d + 1)^3` for vectors scaled to length sqrt(d), which makes it `(cosine +
    1)^3`: at length 1 it would be a straight line. Unbiased: pairs of an image with itself are
    left out, so that it can be negative.

    Args:
        a: `(N, d)` embeddings of length 1.
        b: `(M, d)`, of the same CLIP.

    Returns:
        NaN with fewer than 2 images on a side.

    Source: arXiv:1801.01401, section 4.
    """
    if min(len(a), len(b)) < MIN_IMAGES:
        return math.nan
    within = [_mean_kernel(x, x, _cubic, skip_diagonal=True) for x in (a, b)]
    return within[0] + within[1] - 2 * _mean_kernel(a, b, _cubic)


def _gaussian(cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.exp((2 * cosines - lengths) / (2 * SIGMA**2))


def _cubic(cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (cosines + 1) ** 3


def _mean_kernel(
    a: np.ndarray, b: np.ndarray, kernel: Kernel, *, skip_diagonal: bool = False
) -> float:
    """Mean of the kernel over all pairs, in fp64 and in blocks of rows: memory grows with M
    alone."""
    second = np.asarray(b, dtype=np.float64)
    squares = (second**2).sum(axis=1)
    total, count = 0.0, len(a) * len(b)
    for start in range(0, len(a), _BLOCK_ROWS):
        first = np.asarray(a[start : start + _BLOCK_ROWS], dtype=np.float64)
        values = kernel(first @ second.T, (first**2).sum(axis=1)[:, None] + squares)  # (rows, M)
        total += float(values.sum())
        if skip_diagonal:
            total -= float(np.trace(values[:, start : start + len(first)]))
    return total / (count - len(a) if skip_diagonal else count)
