"""Verdicts as HTML: a headline for each metric, and the table with its intervals drawn."""

import math
from collections.abc import Mapping
from html import escape

import polars as pl

from training.evaluation.verdict import ALL
from training.reports.charts import interval_bar
from training.reports.scores import LEADING, title_of

_WORDS = {
    "better": "better", "worse": "worse", "same": "same", "unclear": "unclear", "too_few_prompts": "too few prompts",
}  # fmt: skip
_HEADS = (
    "<th>metric</th><th>prompts</th><th>verdict</th><th class=middle>95 % interval of the difference</th>"
    + "".join(
        f"<th class=number>{name}</th>"
        for name in ("difference", "n", "before", "after", "p (Holm)", "wins")
    )
)


def headlines(verdicts: pl.DataFrame) -> str:
    """A tile for each metric over all prompts; empty without verdicts."""
    reach = _reach(verdicts)
    tiles = [
        f"<div class=tile><b>{escape(title_of(str(row['metric'])))}</b>{_chip(row)} <span class='number muted'>"
        f"{row['mean_a']:.4f} → {row['mean_b']:.4f}</span>{_bar(row, reach)}<small class='number muted'>"
        f"{row['difference']:+.4f}, {_interval(row)}; {row['num_prompts']} prompts</small></div>"
        for row in in_order(verdicts)
        if row["group"] == ALL
    ]
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def verdict_table(verdicts: pl.DataFrame) -> str:
    """All verdicts, those over all prompts first; empty without verdicts."""
    if verdicts.is_empty():
        return ""
    reach = _reach(verdicts)
    rows = []
    for row in in_order(verdicts):
        needed = (
            f"<br><small class=muted>{row['num_needed']:,} prompts would do</small>"
            if row["num_needed"]
            else ""
        )
        numbers = (
            f"{row['difference']:+.4f}", row["num_prompts"], f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}",
            f"{row['p_holm']:.2g}", f"{row['win_rate']:.0%}",
        )  # fmt: skip
        cells = "".join(f"<td class=number>{value}</td>" for value in numbers)
        rows.append(
            f"<tr><td>{escape(title_of(str(row['metric'])))}</td><td>{escape(str(row['group'])[:80])}</td><td>{_chip(row)}{needed}</td>"
            f"<td class=middle>{_bar(row, reach)}<br><small class=muted>{_interval(row)}</small></td>{cells}</tr>"
        )
    return (
        "<p class=muted>Paired by prompt with equal seeds; the grey band is the margin that matters in practice. These "
        "metrics are trip wires and no judges of taste: look at the pictures.</p>"
        f"<div class=wide><table><tr>{_HEADS}</tr>{''.join(rows)}</table></div>"
    )


def in_order(verdicts: pl.DataFrame) -> list[dict[str, object]]:
    """Rows of table `verdicts`, those over all prompts first, CLIP score and aesthetic before other
    metrics."""
    rows = verdicts.sort("group", "metric").to_dicts()
    return sorted(
        rows, key=lambda row: (row["group"] != ALL, _place(str(row["metric"])), row["group"])
    )


def _place(metric: str) -> tuple[int, str]:
    return (LEADING.index(metric) if metric in LEADING else len(LEADING), metric)


def _chip(row: Mapping[str, object]) -> str:
    word = str(row["verdict"])
    return f"<span class='chip {escape(word)}'>{escape(_WORDS.get(word, word))}</span>"


def _interval(row: Mapping[str, object]) -> str:
    return f"{row['low']:+.4f} … {row['high']:+.4f}"


def _bar(row: Mapping[str, object], reach: Mapping[str, float]) -> str:
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
