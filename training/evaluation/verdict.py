"""Is checkpoint b better than a? Paired by prompt, with an interval, a margin that matters, and an
honest "unclear".

Images are not independent, prompts are: an image-level test of equal models calls two thirds of
them different (measured). So each prompt gives one difference, and the t interval is over prompts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from training.errors import EvaluationError, FailedImagesError
from training.evaluation.prompt_groups import counted
from training.sampling.image_files import refusal
from training.tables.schemas import TABLES

ALL = "all"
HELD_OUT = "held-out half"
"""Group of the verdict that decides over the best of many."""
MIN_PROMPTS = 30
"""Fewer pairs give no verdict."""
CONFIDENCE = 0.95
# Normal quantiles of 5 % two-sided and 80 % power: a difference of 2.8 standard errors is found
# four times in five.
_POWER_QUANTILES = 2.8
_MAX_NEEDED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """All that must be equal before two checkpoints' scores may be compared."""

    prompts: str
    """Digest of the prompt set, seeds and sizes included."""
    sampling: str
    """Settings of the sampler, as JSON with sorted keys."""
    clip: str
    """Digest of the CLIP weights."""
    aesthetic: str
    """Digest of the aesthetic head."""
    scorers: str = ""
    """Names and digests of further scorers."""
    dtype: str
    """In which images are scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One checkpoint's side of a comparison."""

    checkpoint: str
    protocol: Protocol
    metrics: pl.DataFrame
    """Rows of table `eval_metrics`."""


def compare(a: Scores, b: Scores, margins: Mapping[str, float]) -> pl.DataFrame:
    """Judge b against a, over all prompts and per group.

    Args:
        a: The checkpoint compared against.
        b: The checkpoint judged.
        margins: Metric (`clip_score`, `aesthetic`) -> difference that matters in practice.

    Returns:
        Rows of table `verdicts`, one per metric and group: `better` and `worse` when Holm's test
        over the metrics of the group holds at 5 % and the mean difference reaches the margin;
        `same` when the 95 % interval lies within the margin on both sides; `unclear` otherwise,
        with the number of prompts that would decide; and `too_few_prompts` below 30. `all` leaves
        the shipped groups out where there are other prompts. Where a group is the only one, it is
        `all`.

    Raises:
        FailedImagesError: an image of either has no scores.
        EvaluationError: the protocols differ, a prompt has a score on one side only, or a score is
            not finite.
    """
    _refuse_unlike(a, b)
    if failed := [text for side in (a, b) if (text := refusal(side.checkpoint, side.metrics))]:
        raise FailedImagesError(
            f"no verdict on {b.checkpoint} against {a.checkpoint}: {'; '.join(failed)}"
        )
    pairs = {metric: _pair(a, b, metric) for metric in margins}
    groups = sorted(
        {group for frame in pairs.values() for group in frame["group"].unique().to_list()}
    )
    rows = []
    for group in [ALL, *(groups if len(groups) > 1 else [])]:
        chosen = {
            metric: counted(frame) if group == ALL else frame.filter(pl.col("group") == group)
            for metric, frame in pairs.items()
        }
        tests = {
            metric: PairedTest.of(frame["a"].to_numpy(), frame["b"].to_numpy())
            for metric, frame in chosen.items()
        }
        adjusted = holm([test.p_value for test in tests.values()])
        for (metric, test), p_holm in zip(tests.items(), adjusted, strict=True):
            word, needed = judge(test, p_holm, margins[metric])
            rows.append(
                {
                    "metric": metric, "group": group, "a": a.checkpoint, "b": b.checkpoint,
                    "num_prompts": test.num_prompts, "mean_a": test.mean_a, "mean_b": test.mean_b,
                    "difference": test.difference, "low": test.low, "high": test.high, "p_value": test.p_value,
                    "p_holm": p_holm, "margin": margins[metric], "win_rate": test.win_rate, "verdict": word,
                    "num_needed": needed,
                }
            )  # fmt: skip
    return TABLES["verdicts"].conform(pl.DataFrame(rows, schema=TABLES["verdicts"].schema))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given. Source: Holm, Scand. J. Statist. 6 (1979),
    65-70."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = highest
    return adjusted


