"""Verdicts as HTML: a headline for each metric, and the table with its intervals drawn."""

import math
from collections.abc import Mapping

import polars as pl
from markupsafe import Markup

from training.evaluation.verdict import ALL
from training.reports import page
from training.reports.charts import interval_bar
from training.reports.scores import LEADING


def headlines(verdicts: pl.DataFrame) -> Markup:
    """A tile for each metric over all prompts; empty without verdicts."""
    rows = [row for row in _with_bars(verdicts) if row["group"] == ALL]
    return page.render("headlines", rows=rows)


def verdict_table(verdicts: pl.DataFrame) -> Markup:
    """All verdicts, those over all prompts first; empty without verdicts."""
    rows = _with_bars(verdicts)
    return page.render("verdicts", rows=rows) if rows else Markup()


def in_order(verdicts: pl.DataFrame) -> list[dict[str, object]]:
    """Rows of table `verdicts`, those over all prompts first, CLIP score and aesthetic before other
    metrics."""
    rows = verdicts.sort("group", "metric").to_dicts()
    return sorted(
        rows, key=lambda row: (row["group"] != ALL, _place(str(row["metric"])), row["group"])
    )


def _place(metric: str) -> tuple[int, str]:
    return (LEADING.index(metric) if metric in LEADING else len(LEADING), metric)


def _with_bars(verdicts: pl.DataFrame) -> list[dict[str, object]]:
    """Rows in order, with their intervals drawn."""
    reach = _reach(verdicts)
    return [{**row, "bar": _bar(row, reach)} for row in in_order(verdicts)]


def _bar(row: Mapping[str, object], reach: Mapping[str, float]) -> Markup:
    low, middle, high, margin = (
        float(str(row[name])) for name in ("low", "difference", "high", "margin")
    )
    return interval_bar(low, middle, high, margin, reach[str(row["metric"])])


def _reach(verdicts: pl.DataFrame) -> dict[str, float]:
    """The farthest end of any finite interval, by metric, so that bars of one metric compare."""
    reach: dict[str, float] = {}
    for row in verdicts.iter_rows(named=True):
        ends = [abs(row[name]) for name in ("low", "high", "margin") if math.isfinite(row[name])]
        reach[row["metric"]] = max([reach.get(row["metric"], 0.0), *ends])
    return reach
