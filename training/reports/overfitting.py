"""What a checkpoint's summary says of copies and of over-baking, in words, for report and card."""

from collections.abc import Mapping, Sequence

from training.evaluation import overbaked
from training.names import CheckpointName
from training.reports.charts import Chart, Line

Summaries = Sequence[tuple[str, Mapping[str, float]]]
"""Checkpoint, as `<run>@<samples_seen>`, and its summary, in the order of training."""

_QUANTILES = ("p50", "p95", "max")
_OVER_THE_RUN = {
    "CLIP score, mean": "Clipscore_mean",
    "LAION aesthetic, mean": "mean_LAIONScore",
    "Nearest training image, 95th percentile of cosines": "train_similarity_p95",
    "Over-baked index": "overbaked_index",
}


def sentences(summaries: Summaries) -> list[str]:
    """What is to be known of the last checkpoint, a sentence each; none where nothing was
    measured."""
    _, last = summaries[-1]
    found = []
    if own := _quantiles(last, "train_similarity"):
        found.append(
            f"Cosine of each image with its nearest training image (CLIP neighbours), p50 / p95 / max: {own}."
        )
        if held_out := _quantiles(last, "train_similarity_validation"):
            share = last.get("train_similarity_above_p95", 0.0)
            found.append(
                f"The same of held-out images, which cannot be copies: {held_out}; {share:.0%} of the images lie "
                "above their p95, about 5% without copying."
            )
    if (index := last.get("overbaked_index")) is not None:
        borders = last.get("border_share", 0.0)
        found.append(
            f"Over-baked index {index:.2f}, 0 unless saturation and contrast both exceed the base's and the training "
            f"images'; {borders:.0%} of the images have uniform borders."
        )
    if any(overbaked.alarms(summary) for _, summary in summaries):
        what = "; ".join(overbaked.alarms(last)) or "none here, but at an earlier checkpoint"
        found.append(
            f"Alarm: {what}. Last checkpoint before it: {overbaked.last_before_alarm(summaries) or 'none'}."
        )
    return found


def score_charts(summaries: Summaries) -> list[Chart]:
    """Scores and warnings over samples seen, for those that at least two checkpoints have; a base
    stands at 0."""
    charts = []
    for title, column in _OVER_THE_RUN.items():
        points = [
            (CheckpointName.parse(name).samples_seen, summary[column])
            for name, summary in summaries
            if abs(summary.get(column, float("nan"))) < float("inf")
        ]
        if len(points) > 1:
            charts.append(Chart(title=title, lines=[Line(name="all prompts", points=points)]))
    return charts


def _quantiles(summary: Mapping[str, float], stem: str) -> str:
    values = [summary.get(f"{stem}_{name}") for name in _QUANTILES]
    return "" if None in values else " / ".join(f"{value:.3f}" for value in values)
