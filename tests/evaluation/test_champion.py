"""A champion gives way only to what is better, and the best of many equals does not become one by
luck."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import DamageError
from training.evaluation import champion, verdict
from training.evaluation.champion import Champion
from training.evaluation.verdict import Protocol, Scores
from training.tables.schemas import TABLES

PROTOCOL = Protocol(prompts="p", sampling="s", clip="c", aesthetic="a", dtype="float32")
MARGINS = {"clip_score": 0.003, "aesthetic": 0.05}


def scores(name, aesthetic, clip=None):
    clip = np.full(len(aesthetic), 0.25) if clip is None else clip
    rows = [
        {"prompt_id": f"p{place:04d}", "group": "g", "metric": metric, "value": float(value)}
        for metric, values in (("clip_score", clip), ("aesthetic", aesthetic))
        for place, value in enumerate(values)
    ]
    schema = TABLES["eval_metrics"].schema
    return Scores(checkpoint=name, protocol=PROTOCOL, metrics=pl.DataFrame(rows, schema=schema))


def drawn(rng, shift=0.0, count=120):
    return 5.5 + shift + rng.normal(0, 0.25, count)


def test_halves_are_even_apart_and_do_not_depend_on_the_order():
    ids = [f"prompt {number}" for number in range(101)]
    one, other = champion.halves(ids)
    assert (len(one), len(other)) == (51, 50)
    assert one.isdisjoint(other)
    assert one | other == set(ids)
    assert champion.halves(ids[::-1]) == (one, other)


def test_the_best_of_many_equals_seldom_wins_though_it_looks_better():
    """Twenty checkpoints as good as the champion: the best of them on all prompts stands out, on
    the other half not."""
    rng, num_rounds, naive, honest = np.random.default_rng(5), 30, 0, 0
    tiny = {"clip_score": 1e-6, "aesthetic": 1e-6}
    for _ in range(num_rounds):
        held, *sides = (
            scores(f"run@{number}", drawn(rng, count=60), 0.25 + rng.normal(0, 0.02, 60))
            for number in range(21)
        )
        best = max(sides, key=lambda side: side.metrics["value"].sum())
        naive += champion.wins(champion.challenge(held, best, tiny, one_of_many=False), tiny)
        chosen = champion.choose(held, sides, tiny)
        honest += champion.wins(champion.challenge(held, chosen, tiny, one_of_many=True), tiny)
    assert naive / num_rounds > 0.12
    assert honest / num_rounds <= 0.07


def test_a_better_one_wins_and_its_verdict_names_the_half():
    rng = np.random.default_rng(1)
    held, good, equal = (
        scores(name, drawn(rng, shift)) for name, shift in (("c@1", 0), ("r@1", 0.5), ("r@2", 0))
    )
    assert champion.choose(held, [equal, good], MARGINS) is good
    rows = champion.challenge(held, good, MARGINS, one_of_many=True)
    judged = rows.filter(pl.col("group") == champion.HELD_OUT)
    assert judged["num_prompts"].unique().to_list() == [60]
    assert champion.wins(rows, MARGINS)
    assert not champion.wins(champion.challenge(held, equal, MARGINS, one_of_many=True), MARGINS)


@given(count=st.integers(2, 80))
def test_the_held_out_half_asks_for_prompts_of_the_whole_set(count):
    """Sixty are the fewest of which the judged half gives a verdict; an unclear half asks for more
    than there are."""
    a, b = (
        scores(name, drawn(np.random.default_rng(7), shift, count))
        for name, shift in (("c@1", 0), ("r@1", 0.05))
    )
    rows = champion.challenge(a, b, MARGINS, one_of_many=True)
    for row in rows.filter(pl.col("group") == champion.HELD_OUT).iter_rows(named=True):
        assert (row["verdict"] == "too_few_prompts") == (count < 60)
        assert row["num_needed"] is None or row["num_needed"] >= max(60, count)
        told = "; a set of about 60 prompts would do"
        assert verdict.sentence(row).endswith(told) == (row["num_needed"] == 60)


def test_worse_in_one_deciding_metric_is_not_better():
    rng = np.random.default_rng(2)
    held = scores("c@1", drawn(rng), 0.25 + rng.normal(0, 0.01, 120))
    mixed = scores("r@1", drawn(rng, -0.5), 0.30 + rng.normal(0, 0.01, 120))
    rows = champion.challenge(held, mixed, MARGINS, one_of_many=False)
    assert not champion.wins(rows, ("clip_score", "aesthetic"))
    assert champion.wins(rows, ("clip_score",))


def test_the_file_comes_back_whole_or_says_that_it_is_damaged(tmp_path):
    assert champion.read(tmp_path) is None
    first = Champion(
        checkpoint="r@1", digest="d", verdict="b@0~r@1", sentence="s", challenged={"r@1": "e"}
    )
    champion.write(tmp_path, first)
    assert champion.read(tmp_path) == first
    for content in ("{", '{"checkpoint": "x"}', '{"checkpoint": "x", "digest": "d", "format": 9}'):
        (tmp_path / champion.FILE).write_text(content)
        with pytest.raises(DamageError, match="champion"):
            champion.read(tmp_path)


def test_shipped_prompts_decide_neither_who_is_chosen_nor_who_wins():
    from training.evaluation.prompt_groups import group_prompts

    rng = np.random.default_rng(4)
    held, good, odd = (
        scores(name, drawn(rng, shift))
        for name, shift in (("c@1", 0.0), ("r@2", 0.5), ("r@3", 0.0))
    )

    def with_shipped(side, value):
        rows = [
            {"prompt_id": prompt_id, "group": group, "metric": metric, "value": value}
            for group in ("general", "hands")
            for prompt_id, _ in group_prompts(group)
            for metric in MARGINS
        ]
        shipped = pl.DataFrame(rows, schema=TABLES["eval_metrics"].schema)
        return replace(side, metrics=pl.concat([side.metrics, shipped]))

    held, good, odd = with_shipped(held, 5.0), with_shipped(good, 1.0), with_shipped(odd, 9.0)
    assert champion.choose(held, [good, odd], MARGINS) is good
    rows = champion.challenge(held, good, MARGINS, one_of_many=True)
    assert champion.wins(rows, ["aesthetic"])
    assert champion.decisive(rows)["num_prompts"].to_list() == [60, 60]
