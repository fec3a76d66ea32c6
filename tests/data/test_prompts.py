"""Prompts: pure functions whose every choice has the stated distribution, and whose pieces are what they say."""

import dataclasses
import itertools
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from training.data import prompts, spelling
from training.data.samples import Sample
from training.data.vocabulary import Vocabulary
from training.run_config import PromptConfig
from training.seeds import Purpose, generator

NAMES = [f"tag_{number:03d}" for number in range(100)]
ALIASES = Vocabulary({}, {name: (f"{name}_one", f"{name}_two") for name in NAMES[::2]})
PLAIN = PromptConfig(
    mean_tags=0, empty_prob=0, alias_prob=0, spaces_prob=0, mixed_prob=0, loose_separators_prob=0, score_tags=False
)
BOORU = {
    "1girl": "people", "2boys": "people", "miku": "character", "vocaloid": "copyright", "someone": "artist",
    "long_hair": "general", "sky": "general", "highres": "meta", "masterpiece": "special", "newest": "special",
}  # fmt: skip


def recipe(**changes):
    return dataclasses.replace(PLAIN, **changes)


def sample(num_tags=100, **changes):
    return Sample(NAMES[:num_tags], [], 7, None, None, False)._replace(**changes)


def make(one, config, seed, vocabulary=ALIASES):
    return prompts.make_prompt(one, vocabulary, config, random.Random(seed))


def many(config, count=4000, vocabulary=ALIASES, **changes):
    one = sample(**changes)
    return [make(one, config, number, vocabulary) for number in range(count)]


def fits(counts, expected):
    """Chi-square: whether counts by key may come from probabilities by key, at one in a thousand."""
    assert set(counts) <= {key for key, share in expected.items() if share}
    total = sum(counts.values())
    keys = [key for key, share in expected.items() if share]
    return stats.chisquare([counts[key] for key in keys], [expected[key] * total for key in keys]).pvalue > 1e-3


shares = st.sampled_from([0.0, 0.3, 1.0])
hostile = st.one_of(
    st.text(min_size=1, max_size=12).filter(str.strip),
    st.sampled_from(["a,b", "(o)_(o)", ":)", "photo_(medium)", "😀_smile", "x" * 5000, ">_<", "it's", "<|endoftext|>"]),
)
samples = st.builds(
    Sample,
    tags=st.lists(st.one_of(st.sampled_from(NAMES), hostile), unique=True, max_size=40).map(sorted),
    words=st.lists(st.sampled_from(["safe", "newest"]), unique=True),
    score=st.sampled_from([None, *range(1, 10)]),
    caption=st.sampled_from([None, "A sentence.", "One line\n\nanother line", " \n "]),
    made_caption=st.sampled_from([None, "a made one"]),
    watermark=st.booleans(),
)
configs = st.builds(
    PromptConfig,
    mean_tags=st.sampled_from([0.0, 3.0, 32.0]),
    std_tags=st.floats(0, 30),
    min_tags=st.integers(1, 5),
    order=st.sampled_from(["shuffled", "kohaku"]),
    first_tags=st.sampled_from([(), ("tag_003", "tag_001"), ("watermark",)]),
    tag_dropout=shares,
    alias_prob=shares,
    spaces_prob=st.sampled_from([0.0, 0.5]),
    mixed_prob=st.sampled_from([0.0, 0.5]),
    loose_separators_prob=shares,
    misspelling_prob=shares,
    score_tags=st.booleans(),
    caption_prob=st.sampled_from([0.0, 0.4]),
    caption_and_tags_prob=st.sampled_from([0.0, 0.6]),
    made_caption_prob=shares,
    empty_prob=st.sampled_from([0.0, 0.1, 1.0]),
    empty_as=st.sampled_from(["string", "zeros"]),
    chunk_shares=st.sampled_from([(), (0.25, 0.5, 0.25)]),
)


