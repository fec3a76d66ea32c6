"""Charts say what they were given: axes hold all points, colours the sign of a change, bars the
interval."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from training.reports import charts
from training.reports.charts import Chart, Line, Map
from training.reports.run_charts import loss_charts, timestep_map

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_are_few_round_even_and_hold_both_ends(one, other):
    low, high = min(one, other), max(one, other)
    ticks = charts.nice_ticks(low, high)
    slack = 1e-8 * max(abs(low), abs(high), 1e-300)
    assert ticks[0] <= low + slack + (ticks[1] - ticks[0]) * 1e-8
    assert ticks[-1] >= high - slack - (ticks[1] - ticks[0]) * 1e-8
    assert 2 <= len(ticks) <= 7
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-6)
    if len(ticks) > 2:
        mantissa = gaps[0] / 10 ** math.floor(math.log10(gaps[0] * (1 + 1e-9)))
        assert min(abs(mantissa - round_) for round_ in (1, 2, 2.5, 5, 10)) < 1e-5


@given(st.lists(finite, min_size=2, max_size=900))
@example([0.0, 5e-324])  # a quarter of their distance is no number
@example([float(n % 7) for n in range(950)])  # thinned, and the last is not among every third
def test_lines_stay_inside_and_end_at_their_last_point(values):
    html = charts.draw_chart(
        Chart(title="t", lines=[Line(name="n", points=list(enumerate(values)))])
    )
    points = [
        tuple(map(float, pair.split(",")))
        for pair in re.search(r"points='([^']+)'", html)[1].split()
    ]
    assert all(-0.2 <= x <= 300.2 and -0.2 <= y <= 150.2 for x, y in points)
    assert points[0][0] == 0
    assert points[-1][0] == 300
    assert len(points) <= 401
    assert f"last {values[-1]:.4g}" in html


def test_a_chart_places_points_by_hand():
    lines = [
        Line(name="a", points=[(0, 0.0), (50, 4.0), (100, 2.0)]),
        Line(name="b", points=[(0, 1.0), (100, 1.0)]),
    ]
    html = charts.draw_chart(
        Chart(title="t", lines=[*lines, Line(name="one point", points=[(3, 9.0)])], marks=[50, 999])
    )
    assert "<polyline class=c0 points='0.0,150.0 150.0,0.0 300.0,75.0'/>" in html
    assert "<polyline class=c1 points='0.0,112.5 300.0,112.5'/>" in html
    assert html.count("class=mark") == 1
    assert "M150.0,150.0V0" in html
    assert "one point" not in html
    assert re.findall(r"<i style='bottom:[\d.]+%'>([^<]+)", html) == [
        "0.0",
        "1.0",
        "2.0",
        "3.0",
        "4.0",
    ]
    assert charts.draw_chart(Chart(title="t", lines=[Line(name="a", points=[(0, 1.0)])])) == ""


@given(st.lists(finite, min_size=1, max_size=500), st.integers(1, 90))
def test_thinning_keeps_the_mean_and_the_order(values, most):
    thinned = charts.thin(list(enumerate(values)), most)
    assert len(thinned) == min(len(values), most)
    assert [x for x, _ in thinned] == sorted({x for x, _ in thinned})
    assert min(values) - 1e-6 <= min(y for _, y in thinned)
    assert max(y for _, y in thinned) <= max(values) + 1e-6
    if len(values) % most == 0:
        assert math.fsum(y for _, y in thinned) / most == pytest.approx(
            math.fsum(values) / len(values), abs=1e-6
        )


def test_a_map_colours_by_the_change_since_the_first_column():
    rows = {
        "up": [1.0, 1.5, 2.0],
        "down": [1.0, None, 0.5],
        "new": [None, 3.0, 3.0],
        "never": [None, None, None],
    }
    html = charts.draw_map(Map(title="t", note="n", columns=[0, 8, 16], rows=rows))
    found = {
        name: re.findall(r"background:rgb\(([\d ]+)/([\d.]+)\)", row)
        for name, row in rows_of(html).items()
    }
    assert found["up"] == [("22 163 74", "0.00"), ("220 38 38", "0.44"), ("220 38 38", "0.75")]
    assert found["down"] == [("22 163 74", "0.00"), ("22 163 74", "0.75")]
    assert found["never"] == []
    assert "+100.0%" in html
    assert "-50.0%" in html
    assert charts.draw_map(Map(title="t", note="n", columns=[0], rows={"a": [1.0]})) == ""


def rows_of(html):
    return dict(re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", html))


def test_a_map_of_many_columns_is_thinned_and_has_no_numbers():
    html = charts.draw_map(
        Map(title="t", note="n", columns=range(500), rows={"a": [1.0] * 499 + [2.0]})
    )
    assert html.count("<td class=number style") == 40
    assert "title='499 samples: 2, +100.0%'" in html
    assert not re.search(r"'>\d", html)


def test_an_interval_is_drawn_to_scale():
    svg = ElementTree.fromstring(quoted(charts.interval_bar(-0.5, 0.25, 1.0, 0.1, 1.0)))
    band, circle = svg.find("rect"), svg.find("circle")
    assert float(circle.get("cx")) == 90 + 0.25 * 84
    assert float(band.get("x")) == pytest.approx(90 - 8.4)
    assert float(band.get("width")) == pytest.approx(16.8)
    assert "M48.0 10H174.0" in [path.get("d") for path in svg.findall("path")][1]
    assert charts.interval_bar(-math.inf, 0.0, math.inf, 0.1, 1.0) == ""


def quoted(svg):
    """HTML lets attributes go without quotes, XML does not."""
    return re.sub(r"=(\w[\w.]*)", r"='\1'", str(svg))


EVENTS = [
    {"event": "started", "samples_seen": 0},
    {"event": "validation", "samples_seen": 0, "loss": 0.5, "stable_loss": 0.6, "t": {"000-499": 0.7, "500-999": 0.3}},
    {"event": "step", "samples_seen": 32, "loss": 2.0},
    {"event": "step", "samples_seen": 64, "loss": 1.0},
    {"event": "validation", "samples_seen": 64, "loss": 0.4, "stable_loss": None, "ema_loss": 0.45,
     "t": {"000-499": 0.6}},
    {"event": "validation", "samples_seen": 96, "loss": 0.3, "stable_loss": 0.5, "ema_loss": 0.35,
     "t": {"500-999": 0.1}},
]  # fmt: skip


def test_an_event_log_becomes_curves_and_a_map():
    plain, trained = loss_charts(EVENTS, marks=[64])
    assert {line.name: list(line.points) for line in plain.lines} == {
        "held-out images": [(0, 0.5), (64, 0.4), (96, 0.3)],
        "held-out images, averaged weights": [(64, 0.45), (96, 0.35)],
        "training images": [(0, 0.6), (96, 0.5)],
    }
    assert plain.marks == [64]
    assert [list(line.points) for line in trained.lines] == [[(32, 2.0), (64, 1.0)]] * 2
    (shown,) = timestep_map(EVENTS)
    assert shown.columns == [0, 64, 96]
    assert shown.rows == {"000-499": [0.7, 0.6, None], "500-999": [0.3, None, 0.1]}


def test_a_run_without_events_has_no_charts():
    assert loss_charts([]) == timestep_map([]) == timestep_map(EVENTS[:2]) == []
