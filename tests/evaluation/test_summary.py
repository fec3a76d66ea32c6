"""The guide's summary against pandas and scipy, which it was written with."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from training.evaluation import summary

scores = st.integers(1, 60).flatmap(
    lambda count: st.tuples(
        arrays.arrays(np.float64, count, elements=st.floats(-1, 1, width=32)),
        arrays.arrays(np.float64, count, elements=st.floats(1, 10, width=32)),
    )
)


def guide(clip, aesthetic):
    """The guide's way: pandas' describe, scipy's moments, and np.std of a Series."""
    frame = pd.Series(aesthetic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of equal scores, and gives NaN
        found = frame.describe().to_dict() | {
            "skew": scipy.stats.skew(aesthetic), "kurtosis": scipy.stats.kurtosis(aesthetic),
        }  # fmt: skip
    named = {f"{name}_LAIONScore": float(value) for name, value in found.items()}
    return named | {
        "Clipscore_mean": pd.Series(clip).mean(),
        "Clipscore_std": np.std(pd.Series(clip)),
    }


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


@given(scores)
def test_the_summary_is_the_guides_to_1e_12(pair):
    clip, aesthetic = pair
    found, expected = summary.summarise(clip, aesthetic), guide(clip, aesthetic)
    spread = aesthetic.std() if len(aesthetic) > 1 else 0.0
    for name in ("skew_LAIONScore", "kurtosis_LAIONScore"):
        # Scores that differ in their last digits only: both sides are rounding errors.
        if spread < 1e-6:
            found[name] = expected[name] = 0.0
    assert_equal(found, expected)


def test_columns_stand_in_the_guides_order():
    assert summary.COLUMNS[0] == "count_LAIONScore"
    assert summary.COLUMNS[4:7] == ("25%_LAIONScore", "50%_LAIONScore", "75%_LAIONScore")
    assert summary.COLUMNS[-3:] == ("kurtosis_LAIONScore", "Clipscore_mean", "Clipscore_std")


def test_a_hand_worked_case():
    found = summary.summarise(np.array([0.1, 0.3]), np.array([4.0, 6.0]))
    assert found["std_LAIONScore"] == pytest.approx(math.sqrt(2))
    assert found["Clipscore_std"] == pytest.approx(0.1)
    assert found["25%_LAIONScore"] == pytest.approx(4.5)
    assert found["kurtosis_LAIONScore"] == pytest.approx(-2)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("value", [5.1, 0.0, 1 / 3])
def test_equal_scores_have_no_shape(count, value):
    assert_equal(
        summary.summarise(np.full(count, 0.2), np.full(count, value)),
        guide([0.2] * count, np.full(count, value)),
    )


def test_one_nan_is_never_averaged_away():
    found = summary.summarise(np.array([0.1, math.nan]), np.array([5.0, math.nan]))
    assert found.pop("count_LAIONScore") == 2
    assert all(math.isnan(value) for value in found.values())


def test_no_scores_are_counted_as_none():
    found = summary.summarise(np.array([]), np.array([]))
    assert found.pop("count_LAIONScore") == 0
    assert all(math.isnan(value) for value in found.values())


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(1, 10)), min_size=1, max_size=40))
def test_the_deviation_within_prompts_is_pandas_mean_of_group_deviations(rows):
    prompts, found = [prompt for prompt, _ in rows], np.array([value for _, value in rows])
    groups = (
        pd.DataFrame({"prompt": prompts, "score": found}).groupby("prompt")["score"].std(ddof=1)
    )
    expected = groups.mean()  # leaves out prompts with one image, which have none
    assert summary.std_within(found, prompts) == pytest.approx(
        expected, rel=1e-9, abs=1e-9, nan_ok=True
    )
