"""What of a checkpoint's scores goes to MLflow, and under which names."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from resources.mlflow import calls

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_HEADLINES = frozenset(
    {"clip_score_mean", "aesthetic_mean", "num_failed", "cmmd", "train_similarity_p95"}
)
"""Of the summary what is looked at first: are images better, are some missing, do they repeat the
training set?"""


def points(metrics: pl.DataFrame) -> dict[str, float]:
    """Summary and means by group under names that MLflow takes; what is not finite is left out.

    What stands before the slash is a section of MLflow's page: `eval` has the headlines,
    `eval_spread` the rest of the summary, `eval_groups` means by group of prompts.

    Args:
        metrics: Rows of table `eval_metrics`.
    """
    summary = metrics.filter(pl.col("prompt_id").is_null() & pl.col("value").is_finite())
    named = {
        _metric_name(name): value for name, value in summary.select("metric", "value").iter_rows()
    }
    found = {
        f"{'eval' if name in _HEADLINES else 'eval_spread'}/{name}": value
        for name, value in named.items()
    }
    own = metrics.filter(pl.col("prompt_id").is_not_null() & pl.col("value").is_finite())
    means = own.group_by("metric", "group").agg(pl.col("value").mean()).sort("metric", "group")
    return found | {
        f"eval_groups/{metric} {calls.slug(group)}": value
        for metric, group, value in means.iter_rows()
    }


def _metric_name(column: str) -> str:
    """`25%_LAIONScore` -> `aesthetic_q25`, `Clipscore_mean` -> `clip_score_mean`; ours have their
    names already."""
    if column.startswith("Clipscore_"):
        return f"clip_score_{column.removeprefix('Clipscore_')}"
    if column.endswith("_LAIONScore"):
        name = column.removesuffix("_LAIONScore")
        return f"aesthetic_q{name[:-1]}" if name.endswith("%") else f"aesthetic_{name}"
    return column


def log(
    client: "MlflowClient",
    run: "Run",
    model_id: str,
    step: int,
    scores: Mapping[str, float],
) -> None:
    """Log scores that are not there with the same value: scoring again replaces, sending again
    does nothing."""
    from mlflow.entities import Metric

    run_id, now = run.info.run_id, time.time_ns() // 1_000_000
    new = []
    for name, value in scores.items():
        history = [item for item in client.get_metric_history(run_id, name) if item.step == step]
        latest = max(history, key=lambda item: item.timestamp, default=None)
        if latest is None or latest.value != value:
            new.append(Metric(name, value, now, step, model_id=model_id, run_id=run_id))
    calls.log_batch(client, run_id, metrics=new)
