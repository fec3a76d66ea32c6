"""One HTML file that shows a checkpoint beside its base: sliders, grid, verdicts, curves. It asks the network for
nothing, so it can be mailed, kept beside the weights, or opened in MLflow's sandbox.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import polars as pl
from PIL import Image

from training.evaluation.figures import data_uri, fit, jpeg

MAX_PICTURE_PX = 448
"""Longest side of a picture in the report; the files keep their size."""
_WORDS = {
    "better": "better", "worse": "worse", "same": "same", "unclear": "unclear", "too_few_prompts": "too few prompts",
}  # fmt: skip
_METRICS = ("clip_score", "aesthetic")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
:root { --ink: #1f2430; --muted: #6b7280; --paper: #f6f7f9; --card: #fff; --line: #e5e7eb; --accent: #4f43dd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --muted: #9aa3b2; --paper: #14161c; --card: #1d2029; --line: #2d323e; --accent: #8f86ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; } h2 { margin: 36px 0 12px; font-size: 18px; }
.muted, figcaption small { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-top: 8px; font-size: 13px; overflow-wrap: anywhere; }
figcaption p { margin: 0; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
.pair { position: relative; overflow: hidden; border-radius: 6px; --x: 50%; }
.pic { width: 100%; background: var(--line) center / 100% 100% no-repeat; }
.pair .pic + .pic { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--x)); }
.pair::after { content: ""; position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.pair input { position: absolute; inset: 0; z-index: 1; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
.pair b { position: absolute; bottom: 6px; padding: 0 6px; border-radius: 4px; background: #0009; color: #fff;
  font: 11px/18px system-ui; pointer-events: none; } .pair b:last-child { right: 6px; } .pair b { left: 6px; }
.pair b + b { left: auto; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.grid td { padding: 6px; } .grid td:first-child { padding: 10px 12px; max-width: 260px; overflow-wrap: anywhere; }
.grid .pic { width: 190px; border-radius: 4px; }
.chip { padding: 1px 9px; border-radius: 9px; font-size: 12px; font-weight: 600; white-space: nowrap;
  background: #8882; }
.better { background: #16a34a2b; color: #15803d; } .worse { background: #dc26262b; color: #dc2626; }
.chart { width: 100%; height: 150px; } .chart polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.chart line { stroke: var(--line); } .up { color: #15803d; } .down { color: #dc2626; }
"""
_SCRIPT = """
document.addEventListener('input', event => {
  if (event.target.type === 'range') event.target.parentNode.style.setProperty('--x', event.target.value + '%');
});
"""


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
    """Where the pictures are."""


