"""Charts of an HTML page as SVG and tables: lines over samples seen, maps of change, intervals.
They ask for no script.

Colours are CSS variables of the page (`--s0` to `--s3`, `--line`, `--muted`), so that charts follow
light and dark.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from training.reports import page

Points = Sequence[tuple[int, float]]
"""`(samples_seen, value)` in order; values are finite."""

NUM_COLOURS = 4
_MAX_POINTS = 400
_MAX_COLUMNS = 40
_MAX_NUMBERED = 10
"""Columns up to which a map's cells hold numbers."""
_BAR = (180, 20)
_FULL_COLOUR = math.log(1.25)
"""Change from which a cell has its full colour, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    points: Points
    faint: bool = False
    """Drawn behind the others, without a colour of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over samples seen."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[int] = ()
    """Samples seen that get a dashed line, such as the checkpoints shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """How values changed since the first column, a row for each."""

    title: str
    note: str
    """A sentence on how to read it."""
    columns: Sequence[int]
    """Samples seen."""
    rows: Mapping[str, Sequence[float | None]]
    """Name -> value per column, greater than 0; None for none."""


def draw_chart(chart: Chart) -> Markup:
    """A chart as a figure with axes and a legend; empty where no line has two points."""
    lines = [line for line in chart.lines if len(line.points) > 1]
    if not lines:
        return Markup()
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    first, last = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> str:
        return f"{(x - first) / ((last - first) or 1) * 300:.1f},{150 - (y - low) / (high - low) * 150:.1f}"

    # Line by line: those behind come first, colours go by the order in the legend.
    coloured = [
        (f"c{number % NUM_COLOURS}", line)
        for number, line in enumerate(line for line in lines if not line.faint)
    ]
    kinds = [*(("faint", line) for line in lines if line.faint), *coloured]
    return page.render(
        "chart",
        title=chart.title,
        first=first,
        last=last,
        ticks=[((tick - low) / (high - low) * 100, _number(tick, ticks)) for tick in ticks],
        rules=[place(first, tick) for tick in ticks],
        marks=[place(mark, low) for mark in chart.marks if first <= mark <= last],
        lines=[(kind, [place(x, y) for x, y in _kept(line.points)]) for kind, line in kinds],
        legend=[(kind, line.name, line.points[-1][1]) for kind, line in coloured],
    )


def draw_map(shown: Map) -> Markup:
    """A map as a table: green where the value fell since the first column, red where it rose; empty
    without rows."""
    if len(shown.columns) < 2 or not shown.rows:
        return Markup()
    picked = _spread(len(shown.columns), _MAX_COLUMNS)
    changes = {name: _changes(values) for name, values in shown.rows.items()}
    strongest = max((abs(c) for row in changes.values() for c in row if c is not None), default=0.0)
    full = max(strongest, _FULL_COLOUR)
    rows = [
        {
            "name": name,
            "cells": [_cell(shown.columns[n], values[n], changes[name][n], full) for n in picked],
            "change": None if (final := changes[name][-1]) is None else math.expm1(final),
        }
        for name, values in shown.rows.items()
    ]
    columns = [shown.columns[n] for n in picked]
    numbered = len(picked) <= _MAX_NUMBERED
    return page.render("map", shown=shown, columns=columns, numbered=numbered, rows=rows)


def interval_bar(low: float, middle: float, high: float, margin: float, reach: float) -> Markup:
    """An interval around its middle, over the margin's band and the line at zero.

    Args:
        low: Lower end; the whole bar is empty where an end is not finite.
        middle: The estimate.
        high: Upper end.
        margin: Difference that matters, drawn as a band on both sides of zero.
        reach: Value at the bar's ends, the same for all bars that are compared.
    """
    width, height = _BAR
    if not (math.isfinite(low) and math.isfinite(high)):
        return Markup()

    def x(value: float) -> float:
        return width / 2 + max(min(value / (reach or 1), 1), -1) * (width / 2 - 6)

    places = {
        "low": x(low), "middle": x(middle), "high": x(high), "band": x(-margin),
        "band_width": max(x(margin) - x(-margin), 1),
    }  # fmt: skip
    at = {name: f"{place:.1f}" for name, place in places.items()}
    return page.render("interval", width=width, height=height, low=low, high=high, x=at)


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values from at most `low` to at least `high`, evenly apart; two where
    these are equal."""
    if not high - low > max(1e-9 * max(abs(low), abs(high)), 1e-300):
        room = abs(high) / 2 or 1.0
        return [low - room, high + room]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thin(points: Points, most: int) -> list[tuple[int, float]]:
    """At most `most` points: means over equal stretches of the list, so that no peak is picked by
    chance."""
    if len(points) <= most:
        return list(points)
    edges = [number * len(points) // most for number in range(most + 1)]
    parts = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(part[len(part) // 2][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def _kept(points: Points) -> Points:
    """As many points as a chart can show, the last among them."""
    step = -(-len(points) // _MAX_POINTS)
    return [*points[::step], *(points[-1:] if (len(points) - 1) % step else [])]


def _number(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many digits as its distance to the next one needs."""
    digits = max(0, 1 - math.floor(math.log10(abs(ticks[1] - ticks[0]) * 1.0001)))
    return f"{value:.{min(digits, 6)}f}" if abs(value) < 1e6 else f"{value:.2g}"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _changes(values: Sequence[float | None]) -> list[float | None]:
    """The logarithm of each value over the first one."""
    start = next((value for value in values if value is not None and value > 0), None)
    return [
        None if start is None or value is None or value <= 0 else math.log(value / start)
        for value in values
    ]


def _cell(
    samples_seen: int, value: float | None, change: float | None, full: float
) -> dict[str, object] | None:
    """What a map's cell shows; None for an empty one."""
    if value is None or change is None:
        return None
    return {
        "samples_seen": samples_seen,
        "value": value,
        "change": math.expm1(change),
        "colour": "220 38 38" if change > 0 else "22 163 74",
        "opacity": min(abs(change) / full, 1) * 0.75,
    }