@given(one=samples, config=configs, seed=st.integers(0, 2**64))
def test_every_prompt_obeys_its_recipe(one, config, seed):
    prompt = make(one, config, seed)
    assert prompt == make(one, config, seed)
    trace = prompt.trace
    assert prompt.num_chunks in ((1, 2, 3) if config.chunk_shares else (None,))
    assert len(prompt.pieces) == len(prompt.bare)
    assert prompt.gaps is None or len(prompt.gaps) == len(prompt.pieces)
    if trace["kind"] == "empty":
        assert (prompt.text, trace["as"]) == ("", config.empty_as)
        return
    available = {*one.tags, *one.words} | ({"watermark"} if one.watermark else set())
    if trace["kind"] == "caption":
        lines = {"given": one.caption, "made": one.made_caption}[trace["caption"]].splitlines()
        assert prompt.text == [line.strip() for line in lines if line.strip()][trace["line"]]
        return
    tags = trace["tags"]
    assert set(tags) | set(trace["dropped"]) <= available
    assert len(set(tags)) == len(tags) == trace["num_tags"]
    assert not set(tags) & set(trace["dropped"])
    first = [name for name in config.first_tags if name in available]
    assert tags[: len(first)] == first
    assert ("watermark" in tags) == one.watermark
    assert (trace["kind"] == "caption_and_tags") == ("caption" in trace)
    assert set(trace["score_tags"]) <= {f"score_{n}_up" for n in range(1, (one.score or 0) + 1)} | {
        f"score_{one.score}"
    }
    assert bool(trace["score_tags"]) == bool(config.score_tags and one.score)
    for written in trace["aliases"].values():
        assert written.endswith(("_one", "_two"))


def test_plain_tags_are_written_as_they_are():
    assert make(sample(0, tags=["b_c", "a", "(d)"], words=["safe"]), PLAIN, 0).text in {
        ", ".join(order) for order in itertools.permutations(["b_c", "a", "(d)", "safe"])
    }


def test_the_number_of_tags_has_the_stated_distribution():
    wanted = [prompt.trace["wanted"] for prompt in many(recipe(mean_tags=32, std_tags=19.8), 20_000)]
    # Whole numbers of N(32, 19.8); what is below 2 falls on 1. Spread over its unit, each is the normal number again.
    at_least_two = [value + random.Random(place).random() for place, value in enumerate(wanted) if value >= 2]
    lower = (2 - 32) / 19.8
    assert stats.kstest(at_least_two, stats.truncnorm(lower, math.inf, 32, 19.8).cdf).pvalue > 1e-3
    share = stats.norm.cdf(lower)
    assert fits(Counter(value == 1 for value in wanted), {True: share, False: 1 - share})
    assert min(wanted) == 1


def test_as_many_tags_as_wanted_and_there_are():
    for prompt in many(recipe(mean_tags=5, std_tags=4, min_tags=3), num_tags=6):
        assert prompt.trace["num_tags"] == min(prompt.trace["wanted"], 6)
        assert prompt.trace["wanted"] >= 3


def test_every_tag_and_every_place_is_equally_likely():
    made = many(recipe(mean_tags=5, std_tags=0), num_tags=10, watermark=True)
    seen = Counter(name for prompt in made for name in prompt.trace["tags"])
    assert seen.pop("watermark") == 4000
    assert fits(seen, dict.fromkeys(NAMES[:10], 0.1))
    places = Counter(prompt.trace["tags"].index("watermark") for prompt in made)
    assert fits(places, dict.fromkeys(range(5), 0.2))
    orders = Counter(tuple(prompt.trace["tags"]) for prompt in many(PLAIN, num_tags=3))
    assert len(orders) == 6
    assert fits(orders, dict.fromkeys(orders, 1 / 6))


@pytest.mark.parametrize("score", [1, 2, 9])
def test_score_tags_have_hand_worked_shares(score):
    made = many(recipe(score_tags=True), 8000, num_tags=2, score=score)
    most = min(3, score + 1)
    assert fits(Counter(len(p.trace["score_tags"]) for p in made), dict.fromkeys(range(1, most + 1), 1 / most))
    # trainers.md 2a: each of the score + 1 names is there with E[k] / (score + 1).
    share = (1 + most) / 2 / (score + 1)
    exact = sum(f"score_{score}" in p.trace["score_tags"] for p in made)
    assert fits({True: exact, False: 8000 - exact}, {True: share, False: 1 - share})
    assert {1: 0.75, 2: 2 / 3, 9: 0.2}[score] == pytest.approx(share)
    assert all(p.text.startswith("score_") and "score_" not in p.text.split(", tag")[1] for p in made)


