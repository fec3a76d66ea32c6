"""bigASP's recipe: every prompt obeys the rules, and thousands of them follow the stated distributions."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import prompts
from training.data.tables import TABLES
from training.run_config import PromptConfig

BOX = {"y0": 0.0, "x0": 0.0, "y1": 1.0, "x1": 1.0, "confidence": 0.5}
NAMES = [f"tag_{n:02d}" for n in range(100)]


def sample(num_tags=100, **changes):
    tags = [{"name": name, "category": "general"} for name in NAMES[:num_tags]]
    return {"tags": tags, "words": [], "caption": None, "score": 7, "boxes": [], **changes}


def many(config, count=4000, **changes):
    made = [prompts.make_prompt(sample(**changes), config, random.Random(i)) for i in range(count)]
    return [text for text, _ in made], [trace for _, trace in made]


configs = st.builds(
    PromptConfig,
    mean_tags=st.floats(-10, 60),
    std_tags=st.floats(0, 30),
    caption_prob=st.floats(0, 1),
    empty_prob=st.floats(0, 1),
    score_tags=st.booleans(),
    spaces_prob=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(
    config=configs,
    num_tags=st.integers(0, 100),
    words=st.lists(st.sampled_from(["safe", "newest"]), unique=True),
    caption=st.sampled_from([None, "A sentence."]),
    score=st.sampled_from([None, *range(10)]),
    watermark=st.booleans(),
    seed=st.integers(0, 2**64),
)
def test_every_prompt_obeys_the_recipe(config, num_tags, words, caption, score, watermark, seed):
    one = sample(num_tags, words=words, caption=caption, score=score, boxes=[{}] if watermark else [])
    text, trace = prompts.make_prompt(one, config, random.Random(seed))
    assert (text, trace) == prompts.make_prompt(one, config, random.Random(seed))
    if trace["kind"] == "empty":
        assert text == ""
        return
    if trace["kind"] == "caption":
        assert text == caption
        return
    available = {*NAMES[:num_tags], *words} | ({"watermark"} if watermark else set())
    assert set(trace["tags"]) <= available
    assert len(set(trace["tags"])) == len(trace["tags"]) == trace["num_tags"]
    assert len(trace["tags"]) >= min(1, len(available))
    assert ("watermark" in trace["tags"]) == watermark
    allowed = {f"score_{step}_up" for step in range(1, (score or 0) + 1)} | {f"score_{score}"}
    assert set(trace["score_tags"]) <= allowed
    assert len(trace["score_tags"]) <= 3
    assert bool(trace["score_tags"]) == bool(config.score_tags and score)
    written = [n.replace("_", " ") if trace["spaces"] else n for n in (*trace["score_tags"], *trace["tags"])]
    assert text == ", ".join(written)


def test_the_number_of_tags_is_normal_and_cut_at_one():
    _, traces = many(PromptConfig(empty_prob=0))
    counts = [trace["num_tags"] for trace in traces]
    # N(32, 19.8) cut below at 1, above at the 100 tags there are.
    rng = random.Random(1)
    expected = [min(max(1, int(rng.gauss(32, 19.8))), 100) for _ in range(20_000)]
    assert sum(counts) / len(counts) == pytest.approx(sum(expected) / len(expected), abs=1.0)
    assert counts.count(1) / len(counts) == pytest.approx(expected.count(1) / len(expected), abs=0.015)
    assert min(counts) == 1


def test_every_tag_and_every_place_is_equally_likely():
    _, traces = many(PromptConfig(empty_prob=0, mean_tags=5, std_tags=0), num_tags=10, boxes=[{}])
    seen = Counter(name for trace in traces for name in trace["tags"])
    assert seen.pop("watermark") == 4000
    assert all(count / 4000 == pytest.approx(0.4, abs=0.04) for count in seen.values())
    places = Counter(trace["tags"].index("watermark") for trace in traces)
    assert all(places[place] / 4000 == pytest.approx(0.2, abs=0.03) for place in range(5))


@pytest.mark.parametrize(("score", "exact"), [(1, 0.75), (9, 0.2)])
def test_score_tags_are_one_to_three_of_those_that_hold(score, exact):
    texts, traces = many(PromptConfig(empty_prob=0, spaces_prob=0), score=score)
    counts = Counter(len(trace["score_tags"]) for trace in traces)
    most = min(3, score + 1)
    assert all(counts[k] / 4000 == pytest.approx(1 / most, abs=0.04) for k in range(1, most + 1))
    # E[k] / (score + 1): trainers.md 2a.
    assert sum(f"score_{score}" in t["score_tags"] for t in traces) / 4000 == pytest.approx(exact, abs=0.03)
    assert all(text.startswith("score_") for text in texts)


def test_shares_of_empty_caption_and_spaces():
    texts, traces = many(PromptConfig(empty_prob=0.1, caption_prob=0.3, spaces_prob=0.5), caption="A sentence.")
    kinds = Counter(trace["kind"] for trace in traces)
    assert texts.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert kinds["caption"] / 4000 == pytest.approx(0.27, abs=0.03)
    spaced = [trace["spaces"] for trace in traces if trace["kind"] == "tags"]
    assert sum(spaced) / len(spaced) == pytest.approx(0.5, abs=0.04)


def test_a_sample_with_nothing_but_a_caption_uses_it():
    config = PromptConfig(empty_prob=0, caption_prob=0)
    assert prompts.make_prompt(sample(0, caption="Only this."), config, random.Random(0))[0] == "Only this."
    text, trace = prompts.make_prompt(sample(0, score=None), config, random.Random(0))
    assert (text, trace["num_tags"]) == ("", 0)


def test_faces_keep_their_underscore():
    one = sample(0, tags=[{"name": name, "category": "general"} for name in ("o_o", "^_^", "long_hair")], score=None)
    text, _ = prompts.make_prompt(one, PromptConfig(empty_prob=0, spaces_prob=1, std_tags=0), random.Random(0))
    assert sorted(text.split(", ")) == ["^_^", "long hair", "o_o"]


def test_the_order_of_tags_in_the_table_does_not_matter():
    forwards, backwards = sample(), sample()
    backwards["tags"] = backwards["tags"][::-1]
    made = [prompts.make_prompt(s, PromptConfig(), random.Random(5)) for s in (forwards, backwards)]
    assert made[0] == made[1]


def test_statistics_count_what_the_model_sees():
    traces = [
        {"kind": "empty"},
        {"kind": "caption"},
        {"kind": "tags", "num_tags": 2, "tags": ["a", "b"], "score_tags": ["score_7"], "spaces": True},
        {"kind": "tags", "num_tags": 1, "tags": ["a"], "score_tags": [], "spaces": False},
    ]
    found = prompts.statistics(traces, [0, 75, 76, 500], max_chunks=3)
    assert found.schema == TABLES["prompt_statistics"].schema
    assert {(s, k): c for s, k, c in found.rows()} == {
        ("kind", "empty"): 1, ("kind", "caption"): 1, ("kind", "tags"): 2, ("num_tags", "2"): 1, ("num_tags", "1"): 1,
        ("num_tokens", "0"): 1, ("num_tokens", "75"): 1, ("num_tokens", "76"): 1, ("num_tokens", "500"): 1,
        ("num_chunks", "1"): 2, ("num_chunks", "2"): 1, ("num_chunks", "3"): 1, ("tag", "a"): 2, ("tag", "b"): 1,
        ("tag", "score_7"): 1,
    }  # fmt: skip
