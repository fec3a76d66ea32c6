"""One HTML file that shows checkpoints side by side: sliders, winners and losers, a grid, verdicts,
curves. It asks the network for nothing, so it can be mailed, kept beside the weights, or opened in
MLflow's sandbox.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from markupsafe import Markup

from training.reports import images, page
from training.reports.charts import Chart, Map, draw_chart, draw_map
from training.reports.images import FULL_PX, FULL_ROOM, ROOM, THUMBNAIL_PX
from training.reports.scores import (
    Prompt,
    Side,
    collect,
    extremes,
    group_means,
    in_turn,
    judged_metrics,
)
from training.reports.verdicts import headlines, verdict_table

MAX_BYTES = 10_000_000
"""Of a report, at most."""
MAX_PROMPTS, MAX_SIDES = 256, 8
"""Prompts and checkpoints that a report shows; of more checkpoints the first, the last, and some
evenly between."""
NUM_FIRST = 8
"""Sliders at the top, of each group in turn."""
_NUM_EXTREME = 8
"""Winners over all metrics, and as many losers."""
_FEW = 3
"""Columns up to which the grid's images are large."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """Images that belong together, such as a sample image and the training image nearest to
    it."""

    images: Sequence[np.ndarray]
    """`(H, W, 3)` uint8 each, shown beside each other."""
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A further section of the report."""

    title: str
    text: str
    """A sentence or two on what is shown, and how to read it."""
    exhibits: Sequence[Exhibit] = ()


def render(
    title: str, sides: Sequence[Side], verdicts: pl.DataFrame, facts: Mapping[str, object], *,
    charts: Sequence[Chart] = (), maps: Sequence[Map] = (), sections: Sequence[Section] = (),
) -> str:  # fmt: skip
    """Write the report.

    Args:
        title: Headline.
        sides: Checkpoints from left to right, at least two; sliders, changes and verdicts compare
            the last with the first.
        verdicts: Rows of table `verdicts`; may be empty.
        facts: Name and value of each item of the small print.
        charts: Curves of the run.
        maps: Maps of change, such as the losses by timestep.
        sections: What else is to be shown, after all that.

    Returns:
        An HTML page of at most 10 MB; everything that comes from data is escaped, long texts are
        cut.
    """
    assert len(sides) >= 2, "a report compares"
    sides = spread(sides)
    metrics = judged_metrics(sides, verdicts)
    everything = collect(sides, metrics)
    first = in_turn(everything, NUM_FIRST)
    winning = {m: extremes(everything, m, max(_NUM_EXTREME // len(metrics), 1)) for m in metrics}
    featured = {p.prompt_id for p in first}
    featured |= {p.prompt_id for pair in winning.values() for half in pair for p in half}
    shown = _shown(everything, featured)
    names = {prompt.prompt_id: f"p{number}" for number, prompt in enumerate(shown)}
    others = images.rules_of_arrays(_section_images(sections))
    rules, lost = _rules(shown, featured, names, others)
    if lost:
        shown = [_without(prompt, names[prompt.prompt_id], lost) for prompt in shown]
        facts = {
            **facts,
            "images that are missing or damaged": f"{len(lost)}, run foundry verify --repair",
        }
    compared = {"sides": sides, "names": names, "metrics": metrics}
    parts = [
        (
            "Before and after",
            page.render("before_after", prompts=first, **compared) if first else "",
        ),
        ("Winners and losers", page.render("extremes", winning=winning, **compared)),
        ("All prompts", _grid(shown, len(everything), compared)),
        ("Verdict", verdict_table(verdicts)),
        ("Groups", _groups(everything, sides, metrics)),
        ("Training", _training(charts, maps)),
        *((section.title, _section(number, section)) for number, section in enumerate(sections)),
    ]
    return page.render_page(
        title,
        images=rules,
        facts=facts,
        headlines=headlines(verdicts),
        parts=[(name, content) for name, content in parts if content],
    )


def spread(items: Sequence[_T]) -> list[_T]:
    """Of more checkpoints than a report has columns the first, the last, and some evenly
    between."""
    if len(items) <= MAX_SIDES:
        return list(items)
    return [
        items[round(number * (len(items) - 1) / (MAX_SIDES - 1))] for number in range(MAX_SIDES)
    ]


def _shown(prompts: Sequence[Prompt], featured: set[str]) -> list[Prompt]:
    """The featured prompts, and of each group in turn as many others as there is room for, by
    id."""
    others = [prompt for prompt in prompts if prompt.prompt_id not in featured]
    kept = featured | {prompt.prompt_id for prompt in in_turn(others, MAX_PROMPTS - len(featured))}
    return [prompt for prompt in prompts if prompt.prompt_id in kept]


def _rules(
    shown: Sequence[Prompt], featured: set[str], names: Mapping[str, str], others: str
) -> tuple[str, set[str]]:
    """The images, after those of sections: large where a slider shows them, else small, in the
    room that is left; and the classes of those that cannot be read."""
    large: list[tuple[str, Path]] = []
    small: list[tuple[str, Path]] = []
    for prompt in shown:
        for place, path in enumerate(prompt.files):
            in_slider = prompt.prompt_id in featured and place in (0, len(prompt.files) - 1)
            if path is not None:
                (large if in_slider else small).append((f"{names[prompt.prompt_id]}s{place}", path))
    first, lost = images.rules_of_files(large, FULL_PX, FULL_ROOM)
    rest, more = images.rules_of_files(small, THUMBNAIL_PX, ROOM - len(others) - len(first))
    return others + first + rest, {*lost, *more}


def _without(prompt: Prompt, name: str, lost: set[str]) -> Prompt:
    """The prompt without the images that cannot be read."""
    files = [None if f"{name}s{place}" in lost else path for place, path in enumerate(prompt.files)]
    return replace(prompt, files=tuple(files))


def _grid(shown: Sequence[Prompt], total: int, compared: Mapping[str, Any]) -> Markup:
    """The table of all prompts over all sides, with its choices of group and order."""
    groups = sorted({prompt.group for prompt in shown})
    few = len(compared["sides"]) <= _FEW
    return page.render("grid", prompts=shown, total=total, groups=groups, few=few, **compared)


def _groups(prompts: Sequence[Prompt], sides: Sequence[Side], metrics: Sequence[str]) -> Markup:
    """The means of each metric by group and side."""
    means: dict[str, list[dict[str, object]]] = {metric: [] for metric in metrics}
    for metric, rows in means.items():
        for group, count, values in group_means(prompts, metric):
            first, last = values[0], values[-1]
            change = "" if first is None or last is None else f"{last - first:+.4f}"
            rows.append({"group": group, "count": count, "means": values, "change": change})
    return page.render("groups", means=means, sides=sides)


def _training(charts: Sequence[Chart], maps: Sequence[Map]) -> Markup:
    drawn = [image for chart in charts if (image := draw_chart(chart))]
    return page.render("training", charts=drawn, maps=[draw_map(shown) for shown in maps])


def _section_images(sections: Sequence[Section]) -> list[tuple[str, np.ndarray]]:
    return [
        item
        for number, section in enumerate(sections)
        for pictures in _named(number, section)
        for item in pictures
    ]


def _named(number: int, section: Section) -> list[list[tuple[str, np.ndarray]]]:
    """The images of each exhibit with their CSS classes."""
    return [
        [(f"x{number}e{place}n{n}", image) for n, image in enumerate(exhibit.images)]
        for place, exhibit in enumerate(section.exhibits)
    ]


def _section(number: int, section: Section) -> Markup:
    return page.render("section", section=section, exhibit_images=_named(number, section))