def test_kinds_have_hand_worked_shares():
    config = recipe(empty_prob=0.1, caption_prob=0.2, caption_and_tags_prob=0.3)
    kinds = Counter(prompt.trace["kind"] for prompt in many(config, caption="A sentence."))
    assert fits(kinds, {"empty": 0.1, "caption": 0.18, "caption_and_tags": 0.27, "tags": 0.45})


def test_spellings_and_separators_have_hand_worked_shares():
    made = many(recipe(spaces_prob=0.25, mixed_prob=0.25, loose_separators_prob=0.2), 3000, num_tags=20)
    assert fits(Counter(p.trace["spelling"] for p in made), {"spaces": 0.25, "mixed": 0.25, "underscores": 0.5})
    assert fits(Counter(p.trace["loose"] for p in made), {True: 0.2, False: 0.8})
    mixed = [p for p in made if p.trace["spelling"] == "mixed"]
    spaced = sum(len(re.findall("tag \\d", p.text)) for p in mixed)
    assert fits({True: spaced, False: 20 * len(mixed) - spaced}, {True: 0.8, False: 0.2})
    loose = [p for p in made if p.trace["loose"] and p.trace["spelling"] == "underscores"]
    between = Counter(gap for p in loose for gap in re.split(r"tag_\d+", p.text)[1:-1])
    assert fits(between, {", ": 0.64, ",": 0.16, "  ": 0.16, " ": 0.04})
    assert all(set(re.split(r"tag_\d+", p.text)) == {"", ", "} for p in made[:500]
               if not p.trace["loose"] and p.trace["spelling"] == "underscores")  # fmt: skip


def test_aliases_are_exchanged_at_their_rate():
    made = many(recipe(alias_prob=0.2), 2000, num_tags=10)
    exchanged = Counter(alias for prompt in made for alias in prompt.trace["aliases"].values())
    assert set(exchanged) == {f"{name}_{which}" for name in NAMES[:10:2] for which in ("one", "two")}
    total = sum(exchanged.values())
    assert fits({True: total, False: 5 * 2000 - total}, {True: 0.2, False: 0.8})
    assert fits(exchanged, dict.fromkeys(exchanged, 0.1))
    for prompt in made[:100]:
        written = [prompt.trace["aliases"].get(name, name) for name in prompt.trace["tags"]]
        assert prompt.text == ", ".join(written)


def test_dropout_takes_general_and_special_tags_only():
    one = sample(0, tags=sorted(set(BOORU) - {"masterpiece", "newest"}), words=["masterpiece", "newest"])
    made = [make(one, recipe(tag_dropout=0.1, always_tags=("sky",)), n, Vocabulary(BOORU, {})) for n in range(4000)]
    dropped = Counter(name for prompt in made for name in prompt.trace["dropped"])
    assert set(dropped) == {"long_hair", "highres", "masterpiece", "newest"}
    total = sum(dropped.values())
    assert fits({True: total, False: 16_000 - total}, {True: 0.1, False: 0.9})


def test_kohakus_order():
    one = sample(0, tags=sorted(set(BOORU) - {"masterpiece", "newest"}), words=["masterpiece", "newest"])
    rest = set()
    for seed in range(200):
        prompt = make(one, recipe(order="kohaku"), seed, Vocabulary(BOORU, {}))
        assert prompt.text.startswith("1girl, 2boys, miku, vocaloid, someone, ")
        rest.add(prompt.trace["tags"][5:][0])
    assert rest == {"long_hair", "sky", "highres", "masterpiece", "newest"}


def test_first_tags_open_the_prompt_and_always_tags_stay():
    config = recipe(mean_tags=4, std_tags=0, first_tags=("tag_050", "absent", "tag_001"), always_tags=("tag_007",))
    made = many(config, 300)
    assert all(p.trace["tags"][:2] == ["tag_050", "tag_001"] and "tag_007" in p.trace["tags"] for p in made)
    assert {p.trace["num_tags"] for p in made} == {4}


