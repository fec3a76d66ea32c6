"""Reading judgements out of torn and hand-edited files; cutting utilities into scores."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.workspace import QualityConfig
from training.curation import quality_scores
from training.errors import DataError
from training.tables.schemas import TABLES

SHARES = QualityConfig().shares


def judgement(pair_id="p1", **changes):
    row = {
        "pair_id": pair_id, "a": "a" * 64, "b": "b" * 64, "outcome": "a", "origin": "human",
        "created_at": "2026-11-20T10:00:00+02:00",
    }  # fmt: skip
    return {**row, **changes}


def write(folder, name, *rows, torn=""):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text + torn)


def test_pairs_of_all_raters_are_read(tmp_path):
    write(tmp_path, "ann.jsonl", judgement("p1"), "", judgement("p2", outcome="tie", extra=[1]))
    write(tmp_path, "bob.jsonl", judgement("p3", rater="robert", origin="vlm"))
    (tmp_path / "notes.txt").write_text("no pairs")
    pairs, problems = quality_scores.read_pairs(tmp_path)
    assert problems == []
    assert pairs.select("pair_id", "rater", "outcome", "origin").rows() == [
        ("p1", "ann", "a", "human"), ("p2", "ann", "tie", "human"), ("p3", "robert", "a", "vlm"),
    ]  # fmt: skip
    assert pairs["created_at"][0] == datetime(2026, 11, 20, 8, tzinfo=UTC)


def test_a_torn_last_line_is_reported_and_the_rest_counts(tmp_path):
    whole = json.dumps(judgement("p2"))
    for cut in range(1, len(whole)):
        write(tmp_path, "ann.jsonl", judgement("p1"), torn=whole[:cut])
        pairs, problems = quality_scores.read_pairs(tmp_path)
        assert pairs["pair_id"].to_list() == ["p1"]
        assert problems == [("ann.jsonl", 2, "torn last line")]


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "null", "[" * 100_000, json.dumps(judgement(outcome="better")), json.dumps(judgement(origin=None)),
        json.dumps(judgement(a="../x")), json.dumps(judgement(b="a" * 64)), json.dumps(judgement(created_at="now")),
        json.dumps(judgement(pair_id=7)), json.dumps(judgement(pair_id="\ud800")), json.dumps({"pair_id": "p"}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_judgement_costs_itself(tmp_path, line):
    write(tmp_path, "ann.jsonl", judgement("p0"), line, judgement("p2"))
    pairs, problems = quality_scores.read_pairs(tmp_path)
    assert pairs["pair_id"].to_list() == ["p0", "p2"]
    assert [(p.file, p.line) for p in problems] == [("ann.jsonl", 2)]


def test_the_last_word_counts(tmp_path):
    write(tmp_path, "ann.jsonl", judgement("p1", outcome="a"), judgement("p1", outcome="b"))
    assert quality_scores.read_pairs(tmp_path)[0]["outcome"].to_list() == ["b"]


def test_no_folder_no_pairs(tmp_path):
    pairs, problems = quality_scores.read_pairs(tmp_path / "none")
    assert pairs.schema == TABLES["quality_pairs"].schema
    assert (pairs.height, problems) == (0, [])


@given(seed=st.integers(0, 1000), count=st.integers(200, 3000))
def test_cut_points_give_the_stated_shares(seed, count):
    pool = np.random.default_rng(seed).normal(size=count)
    cuts = quality_scores.cut_points(pool, SHARES)
    assert len(cuts) == 8
    assert cuts == sorted(cuts)
    found = quality_scores.scores(pool, np.zeros(count), cuts, 0.5)
    assert found.dtype == np.int8
    shares = np.bincount(found, minlength=10)[1:] / count
    assert np.abs(shares - SHARES).max() <= 2 / count + 1e-9


def test_junk_is_zero_whatever_its_utility():
    cuts = [float(i) for i in range(8)]
    utility = np.array([-5.0, 0.0, 0.5, 7.0, 99.0, 99.0])
    junk = np.array([0.0, 0.49, 0.1, 0.0, 0.0, 0.5])
    assert quality_scores.scores(utility, junk, cuts, 0.5).tolist() == [1, 2, 2, 9, 9, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_utilities_that_are_no_numbers_are_refused(bad):
    with pytest.raises(DataError):
        quality_scores.scores(np.array([bad]), np.array([0.0]), [0.0] * 8, 0.5)
    with pytest.raises(DataError):
        quality_scores.cut_points(np.array([0.0, bad]), SHARES)
    with pytest.raises(DataError):
        quality_scores.cut_points(np.array([]), SHARES)


def test_percentiles_are_those_of_the_pool():
    pool = np.sort(np.random.default_rng(0).normal(size=20_000))
    cuts = quality_scores.cut_points(pool, SHARES)
    grid = np.linspace(-4, 4, 201)
    found = quality_scores.percentiles(grid, cuts, SHARES)
    assert found.dtype == np.float32
    assert np.abs(found - np.searchsorted(pool, grid) / len(pool)).max() < 0.02
    assert (np.diff(found) >= 0).all()
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert quality_scores.percentiles(np.array(cuts), cuts, SHARES) == pytest.approx(
        np.cumsum(SHARES)[:-1]
    )


def test_percentiles_of_a_pool_of_equals_do_not_divide_by_zero():
    assert quality_scores.percentiles(
        np.array([-1.0, 0.0, 1.0]), [0.0] * 8, SHARES
    ) == pytest.approx([0, 0.9, 1], abs=0.06)
