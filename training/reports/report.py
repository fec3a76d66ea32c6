"""One HTML file that shows checkpoints side by side: sliders, winners and losers, a grid, verdicts,
curves. It asks the network for nothing, so it can be mailed, kept beside the weights, or opened in
MLflow's sandbox.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl

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
    title_of,
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
"""Columns up to which the grid's pictures are large."""
_MAX_TEXT, _MAX_NAME = 500, 80

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """Pictures that belong together, such as a sample image and the training image nearest to
    it."""

    pictures: Sequence[np.ndarray]
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
        sides: Checkpoints from left to right, at least two; sliders, changes and verdicts are first
            against last.
        verdicts: Rows of table `verdicts`; may be empty.
        facts: A line of small print each.
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
    others = images.rules_of_arrays(_section_pictures(sections))
    rules, lost = _rules(shown, featured, names, others)
    if lost:
        shown = [_without(prompt, names[prompt.prompt_id], lost) for prompt in shown]
        facts = {
            **facts,
            "pictures that are missing or damaged": f"{len(lost)}, run foundry verify --repair",
        }
    parts = [
        ("Before and after", _first(first, sides, names, metrics)),
        (
            "Winners and losers",
            "".join(_extremes(m, *winning[m], sides, names, metrics) for m in metrics),
        ),
        ("All prompts", _grid(shown, len(everything), sides, names, metrics)),
        ("Verdict", verdict_table(verdicts)),
        ("Groups", "".join(_groups(everything, sides, metric) for metric in metrics)),
        ("Training", _training(charts, maps)),
        *((section.title, _section(number, section)) for number, section in enumerate(sections)),
    ]
    parts = [(name, content) for name, content in parts if content]
    body = "".join(
        f"<h2 id=h{n}>{_show(name)}</h2>{content}" for n, (name, content) in enumerate(parts)
    )
    links = "".join(f"<a href='#h{n}'>{_show(name)}</a>" for n, (name, _) in enumerate(parts))
    small = " · ".join(f"{_show(str(name))}: {_show(str(value))}" for name, value in facts.items())
    return (
        f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{page.POLICY}"><meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_show(title)}</title><style>{page.STYLE}{rules}</style></head><body><h1>{_show(title)}</h1>"
        f"<p class=muted>{small}</p>{headlines(verdicts)}<nav>{links}</nav>{body}{page.DIALOG}"
        f"<script>{page.SCRIPT}</script></body></html>\n"
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
    """The pictures, after those of sections: large where a slider shows them, else small, in the
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
    """The prompt without the pictures that cannot be read."""
    files = [None if f"{name}s{place}" in lost else path for place, path in enumerate(prompt.files)]
    return replace(prompt, files=tuple(files))


def _first(
    prompts: Sequence[Prompt],
    sides: Sequence[Side],
    names: Mapping[str, str],
    metrics: Sequence[str],
) -> str:
    about = (
        f"{_show(sides[0].checkpoint)} on the left, {_show(sides[-1].checkpoint)} on the right, equal prompts and "
        "seeds; drag to compare. These prompts were taken by their names, not by their pictures."
    )
    cards = "".join(_slider(prompt, sides, names, metrics) for prompt in prompts)
    return f"<p class=muted>{about}</p><div class=cards>{cards}</div>" if prompts else ""


def _extremes(
    metric: str, gained: Sequence[Prompt], lost: Sequence[Prompt], sides: Sequence[Side], names: Mapping[str, str],
    metrics: Sequence[str],
) -> str:  # fmt: skip
    """The sliders of the largest gains and losses on a metric."""
    parts = []
    for word, prompts in (("gains", gained), ("losses", lost)):
        if prompts:
            cards = "".join(_slider(prompt, sides, names, metrics) for prompt in prompts)
            parts.append(
                f"<h3>Largest {word} in {_show(title_of(metric))}</h3><div class=cards>{cards}</div>"
            )
    return "".join(parts)


def _slider(
    prompt: Prompt, sides: Sequence[Side], names: Mapping[str, str], metrics: Sequence[str]
) -> str:
    last = len(sides) - 1
    halves = "".join(
        f'<div class="pic {names[prompt.prompt_id]}s{place}" role=img aria-label="{_show(sides[place].label)}"></div>'
        for place in (0, last)
    )
    changes = " · ".join(
        f"{_show(title_of(m))} <span class={'up' if prompt.changes[m] > 0 else 'down'}>{prompt.changes[m]:+.3f}</span>"
        for m in metrics
        if m in prompt.changes
    )
    return (
        f"<figure><div class=pair style='{_shape(prompt)}'>{halves}"
        "<input type=range min=0 max=100 value=50 aria-label='before and after'>"
        f"<b>{_show(sides[0].label)}</b><b>{_show(sides[last].label)}</b></div><figcaption>"
        f"<p class=ask>{_show(prompt.text, _MAX_TEXT)}</p><small>{_show(prompt.prompt_id)} · {_show(prompt.group)}"
        f"{' · ' if changes else ''}{changes}</small></figcaption></figure>"
    )


def _grid(
    shown: Sequence[Prompt],
    total: int,
    sides: Sequence[Side],
    names: Mapping[str, str],
    metrics: Sequence[str],
) -> str:
    """The table of all prompts over all sides, with its choices of group and order."""
    groups = sorted({prompt.group for prompt in shown})
    head = "".join(
        f"<th title='{_show(side.checkpoint)}'>{_show(side.label)}</th>" for side in sides
    )
    rows = []
    for place, prompt in enumerate(shown):
        data = "".join(
            f" data-change{n}='{prompt.changes.get(metric, 0):.6g}'"
            for n, metric in enumerate(metrics)
        )
        cells = "".join(_cell(prompt, number, side, names) for number, side in enumerate(sides))
        rows.append(
            f"<tr data-group={groups.index(prompt.group)} data-place={place}{data}><td>"
            f"<p class=ask>{_show(prompt.text, _MAX_TEXT)}</p><small class=muted>{_show(prompt.prompt_id)} · "
            f"{_show(prompt.group)}</small></td>{cells}</tr>"
        )
    of_groups = "".join(
        f"<option value={number}>{_show(group)}</option>" for number, group in enumerate(groups)
    )
    orders = "".join(
        f"<option value={n}>{_show(title_of(m))}: gains first</option>"
        for n, m in enumerate(metrics)
    )
    few = " few" if len(sides) <= _FEW else ""
    cut = f"{len(shown)} of {total} prompts. " if len(shown) < total else ""
    return (
        f"<p class=muted>{cut}Click a picture to enlarge it; there, ← and → go through the checkpoints, ↑ and ↓ "
        f"through the prompts.</p><div class=bar><select id=group aria-label=group><option value=''>all groups</option>"
        f"{of_groups}</select><select id=order aria-label=order><option value=''>by prompt</option>{orders}</select>"
        f"</div><div class='wide grid{few}'><table><tr><th>prompt</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _cell(prompt: Prompt, place: int, side: Side, names: Mapping[str, str]) -> str:
    if prompt.files[place] is None:
        return "<td><div class=gap>no picture</div></td>"
    name = f"{names[prompt.prompt_id]}s{place}"
    scores = "<br>".join(
        f"{_show(title_of(m))} {prompt.scores[place][m]:.3f}" for m in prompt.scores[place]
    )
    return (
        f'<td><button class="pic {name}" data-name={name} style="{_shape(prompt)}" '
        f'title="{_show(side.label)}"></button><small class=muted>{scores}</small></td>'
    )


def _groups(prompts: Sequence[Prompt], sides: Sequence[Side], metric: str) -> str:
    """The means of a metric by group and side."""
    head = "".join(f"<th class=number>{_show(side.label)}</th>" for side in sides)
    rows = []
    for group, count, means in group_means(prompts, metric):
        cells = "".join(
            f"<td class=number>{'–' if mean is None else f'{mean:.4f}'}</td>" for mean in means
        )
        change = "" if means[0] is None or means[-1] is None else f"{means[-1] - means[0]:+.4f}"
        word = "up" if change.startswith("+") else "down"
        rows.append(
            f"<tr><td>{_show(group)}</td><td class=number>{count}</td>{cells}"
            f"<td class='number {word}'>{change}</td></tr>"
        )
    return (
        f"<h3>{_show(title_of(metric))}, means by group</h3><div class=wide><table><tr><th>prompts</th>"
        f"<th class=number>n</th>{head}<th class=number>change</th></tr>{''.join(rows)}</table></div>"
    )


def _training(charts: Sequence[Chart], maps: Sequence[Map]) -> str:
    drawn = "".join(draw_chart(chart) for chart in charts)
    return (f"<div class=charts>{drawn}</div>" if drawn else "") + "".join(
        draw_map(shown) for shown in maps
    )


def _section_pictures(sections: Sequence[Section]) -> list[tuple[str, np.ndarray]]:
    return [
        (f"x{number}e{place}n{n}", picture)
        for number, section in enumerate(sections)
        for place, exhibit in enumerate(section.exhibits)
        for n, picture in enumerate(exhibit.pictures)
    ]


def _section(number: int, section: Section) -> str:
    cards = []
    for place, exhibit in enumerate(section.exhibits):
        pictures = "".join(
            f'<div class="pic x{number}e{place}n{n}" style="--r:{picture.shape[1]}/{picture.shape[0]}" role=img></div>'
            for n, picture in enumerate(exhibit.pictures)
        )
        caption = _show(exhibit.caption, _MAX_TEXT)
        cards.append(
            f"<figure><div class=several>{pictures}</div><figcaption>{caption}</figcaption></figure>"
        )
    return f"<p class=muted>{_show(section.text, 2 * _MAX_TEXT)}</p><div class=cards>{''.join(cards)}</div>"


def _shape(prompt: Prompt) -> str:
    return f"--r:{prompt.width}/{prompt.height}"


def _show(text: str, most: int = _MAX_NAME) -> str:
    """Text from data: cut, and escaped."""
    return escape(text if len(text) <= most else f"{text[: most - 1]}…")