def judge(test: "PairedTest", p_holm: float, margin: float) -> tuple[str, int | None]:
    """One verdict in a word, and the number of prompts that would decide where it does not.

    Args:
        test: The paired test.
        p_holm: Its p value after Holm.
        margin: Difference that matters.
    """
    if test.num_prompts < MIN_PROMPTS:
        return "too_few_prompts", MIN_PROMPTS
    size = abs(test.difference)
    if p_holm <= 1 - CONFIDENCE and size >= margin:
        return ("better" if test.difference > 0 else "worse"), None
    if -margin < test.low and test.high < margin:
        return "same", None
    # To be called different, the difference must stand out from zero; to be called the same, from
    # the margin.
    distance = size if size >= margin else margin - size
    if distance <= 0:
        return "unclear", _MAX_NEEDED
    needed = math.ceil(
        min(test.num_prompts * (_POWER_QUANTILES * test.error / distance) ** 2, _MAX_NEEDED)
    )
    return "unclear", max(needed, test.num_prompts + 1)


def sentence(row: Mapping[str, object]) -> str:
    """A row of table `verdicts` as people read it."""
    words = {
        "better": "better", "worse": "worse", "same": "the same within the margin", "unclear": "unclear",
        "too_few_prompts": "too few prompts to tell",
    }  # fmt: skip
    needed = (
        f"; about {row['num_needed']} prompts would do" if row["num_needed"] is not None else ""
    )
    if needed and row["group"] == HELD_OUT:
        needed = f"; a set of about {row['num_needed']} prompts would do"
    return (
        f"{row['metric']} ({row['group']}): {words[str(row['verdict'])]}, {row['difference']:+.4f} "
        f"[{row['low']:+.4f}, {row['high']:+.4f}] over {row['num_prompts']} prompts{needed}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """The paired t test of one metric in one group."""

    num_prompts: int
    mean_a: float
    mean_b: float
    difference: float
    error: float
    low: float
    high: float
    p_value: float
    win_rate: float

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> "PairedTest":
        """Of scores `(N,)` in the same order of prompts; a single pair has an infinite interval."""
        from scipy.special import (
            stdtr,
            stdtrit,
        )  # here: `sentence` is used where the graph is drawn

        count = len(a)
        differences = b - a
        mean = float(differences.mean())
        error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        if count < 2:
            half, p_value = math.inf, 1.0
        elif error == 0:
            half, p_value = 0.0, 1.0 if mean == 0 else 0.0
        else:
            half = error * float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
            p_value = 2 * float(stdtr(count - 1, -abs(mean) / error))
        return cls(
            num_prompts=count, mean_a=float(a.mean()), mean_b=float(b.mean()), difference=mean, error=error,
            low=mean - half, high=mean + half, p_value=p_value, win_rate=float((differences > 0).mean()),
        )  # fmt: skip


def _refuse_unlike(a: Scores, b: Scores) -> None:
    unlike = [
        f"{item.name} {' and '.join(_where_they_part(getattr(a.protocol, item.name), getattr(b.protocol, item.name)))}"
        for item in dataclasses.fields(Protocol)
        if getattr(a.protocol, item.name) != getattr(b.protocol, item.name)
    ]
    if unlike:
        raise EvaluationError(
            f"{a.checkpoint} and {b.checkpoint} cannot be compared, their scores were made with different "
            f"{'; '.join(unlike)}: evaluate both with one protocol"
        )


def _where_they_part(one: str, other: str) -> tuple[str, str]:
    """The first difference of two texts, with the key before it where they are JSON."""
    parts = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    start = max(next(parts, min(len(one), len(other))) - 20, 0)
    return one[start : start + 40], other[start : start + 40]


def _pair(a: Scores, b: Scores, metric: str) -> pl.DataFrame:
    """`prompt_id, group, a, b` per prompt, sorted by prompt."""
    sides = [
        side.metrics.filter(
            (pl.col("metric") == metric) & pl.col("prompt_id").is_not_null()
        ).select("prompt_id", "group", pl.col("value").alias(name))
        for side, name in ((a, "a"), (b, "b"))
    ]
    joined = (
        sides[0]
        .join(sides[1], on=["prompt_id", "group"], how="full", coalesce=True)
        .sort("prompt_id")
    )
    if joined.is_empty():
        raise EvaluationError(f"{a.checkpoint} and {b.checkpoint} have no scores {metric!r}")
    usable = pl.col("a").is_finite().fill_null(False) & pl.col("b").is_finite().fill_null(False)
    odd = joined.filter(~usable)
    if odd.height:
        raise EvaluationError(
            f"{metric} of {odd.height} prompts, such as {odd['prompt_id'][0]!r}, is missing or not finite for "
            f"{a.checkpoint} or {b.checkpoint}: sample and score both again"
        )
    return joined
