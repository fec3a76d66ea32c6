"""What a report says of each prompt: its scores on every side, who won and who lost, and the means
of each group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from training.errors import DataError
from training.evaluation.prompt_groups import counted
from training.evaluation.verdict import ALL
from training.names import CheckpointName

LEADING = ("clip_score", "aesthetic")
"""Metrics that come first, and that are shown where no verdict says which were judged."""
_KEYS = ("prompt_id", "metric", "value")
NAMES: Mapping[str, str] = {"clip_score": "CLIP score", "aesthetic": "LAION aesthetic"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One checkpoint of the report."""

    checkpoint: str
    """`<run>@<samples_seen>`."""
    samples: pl.DataFrame
    """Rows of table `sample_images`."""
    metrics: pl.DataFrame
    """Rows of table `eval_metrics`."""
    folder: Path
    """Where the images are."""

    @property
    def label(self) -> str:
        """As short as it can be said."""
        return label_of(self.checkpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt over all sides."""

    prompt_id: str
    text: str
    group: str
    height: int
    width: int
    files: tuple[Path | None, ...]
    """Image per side; None where none was drawn."""
    scores: tuple[Mapping[str, float], ...]
    """Finite scores per side, by metric."""
    changes: Mapping[str, float]
    """Last side minus first, of the metrics that both have."""


def label_of(checkpoint: str) -> str:
    """A checkpoint as people call it."""
    try:
        name = CheckpointName.parse(checkpoint)
    except DataError:
        return checkpoint  # a card shows what a table holds, whatever that is
    return "base" if name.is_base else name.external_name or checkpoint


def title_of(metric: str) -> str:
    """A metric as people call it."""
    return NAMES.get(metric, metric.replace("_", " "))


def judged_metrics(sides: Sequence[Side], verdicts: pl.DataFrame) -> list[str]:
    """The metrics that verdicts were given on, CLIP score and aesthetic first; without verdicts
    those two, as far as a side has them."""
    found = verdicts["metric"].unique().to_list() if verdicts.height else []
    if not found:
        had = {metric for side in sides for metric in side.metrics["metric"].unique().to_list()}
        found = [metric for metric in LEADING if metric in had]
    return sorted(
        found,
        key=lambda metric: (LEADING.index(metric) if metric in LEADING else len(LEADING), metric),
    )


def collect(sides: Sequence[Side], metrics: Sequence[str]) -> list[Prompt]:
    """Every prompt of any side, by id.

    Args:
        sides: From left to right.
        metrics: Scores to take along.
    """
    scores = [_scores(side, metrics) for side in sides]
    files: list[dict[str, Path]] = []
    about: dict[str, dict[str, object]] = {}
    for side in sides:
        rows = list(side.samples.iter_rows(named=True))
        files.append(
            {row["prompt_id"]: side.folder / row["file"] for row in rows if row["file"] is not None}
        )
        for row in rows:
            about.setdefault(row["prompt_id"], row)
    prompts = []
    for prompt_id in sorted(about):
        row, own = about[prompt_id], tuple(table.get(prompt_id, {}) for table in scores)
        prompts.append(
            Prompt(
                prompt_id=prompt_id, text=str(row["text"]), group=str(row["group"]),
                height=int(str(row["height"])), width=int(str(row["width"])),
                files=tuple(table.get(prompt_id) for table in files),
                scores=own,
                changes={name: own[-1][name] - own[0][name] for name in metrics if name in own[0] and name in own[-1]},
            )
        )  # fmt: skip
    return prompts


def in_turn(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompt of each group, then the second of each, until there are `count`."""
    turns: dict[str, int] = {}
    placed = []
    for prompt in prompts:
        turn = turns.get(prompt.group, 0)
        turns[prompt.group] = turn + 1
        placed.append((turn, prompt.group, prompt.prompt_id, prompt))
    return [prompt for *_, prompt in sorted(placed, key=lambda item: item[:3])[:count]]


def extremes(
    prompts: Sequence[Prompt], metric: str, count: int
) -> tuple[list[Prompt], list[Prompt]]:
    """The `count` prompts that gained most on a metric, and the `count` that lost most, the largest
    change first."""
    changed = sorted(
        (p for p in prompts if metric in p.changes), key=lambda p: (-p.changes[metric], p.prompt_id)
    )
    gained = [prompt for prompt in changed if prompt.changes[metric] > 0]
    lost = [prompt for prompt in changed if prompt.changes[metric] < 0]
    return gained[:count], lost[::-1][:count]


def group_means(
    prompts: Sequence[Prompt], metric: str
) -> list[tuple[str, int, tuple[float | None, ...]]]:
    """Group, number of prompts, and the mean per side over those that have the score; `all` first.

    Where a group is the only one, it is `all`; which prompts that is, see `prompt_groups.counted`.
    """
    groups = sorted({prompt.group for prompt in prompts})
    ids = pl.DataFrame(
        {"prompt_id": [prompt.prompt_id for prompt in prompts]}, schema={"prompt_id": pl.String}
    )
    in_all = set(counted(ids)["prompt_id"])
    rows = []
    for group in [ALL, *(groups if len(groups) > 1 else [])]:
        own = [p for p in prompts if (p.prompt_id in in_all if group == ALL else p.group == group)]
        means = []
        for place in range(len(own[0].scores) if own else 0):
            values = [
                prompt.scores[place][metric] for prompt in own if metric in prompt.scores[place]
            ]
            means.append(math.fsum(values) / len(values) if values else None)
        rows.append((group, len(own), tuple(means)))
    return rows


def _scores(side: Side, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Finite scores by prompt, the metrics in their order."""
    own = side.metrics.filter(
        pl.col("prompt_id").is_not_null()
        & pl.col("metric").is_in(list(metrics))
        & pl.col("value").is_finite()
    )
    found = {
        (prompt_id, metric): value for prompt_id, metric, value in own.select(_KEYS).iter_rows()
    }
    return {
        prompt_id: {
            metric: found[prompt_id, metric] for metric in metrics if (prompt_id, metric) in found
        }
        for prompt_id in {prompt_id for prompt_id, _ in found}
    }
