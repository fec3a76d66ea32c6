"""The summary of a checkpoint's scores with exactly the columns and conventions of the poster guide
and GhostReview.

Its conventions are not uniform and are kept as they are: the aesthetic's standard deviation divides
by n - 1, the CLIP score's by n, quartiles are interpolated, skewness and kurtosis are the biased
ones, and one NaN makes all NaN. What the guide does not tell, such as the deviation within prompts,
stands beside it under other names.
"""

import math
from collections.abc import Sequence

import numpy as np

QUANTILES = {"25%": 0.25, "50%": 0.5, "75%": 0.75}
AESTHETIC_STATISTICS = ("count", "mean", "std", "min", *QUANTILES, "max", "skew", "kurtosis")
COLUMNS = (
    *(f"{name}_LAIONScore" for name in AESTHETIC_STATISTICS),
    "Clipscore_mean",
    "Clipscore_std",
)
"""Columns after `Model`, in the guide's order."""


def summarise(clip_scores: np.ndarray, aesthetic_scores: np.ndarray) -> dict[str, float]:
    """The guide's summary of one model.

    Args:
        clip_scores: `(N,)`, pooled over prompts.
        aesthetic_scores: `(N,)`.

    Returns:
        One number per name in `COLUMNS`; NaN where a statistic is not defined (the deviation of one
        score, the skewness of equal ones) or a score is NaN.
    """
    scores = np.asarray(aesthetic_scores, dtype=np.float64)
    clip = np.asarray(clip_scores, dtype=np.float64)
    assert scores.shape == clip.shape, "one score of each kind per image"
    found = describe(scores)
    count = len(clip)
    clip_mean = float(clip.mean()) if count else math.nan
    clip_std = float(clip.std(ddof=0)) if count else math.nan
    values = [*(found[name] for name in AESTHETIC_STATISTICS), clip_mean, clip_std]
    return dict(zip(COLUMNS, values, strict=True))


def std_within(scores: np.ndarray, prompts: Sequence[str]) -> float:
    """The deviation between images of one prompt (n - 1), averaged over prompts with two images
    or more.

    GhostReview's table of models shows this number; the guide compares it with `std_LAIONScore`,
    which is over all images and so holds the differences between prompts as well.

    Args:
        scores: `(N,)`.
        prompts: What each image was asked for.

    Returns:
        NaN where no prompt has two images.
    """
    _, places, counts = np.unique(
        np.array(prompts, dtype=object), return_inverse=True, return_counts=True
    )
    if not (counts > 1).any():
        return math.nan
    values = np.asarray(scores, dtype=np.float64)
    means = np.bincount(places, values) / counts
    squares = np.bincount(places, (values - means[places]) ** 2)
    repeated = counts > 1
    return float(np.sqrt(squares[repeated] / (counts[repeated] - 1)).mean())


def describe(scores: np.ndarray) -> dict[str, float]:
    """The statistics in `AESTHETIC_STATISTICS` of `(N,)` float64 scores."""
    count = len(scores)
    if not count:
        return {"count": 0.0} | dict.fromkeys(AESTHETIC_STATISTICS[1:], math.nan)
    mean = float(scores.mean())
    centred = scores - mean
    variance = float((centred**2).mean())
    # Equal scores leave rounding errors of the mean, whose shape means nothing.
    spread = variance > (np.finfo(np.float64).eps * abs(mean)) ** 2
    return {
        "count": float(count),
        "mean": mean,
        "std": math.sqrt(variance * count / (count - 1)) if count > 1 else math.nan,
        "min": float(scores.min()),
        **{name: float(np.quantile(scores, share)) for name, share in QUANTILES.items()},
        "max": float(scores.max()),
        "skew": float((centred**3).mean()) / variance**1.5 if spread else math.nan,
        "kurtosis": float((centred**4).mean()) / variance**2 - 3 if spread else math.nan,
    }