def render(
    title: str, sides: Sequence[Side], verdicts: pl.DataFrame, curves: Mapping[str, Sequence[tuple[int, float]]],
    facts: Mapping[str, object], *, max_prompts: int = 60,
) -> str:  # fmt: skip
    """Write the report.

    Args:
        title: Headline.
        sides: Checkpoints from left to right; sliders compare the first with the last. At least two.
        verdicts: Rows of table `verdicts`; may be empty.
        curves: Name -> `(samples_seen, value)` in order.
        facts: A line of small print each.
        max_prompts: Prompts that are shown: those where CLIP score changed most in either direction, winners first.

    Returns:
        An HTML page; everything that comes from data is escaped.
    """
    assert len(sides) >= 2, "a report compares"
    prompts = _prompts(sides, max_prompts)
    styles = [_picture_style(sides, number, row) for number, row in enumerate(prompts)]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=muted>{' · '.join(f'{escape(str(k))}: {escape(str(v))}' for k, v in facts.items())}</p>",
        _verdict_table(verdicts),
        f"<h2>Before and after</h2><p class=muted>{escape(sides[0].checkpoint)} on the left, "
        f"{escape(sides[-1].checkpoint)} on the right, equal prompts and seeds; drag to compare. "
        "The largest gains in CLIP score come first, the largest losses last.</p>",
        f"<div class=cards>{''.join(_slider(n, row, len(sides)) for n, row in enumerate(prompts))}</div>",
        _curves(curves),
        _grid(sides, prompts),
    ]
    return (
        f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{_POLICY}"><meta name=viewport content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}{''.join(styles)}</style></head><body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _prompts(sides: Sequence[Side], count: int) -> list[dict[str, object]]:
    """Rows of the first side's samples with `change` of the CLIP score and `scores` per side, best change first."""
    scores: list[dict[tuple[str, str], float]] = []
    for side in sides:
        judged = side.metrics.filter(pl.col("prompt_id").is_not_null())
        scores.append(
            {
                (row["prompt_id"], row["metric"]): row["value"]
                for row in judged.iter_rows(named=True)
                if row["metric"] in _METRICS
            }
        )
    rows = []
    for row in sides[0].samples.sort("prompt_id").iter_rows(named=True):
        shown = [{metric: table.get((row["prompt_id"], metric)) for metric in _METRICS} for table in scores]
        before, after = shown[0]["clip_score"], shown[-1]["clip_score"]
        rows.append({**row, "scores": shown, "change": 0.0 if before is None or after is None else after - before})
    rows.sort(key=lambda row: -row["change"])
    if len(rows) > count:
        half = count // 2
        rows = [*rows[: count - half], *rows[len(rows) - half :]]
    return rows


def _picture_style(sides: Sequence[Side], number: int, row: Mapping[str, object]) -> str:
    """A class per picture of a prompt, so that slider and grid share its bytes."""
    rules = []
    for place, side in enumerate(sides):
        files = side.samples.filter(pl.col("prompt_id") == row["prompt_id"])["file"]
        if len(files) and (side.folder / files[0]).is_file():
            with Image.open(side.folder / files[0], formats=("PNG",)) as image:
                side_px = min(MAX_PICTURE_PX, max(image.size))
                content = data_uri(jpeg(fit(image, side_px, side_px), 85), "image/jpeg")
            rules.append(f".p{number}s{place}{{background-image:url({content})}}")
    return "".join(rules)


def _picture(number: int, place: int, row: Mapping[str, object]) -> str:
    shape = f"aspect-ratio:{row['width']}/{row['height']}"
    return f'<div class="pic p{number}s{place}" style="{shape}" role=img aria-label="{escape(str(row["text"]))}"></div>'


def _slider(number: int, row: Mapping[str, object], num_sides: int) -> str:
    change = float(str(row["change"]))
    direction = "up" if change > 0 else "down"
    return (
        f"<figure><div class=pair>{_picture(number, 0, row)}{_picture(number, num_sides - 1, row)}"
        '<input type=range min=0 max=100 value=50 aria-label="before and after"><b>before</b><b>after</b></div>'
        f"<figcaption><p>{escape(str(row['text']))}</p><small>{escape(str(row['prompt_id']))} · "
        f"{escape(str(row['group']))} · CLIP <span class={direction}>{change:+.4f}</span></small></figcaption></figure>"
    )


def _grid(sides: Sequence[Side], prompts: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{escape(side.checkpoint)}</th>" for side in sides)
    rows = []
    for number, row in enumerate(prompts):
        cells = []
        scores: Sequence[Mapping[str, float | None]] = row["scores"]  # type: ignore[assignment]
        for place, own in enumerate(scores):
            shown = " · ".join(f"{name} {value:.3f}" for name, value in own.items() if value is not None)
            cells.append(f"<td>{_picture(number, place, row)}<small class=muted>{escape(shown)}</small></td>")
        title = f"<small class=muted>{escape(str(row['prompt_id']))}</small>"
        rows.append(f"<tr><td>{escape(str(row['text']))}<br>{title}</td>{''.join(cells)}</tr>")
    table = f"<table class=grid><tr><th>prompt</th>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>All prompts</h2><div class=wide>{table}</div>"


def _verdict_table(verdicts: pl.DataFrame) -> str:
    if verdicts.is_empty():
        return ""
    rows = []
    in_order = verdicts.with_columns(first=pl.col("group") != "all").sort("first", "group", "metric")
    for row in in_order.iter_rows(named=True):
        needed = f" <small class=muted>{row['num_needed']} would do</small>" if row["num_needed"] else ""
        numbers = (
            row["num_prompts"], f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}", f"{row['difference']:+.4f}",
            f"{row['low']:+.4f} … {row['high']:+.4f}", f"{row['p_holm']:.2g}", f"{row['win_rate']:.0%}",
        )  # fmt: skip
        cells = "".join(f"<td class=number>{value}</td>" for value in numbers)
        rows.append(
            f"<tr><td>{escape(row['metric'])}</td><td>{escape(row['group'])}</td><td><span class='chip "
            f"{escape(row['verdict'])}'>{_WORDS[row['verdict']]}</span>{needed}</td>{cells}</tr>"
        )
    names = ("metric", "prompts", "verdict", "n", "before", "after", "difference", "95 % interval", "p (Holm)", "wins")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Verdict</h2><div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    shown = [_curve(name, points) for name, points in curves.items() if len(points) > 1]
    return f"<h2>Training</h2><div class=cards>{''.join(shown)}</div>" if shown else ""


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """A line over samples seen, thinned to 400 points, with its range in words."""
    thinned = points[:: max(len(points) // 400, 1)]
    xs, ys = [x for x, _ in thinned], [y for _, y in thinned]
    width, height = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1.0
    path = " ".join(f"{(x - min(xs)) / width * 300:.1f},{145 - (y - min(ys)) / height * 140:.1f}" for x, y in thinned)
    return (
        f"<figure><svg class=chart viewBox='0 0 300 150' preserveAspectRatio=none role=img aria-label='{escape(name)}'>"
        f"<line x1=0 x2=300 y1=149 y2=149 /><polyline points='{path}' vector-effect=non-scaling-stroke /></svg>"
        f"<figcaption>{escape(name)}<br><small>{min(ys):.4g} to {max(ys):.4g}, last {points[-1][1]:.4g} at "
        f"{points[-1][0]:,} samples</small></figcaption></figure>"
    )
