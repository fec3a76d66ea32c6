"""Changes, extremes, turns and means by group against plain Python."""

import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.prompt_groups import group_prompts
from training.reports import scores as report_scores
from training.reports.scores import Prompt, Side
from training.tables.schemas import TABLES

changes = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), max_size=12)


def prompt(number, group="g", before=0.0, after=0.0):
    scores = ({"m": before}, {"m": after})
    return Prompt(
        prompt_id=f"p{number:03d}", text="t", group=group, height=8, width=8, files=(None, None), scores=scores,
        changes={"m": after - before},
    )  # fmt: skip


@given(changes, st.integers(1, 5))
def test_extremes_are_the_largest_changes_and_none_stands_on_both_sides(values, count):
    prompts = [prompt(n, after=value) for n, value in enumerate(values)]
    gained, lost = report_scores.extremes(prompts, "m", count)
    assert [p.changes["m"] for p in gained] == sorted((v for v in values if v > 0), reverse=True)[
        :count
    ]
    assert [p.changes["m"] for p in lost] == sorted(v for v in values if v < 0)[:count]
    assert report_scores.extremes(prompts, "another", count) == ([], [])


def test_groups_take_turns():
    prompts = [prompt(n, group) for n, group in enumerate("aaaab")]
    assert [p.prompt_id for p in report_scores.in_turn(prompts, 4)] == [
        "p000",
        "p004",
        "p001",
        "p002",
    ]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-9, 9)), min_size=1))
def test_means_by_group_are_those_of_plain_python(rows):
    prompts = [prompt(n, group, after=value) for n, (group, value) in enumerate(rows)]
    found = {
        group: (count, means) for group, count, means in report_scores.group_means(prompts, "m")
    }
    groups = {group for group, _ in rows}
    assert set(found) == ({"all"} | groups if len(groups) > 1 else {"all"})
    for group, (count, means) in found.items():
        values = [value for name, value in rows if group in ("all", name)]
        assert count == len(values)
        assert means == pytest.approx((0.0, sum(values) / len(values)))


def test_the_mean_over_all_prompts_leaves_the_shipped_groups_out():
    shipped = [
        replace(prompt(0, "hands", after=100.0), prompt_id=key) for key, _ in group_prompts("hands")
    ]
    prompts = [*(prompt(n, "caption", after=float(n)) for n in range(3)), *shipped]
    found = {
        group: (count, means[1]) for group, count, means in report_scores.group_means(prompts, "m")
    }
    assert found == {"all": (3, 1.0), "caption": (3, 1.0), "hands": (32, 100.0)}
    assert report_scores.group_means(shipped, "m")[0][:2] == ("all", 32)


def side(name, rows, folder=Path()):
    """Rows of `(prompt_id, {metric: value})`."""
    samples = [
        {"prompt_id": p, "text": p, "group": "g", "height": 8, "width": 8, "file": f"{p}.png"}
        for p, _ in rows
    ]
    metrics = [
        {"prompt_id": p, "group": "g", "metric": m, "value": v}
        for p, own in rows
        for m, v in own.items()
    ]
    metrics.append({"prompt_id": None, "group": None, "metric": "Clipscore_mean", "value": 9.0})
    frames = []
    for table, own in (("sample_images", samples), ("eval_metrics", metrics)):
        schema = TABLES[table].schema
        frames.append(
            pl.DataFrame(
                [{column: row.get(column) for column in schema} for row in own], schema=schema
            )
        )
    return Side(checkpoint=name, samples=frames[0], metrics=frames[1], folder=folder)


def test_prompts_of_any_side_are_collected_with_the_scores_that_are_finite():
    first = side(
        "a@1", [("p1", {"clip_score": 0.2, "aesthetic": math.nan}), ("p2", {"clip_score": 0.1})]
    )
    last = side(
        "b@1",
        [
            ("p1", {"clip_score": 0.5, "aesthetic": 5.0, "unknown": 1.0}),
            ("p0", {"clip_score": 0.3}),
        ],
    )
    found = report_scores.collect([first, last], ["clip_score", "aesthetic"])
    assert [p.prompt_id for p in found] == ["p0", "p1", "p2"]
    assert found[1].scores == ({"clip_score": 0.2}, {"clip_score": 0.5, "aesthetic": 5.0})
    assert found[1].changes == {"clip_score": pytest.approx(0.3)}
    assert found[0].changes == found[2].changes == {}
    assert found[0].files == (None, Path("p0.png"))


def test_judged_metrics_come_from_the_verdicts_where_there_are_any():
    one = side("a@1", [("p1", {"aesthetic": 5.0, "clip_score": 0.2, "saturation": 0.5})])
    assert report_scores.judged_metrics([one], TABLES["verdicts"].empty()) == [
        "clip_score",
        "aesthetic",
    ]
    verdicts = pl.DataFrame({"metric": ["pick", "aesthetic", "clip_score", "pick", "alpha"]})
    assert report_scores.judged_metrics([one], verdicts) == [
        "clip_score",
        "aesthetic",
        "alpha",
        "pick",
    ]


def test_a_base_is_called_base_a_rival_by_its_name_and_a_checkpoint_as_it_is():
    assert side("base.0011aabb@0", []).label == "base"
    assert side("demo@8005", []).label == "demo@8005"
    assert side("rival.photo@0", []).label == "photo"