def test_given_and_made_captions_and_lines_by_their_shares():
    config = recipe(caption_prob=1, made_caption_prob=0.95)
    made = many(config, caption="given", made_caption="one\n\n two \nthree")
    assert fits(Counter(p.trace["caption"] for p in made), {"made": 0.95, "given": 0.05})
    lines = Counter(p.text for p in made if p.trace["caption"] == "made")
    assert fits(lines, {"one": 1 / 3, "two": 1 / 3, "three": 1 / 3})
    assert {p.text for p in many(config, 20, caption="given")} == {"given"}


@pytest.mark.parametrize(("caption", "text"), [("A dog.", "A dog. tag_000"), ("a dog", "a dog, tag_000")])
def test_a_caption_and_then_tags(caption, text):
    assert make(sample(1, caption=caption), recipe(caption_and_tags_prob=1), 0).text == text


def test_a_sample_with_nothing_but_a_caption_uses_it():
    assert make(sample(0, caption="Only this."), PLAIN, 0).text == "Only this."
    prompt = make(sample(0, score=None, caption=" \n"), PLAIN, 0)
    assert (prompt.text, prompt.trace["num_tags"]) == ("", 0)


def test_faces_keep_their_underscore():
    one = sample(0, tags=["^_^", "long_hair", "o_o"], score=5)
    prompt = make(one, recipe(spaces_prob=1, score_tags=True), 0)
    assert sorted(prompt.text.split(", ")[-3:]) == ["^_^", "long hair", "o_o"]
    assert prompt.text.startswith("score ")


@given(text=st.text(max_size=30), seed=st.integers(0, 1000))
def test_a_slip_is_one_letter(text, seed):
    slip = spelling.misspell(text, random.Random(seed))
    if sum(letter.isalpha() for letter in text) < 4:
        assert slip == text
        return
    assert abs(len(slip) - len(text)) <= 1
    if len(slip) == len(text):
        wrong = [place for place in range(len(text)) if slip[place] != text[place]]
        assert len(wrong) == 2
        assert [slip[place] for place in wrong] == [text[place] for place in reversed(wrong)]
    else:
        short, long = sorted((slip, text), key=len)
        assert any(long[:place] + long[place + 1 :] == short for place in range(len(long)))


def test_slips_exchange_leave_out_and_double():
    lengths = Counter(len(spelling.misspell("abcdef", random.Random(seed))) - 6 for seed in range(3000))
    # The last letter has no neighbour to be exchanged with, and is doubled instead.
    assert fits(lengths, {0: 5 / 18, -1: 6 / 18, 1: 7 / 18})


def test_slips_come_at_their_rate_and_are_traced():
    made = many(recipe(misspelling_prob=0.1, spaces_prob=0.5), 1000, num_tags=0, tags=["some_words", "xy"])
    slips = sum(len(prompt.trace["misspelled"]) for prompt in made)
    assert all(set(prompt.trace["misspelled"]) <= {"some_words"} for prompt in made)
    assert fits({True: slips, False: 1000 - slips}, {True: 0.1, False: 0.9})
    for prompt in made:
        for written in prompt.trace["misspelled"].values():
            assert written in prompt.text


def test_chunks_have_their_shares():
    made = many(recipe(chunk_shares=(0.09, 0.66, 0.25), empty_prob=0.1))
    assert fits(Counter(p.num_chunks for p in made), {1: 0.09, 2: 0.66, 3: 0.25})
    config = recipe(chunk_shares=(0.09, 0.66, 0.25))
    assert [prompts.draw_chunks(config, random.Random(n)) for n in range(50)] == [
        p.num_chunks for p in many(config, 50)
    ]


def test_a_prompt_follows_from_its_key_alone():
    """Written down once: another version of the library must not change what a run reads."""
    prompt = prompts.make_prompt(sample(12), ALIASES, PromptConfig(mean_tags=4), generator(1, Purpose.PROMPT, 2, "id"))
    assert prompt.text == ("score_4_up, score_1_up, score_7_up, tag_000")
