"""Prompts: pure functions whose every choice has the stated distribution, and whose pieces are what
they say."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_table import make_prompts, repeated, table
from scipy import stats

from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.prompts import spelling
from training.prompts.chosen_tags import MAX_PROMPTS
from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples
from training.seeds import Purpose, Stream

NAMES = [f"tag_{number:03d}" for number in range(100)]
ALIASES = Vocabulary({}, {name: (f"{name}_one", f"{name}_two") for name in NAMES[::2]})
PLAIN = PromptConfig(
    mean_tags=0,
    empty_prob=0,
    alias_prob=0,
    spaces_prob=0,
    mixed_prob=0,
    loose_separators_prob=0,
    score_tags=False,
)
BOX = {"y0": 1.0, "x0": 2.0, "y1": 3.0, "x1": 4.5, "confidence": 0.5}
BOORU = {
    "1girl": "people", "2boys": "people", "miku": "character", "vocaloid": "copyright", "someone": "artist",
    "long_hair": "general", "sky": "general", "highres": "meta", "masterpiece": "special", "newest": "special",
}  # fmt: skip
OF_BOORU = {
    "tags": sorted(set(BOORU) - {"masterpiece", "newest"}),
    "words": ["masterpiece", "newest"],
}


def recipe(**changes):
    return dataclasses.replace(PLAIN, **changes)


def sample(num_tags=100, *, watermark=False, **changes):
    return {"tags": NAMES[:num_tags], "boxes": [BOX] if watermark else [], **changes}


def make(one, config, vocabulary=ALIASES):
    """One prompt of a sample."""
    return make_prompts(table([one]), vocabulary, config)[0]


def many(config, count=4000, vocabulary=ALIASES, **changes):
    """Prompts of samples that differ in nothing but their ids."""
    return make_prompts(repeated(sample(**changes), count), vocabulary, config)


def available(one):
    """Names that a prompt of a sample can have."""
    return {*one["tags"], *one.get("words", ())} | ({"watermark"} if one["boxes"] else set())


def fits(counts, expected):
    """Chi-square: whether counts by key may come from probabilities by key, at one in a
    thousand."""
    assert set(counts) <= {key for key, share in expected.items() if share}
    total = sum(counts.values())
    keys = [key for key, share in expected.items() if share]
    return (
        stats.chisquare(
            [counts[key] for key in keys], [expected[key] * total for key in keys]
        ).pvalue
        > 1e-3
    )


shares = st.sampled_from([0.0, 0.3, 1.0])
hostile = st.one_of(
    st.text(min_size=1, max_size=12).filter(str.strip),
    st.sampled_from(
        [
            "a,b",
            "(o)_(o)",
            ":)",
            "photo_(medium)",
            "😀_smile",
            "x" * 5000,
            ">_<",
            "it's",
            "<|endoftext|>",
        ]
    ),
)
samples = st.fixed_dictionaries(
    {
        "tags": st.lists(
            st.one_of(st.sampled_from([*NAMES, "safe", "watermark"]), hostile),
            unique=True,
            max_size=40,
        ),
        "words": st.lists(st.sampled_from(["safe", "newest"]), unique=True),
        "score": st.sampled_from([None, *range(1, 10)]),
        "caption": st.sampled_from([None, "A sentence.", "One line\n\nanother line", " \n "]),
        "made_caption": st.sampled_from([None, "a made one"]),
        "boxes": st.sampled_from([[], [BOX]]),
    }
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
    missing_space_prob=shares,
    misspelling_prob=shares,
    score_tags=st.booleans(),
    caption_prob=st.sampled_from([0.0, 0.4]),
    caption_and_tags_prob=st.sampled_from([0.0, 0.6]),
    made_caption_prob=shares,
    empty_prob=st.sampled_from([0.0, 0.1, 1.0]),
    empty_as=st.sampled_from(["string", "zeros"]),
    chunk_shares=st.sampled_from([(), (0.25, 0.5, 0.25)]),
)


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(samples, min_size=1, max_size=5), config=configs, seed=st.integers(0, 2**64))
def test_every_prompt_obeys_its_recipe(rows, config, seed):
    for one, prompt in zip(rows, make_prompts(table(rows), ALIASES, config, seed), strict=True):
        check(one, prompt, config)


def check(one, prompt, config):
    trace = prompt.trace
    assert len(prompt.pieces) == prompt.num_pieces
    if trace["kind"] == "empty":
        assert (prompt.text, trace["as"]) == ("", config.empty_as)
        assert prompt.zeroed == (config.empty_as == "zeros")
        return
    assert not prompt.zeroed
    if trace["kind"] == "caption":
        lines = {"given": one["caption"], "made": one["made_caption"]}[
            trace["caption"]
        ].splitlines()
        assert prompt.text == [line.strip() for line in lines if line.strip()][trace["line"]]
        return
    tags = trace["tags"]
    assert set(tags) | set(trace["dropped"]) <= available(one)
    assert len(set(tags)) == len(tags) == trace["num_tags"]
    assert not set(tags) & set(trace["dropped"])
    first = [name for name in config.first_tags if name in available(one)]
    assert tags[: len(first)] == first
    assert ("watermark" in tags) == ("watermark" in available(one))
    assert trace["wanted"] >= 1 or not config.mean_tags
    forced = len({*first, "watermark"} & set(tags))
    left = len(available(one)) - len(trace["dropped"])
    assert len(tags) == min(max(trace["wanted"], forced), left)
    assert (trace["kind"] == "caption_and_tags") == ("caption" in trace)
    score = one["score"] or 0
    assert set(trace["score_tags"]) <= {f"score_{n}_up" for n in range(1, score + 1)} | {
        f"score_{score}"
    }
    assert len(set(trace["score_tags"])) == len(trace["score_tags"]) <= 3
    assert bool(trace["score_tags"]) == bool(config.score_tags and score)
    for written in trace["aliases"].values():
        assert written.endswith(("_one", "_two"))
    assert_text_is_what_the_trace_says(prompt)


def assert_text_is_what_the_trace_says(prompt):
    """The names of the trace in their order; of separators and underscores it says only how they
    are chosen."""
    trace = prompt.trace
    names = [
        trace["misspelled"].get(name, trace["aliases"].get(name, name)) for name in trace["tags"]
    ]
    scores, said = (re.sub(r"[\s_,]", "", "".join(own)) for own in (trace["score_tags"], names))
    text = re.sub(r"[\s_,]", "", prompt.text)
    assert text.startswith(scores)
    assert text.endswith(said)
    assert "caption" in trace or text == scores + said
    spaced = not trace["loose"] and not prompt.block.config.missing_space_prob
    if trace["spelling"] == "underscores" and spaced and "caption" not in trace:
        assert prompt.text == ", ".join([*trace["score_tags"], *names])


def test_plain_tags_are_written_as_they_are():
    assert make(sample(tags=["b_c", "a", "(d)"], words=["safe"]), PLAIN).text in {
        ", ".join(order) for order in itertools.permutations(["b_c", "a", "(d)", "safe"])
    }


def test_the_number_of_tags_has_the_stated_distribution():
    wanted = [
        prompt.trace["wanted"] for prompt in many(recipe(mean_tags=32, std_tags=19.8), 20_000)
    ]
    # Whole numbers of N(32, 19.8); what is below 2 falls on 1. Spread over its unit, each is the
    # normal number again.
    at_least_two = [
        value + random.Random(place).random() for place, value in enumerate(wanted) if value >= 2
    ]
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
    assert fits(
        Counter(len(p.trace["score_tags"]) for p in made),
        dict.fromkeys(range(1, most + 1), 1 / most),
    )
    # bigASP v1 (github.com/fpgaminer/bigasp-training, data.py) draws k of the score + 1 names, so
    # each is there with E[k] / (score + 1).
    share = (1 + most) / 2 / (score + 1)
    exact = sum(f"score_{score}" in p.trace["score_tags"] for p in made)
    assert fits({True: exact, False: 8000 - exact}, {True: share, False: 1 - share})
    assert {1: 0.75, 2: 2 / 3, 9: 0.2}[score] == pytest.approx(share)
    assert all(
        p.text.startswith("score_") and "score_" not in p.text.split(", tag")[1] for p in made
    )


def test_kinds_have_hand_worked_shares():
    config = recipe(empty_prob=0.1, caption_prob=0.2, caption_and_tags_prob=0.3)
    kinds = Counter(prompt.trace["kind"] for prompt in many(config, caption="A sentence."))
    assert fits(kinds, {"empty": 0.1, "caption": 0.18, "caption_and_tags": 0.27, "tags": 0.45})


def test_spellings_and_separators_have_hand_worked_shares():
    made = many(
        recipe(spaces_prob=0.25, mixed_prob=0.25, loose_separators_prob=0.2), 3000, num_tags=20
    )
    assert fits(
        Counter(p.trace["spelling"] for p in made),
        {"spaces": 0.25, "mixed": 0.25, "underscores": 0.5},
    )
    assert fits(Counter(p.trace["loose"] for p in made), {True: 0.2, False: 0.8})
    mixed = [p for p in made if p.trace["spelling"] == "mixed"]
    spaced = sum(len(re.findall("tag \\d", p.text)) for p in mixed)
    assert fits({True: spaced, False: 20 * len(mixed) - spaced}, {True: 0.8, False: 0.2})
    loose = [p for p in made if p.trace["loose"] and p.trace["spelling"] == "underscores"]
    between = Counter(gap for p in loose for gap in re.split(r"tag_\d+", p.text)[1:-1])
    assert fits(between, {", ": 0.64, ",": 0.16, "  ": 0.16, " ": 0.04})
    assert all(set(re.split(r"tag_\d+", p.text)) == {"", ", "} for p in made[:500]
               if not p.trace["loose"] and p.trace["spelling"] == "underscores")  # fmt: skip


def test_commas_without_a_space_have_the_shares_of_bigasps_code():
    # data.py of bigASP v1: eight prompts in ten have commas only, in two each separator is a comma
    # in eight cases of ten and else a space; then, in every prompt, a space follows in eight cases
    # of ten.
    careful, loose = {", ": 0.8, ",": 0.2}, {", ": 0.64, ",": 0.16, "  ": 0.16, " ": 0.04}
    made = many(recipe(loose_separators_prob=0.2, missing_space_prob=0.2), 3000, num_tags=20)
    assert fits(Counter(p.trace["loose"] for p in made), {True: 0.2, False: 0.8})
    for wanted, expected in ((True, loose), (False, careful)):
        own = [p.text for p in made if p.trace["loose"] is wanted]
        assert fits(
            Counter(gap for text in own for gap in re.split(r"tag_\d+", text)[1:-1]), expected
        )
        assert sum("," in text.replace(", ", "") for text in own) > 0.9 * len(own), (
            "in nearly all prompts"
        )
    # Nothing else is drawn differently, and a prompt without the option has a space after every
    # comma.
    before = many(recipe(loose_separators_prob=0.2), 3000, num_tags=20)
    assert [p.text.replace(" ", "") for p in made] == [p.text.replace(" ", "") for p in before]
    assert not any("," in p.text.replace(", ", "") for p in before if not p.trace["loose"])


def test_aliases_are_exchanged_at_their_rate():
    made = many(recipe(alias_prob=0.2), 2000, num_tags=10)
    exchanged = Counter(alias for prompt in made for alias in prompt.trace["aliases"].values())
    assert set(exchanged) == {
        f"{name}_{which}" for name in NAMES[:10:2] for which in ("one", "two")
    }
    total = sum(exchanged.values())
    assert fits({True: total, False: 5 * 2000 - total}, {True: 0.2, False: 0.8})
    assert fits(exchanged, dict.fromkeys(exchanged, 0.1))
    for prompt in made[:100]:
        written = [prompt.trace["aliases"].get(name, name) for name in prompt.trace["tags"]]
        assert prompt.text == ", ".join(written)


def test_dropout_takes_general_and_special_tags_only():
    made = many(
        recipe(tag_dropout=0.1, always_tags=("sky",)), vocabulary=Vocabulary(BOORU, {}), **OF_BOORU
    )
    dropped = Counter(name for prompt in made for name in prompt.trace["dropped"])
    assert set(dropped) == {"long_hair", "highres", "masterpiece", "newest"}
    total = sum(dropped.values())
    assert fits({True: total, False: 16_000 - total}, {True: 0.1, False: 0.9})


def test_kohakus_order():
    rest = set()
    for prompt in many(recipe(order="kohaku"), 200, Vocabulary(BOORU, {}), **OF_BOORU):
        assert prompt.text.startswith("1girl, 2boys, miku, vocaloid, someone, ")
        rest.add(prompt.trace["tags"][5:][0])
    assert rest == {"long_hair", "sky", "highres", "masterpiece", "newest"}


def test_first_tags_open_the_prompt_and_always_tags_stay():
    config = recipe(
        mean_tags=4,
        std_tags=0,
        first_tags=("tag_050", "absent", "tag_001"),
        always_tags=("tag_007",),
    )
    made = many(config, 300)
    assert all(
        p.trace["tags"][:2] == ["tag_050", "tag_001"] and "tag_007" in p.trace["tags"] for p in made
    )
    assert {p.trace["num_tags"] for p in made} == {4}


def test_given_and_made_captions_and_lines_by_their_shares():
    config = recipe(caption_prob=1, made_caption_prob=0.95)
    made = many(config, caption="given", made_caption="one\n\n two \nthree")
    assert fits(Counter(p.trace["caption"] for p in made), {"made": 0.95, "given": 0.05})
    lines = Counter(p.text for p in made if p.trace["caption"] == "made")
    assert fits(lines, {"one": 1 / 3, "two": 1 / 3, "three": 1 / 3})
    assert {p.text for p in many(config, 20, caption="given")} == {"given"}


@pytest.mark.parametrize(
    ("caption", "text"), [("A dog.", "A dog. tag_000"), ("a dog", "a dog, tag_000")]
)
def test_a_caption_and_then_tags(caption, text):
    assert make(sample(1, caption=caption), recipe(caption_and_tags_prob=1)).text == text


def test_a_sample_with_nothing_but_a_caption_uses_it():
    assert make(sample(0, caption="Only this."), PLAIN).text == "Only this."
    prompt = make(sample(0, score=None, caption=" \n"), PLAIN)
    assert (prompt.text, prompt.trace["num_tags"]) == ("", 0)


def test_faces_keep_their_underscore():
    prompt = make(
        sample(tags=["^_^", "long_hair", "o_o"], score=5), recipe(spaces_prob=1, score_tags=True)
    )
    assert sorted(prompt.text.split(", ")[-3:]) == ["^_^", "long hair", "o_o"]
    assert prompt.text.startswith("score ")


@given(
    text=st.text(max_size=30),
    letter=st.floats(0, 1, exclude_max=True),
    kind=st.floats(0, 1, exclude_max=True),
)
def test_a_slip_is_one_letter(text, letter, kind):
    slip = spelling.misspell(text, letter, kind)
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
    draw = random.Random(0).random
    lengths = Counter(len(spelling.misspell("abcdef", draw(), draw())) - 6 for _ in range(3000))
    # The last letter has no neighbour to be exchanged with, and is doubled instead.
    assert fits(lengths, {0: 5 / 18, -1: 6 / 18, 1: 7 / 18})


def test_slips_come_at_their_rate_and_are_traced():
    made = many(recipe(misspelling_prob=0.1, spaces_prob=0.5), 1000, tags=["some_words", "xy"])
    slips = sum(len(prompt.trace["misspelled"]) for prompt in made)
    assert all(set(prompt.trace["misspelled"]) <= {"some_words"} for prompt in made)
    assert fits({True: slips, False: 1000 - slips}, {True: 0.1, False: 0.9})
    for prompt in made:
        for written in prompt.trace["misspelled"].values():
            assert written in prompt.text


def words_of(image_id, count):
    """A sample's numbers in epoch 2 of seed 1, by hand."""
    parts = [(b"i", b"1"), (b"s", b"prompt"), (b"i", b"2"), (b"s", image_id.encode())]
    said = b"".join(kind + len(data).to_bytes(8, "little") + data for kind, data in parts)
    return [
        number / 2**32
        for number in np.frombuffer(hashlib.shake_128(said).digest(4 * count), "<u4").tolist()
    ]


def by_hand(image_id, tags, score, config, caption=None):
    """What a prompt of tags, a score and perhaps a caption says, one word after the other: 16 of
    the sample, then seven for each tag."""
    size = 3 + len(tags)
    words = words_of(image_id, 16 + 7 * size)
    _, empty, kind, _, _, wanted, num_scores, how, loose = words[:9]
    which, where, alias, other, spaced, comma, space = (
        words[16 + n * size : 16 + (n + 1) * size] for n in range(7)
    )
    if empty < config.empty_prob:
        return ""
    candidates = [*(f"score_{n}_up" for n in range(1, score + 1)), f"score_{score}"]
    count = 1 + int(num_scores * min(3, score + 1))
    own = [(candidates.pop(int(which[n] * len(candidates))), n) for n in range(count)]
    number = max(config.min_tags, int(stats.norm.ppf(wanted, config.mean_tags, config.std_tags)))
    kept = sorted(range(3, size), key=lambda place: which[place])[:number]
    for place in sorted(kept, key=lambda place: where[place]):
        name = tags[place - 3]
        aliases = ALIASES.aliases.get(name, ())
        own.append((aliases[int(other[place] * len(aliases))] if aliases and alias[place] < config.alias_prob else name,
                    place))  # fmt: skip
    text, last_score = "", own[count - 1]
    captioned = caption is not None and kind < config.caption_and_tags_prob
    for name, place in own:
        with_spaces = how < config.spaces_prob or (
            how < config.spaces_prob + config.mixed_prob and spaced[place] < 0.8
        )
        text += name.replace("_", " ") if with_spaces and len(name) > 3 else name
        if captioned and (name, place) == last_score:
            text += ", " + caption
            if len(own) > count:
                text += " " if caption[-1] in ".!?,;:" else ", "
        elif place != own[-1][1]:
            careless = loose < config.loose_separators_prob
            text += "," if not careless or comma[place] < 0.8 else " "
            text += " " if not careless or space[place] < 0.8 else ""
    return text


def test_prompts_are_those_that_the_words_drawn_say():
    rng = random.Random(0)
    rows = [
        {"tags": sorted(rng.sample(NAMES, rng.randint(1, 60))), "score": rng.randint(1, 9)}
        for _ in range(300)
    ]
    frame, config = table(rows), PromptConfig(loose_separators_prob=0.5)
    made = make_prompts(frame, ALIASES, config, seed=1, epoch=2)
    expected = [by_hand(image_id, row["tags"], row["score"], config)
                for image_id, row in zip(frame["image_id"], rows, strict=True)]  # fmt: skip
    assert [prompt.text for prompt in made] == expected
    # Written down once: another version of a library must not change what a run reads.
    assert made[44].text == "score 1 up  score 2 up, score 3 up, tag_014, tag 006 one,tag 099"


def test_score_tags_are_the_first_of_a_prompt_before_its_caption():
    rng = random.Random(0)
    rows = [
        {"tags": sorted(rng.sample([*NAMES, "(d)", ">_<"], rng.randint(1, 6))), "score": rng.randint(1, 9),
         "caption": rng.choice(["A dog.", "a dog", "(a dog)", "dogs, two,"])}
        for _ in range(400)
    ]  # fmt: skip
    config = PromptConfig(loose_separators_prob=0.5, caption_and_tags_prob=0.7)
    frame = table(rows)
    made = make_prompts(frame, ALIASES, config, seed=1, epoch=2)
    expected = [by_hand(image_id, row["tags"], row["score"], config, row["caption"])
                for image_id, row in zip(frame["image_id"], rows, strict=True)]  # fmt: skip
    kinds = Counter(prompt.trace["kind"] for prompt in made)
    assert min(kinds[kind] for kind in ("empty", "tags", "caption_and_tags")) > 20
    both = [(prompt.text, wanted) for prompt, wanted in zip(made, expected, strict=True)
            if prompt.trace["kind"] == "caption_and_tags"]  # fmt: skip
    assert [text for text, _ in both] == [wanted for _, wanted in both]


@pytest.mark.parametrize(
    ("caption", "tags", "text"),
    [("A dog.", ["b"], r"(score_\w+, )+A dog\. b"), ("a dog", ["(b)"], r"(score_\w+, )+a dog, \(b\)"),
     ("a dog", ["b"], r"(score_\w+, )+a dog")],
)  # fmt: skip
def test_a_caption_between_score_tags_and_tags(caption, tags, text):
    dropout = 1.0 if text.endswith("dog") else 0.0
    config = recipe(score_tags=True, caption_and_tags_prob=1, tag_dropout=dropout)
    for loose in (0, 1):
        one = dataclasses.replace(config, loose_separators_prob=loose)
        for prompt in make_prompts(
            table([{"tags": tags, "score": 5, "caption": caption}] * 30), ALIASES, one
        ):
            assert re.fullmatch(
                text if not loose else text.replace(", )+", "[ ,]+)+"), prompt.text
            ), prompt.text
            assert re.search(r"score_\w+, " + re.escape(caption), prompt.text)


@pytest.fixture(scope="module")
def mixed_set():
    """Samples of all kinds, more than a block of them."""
    rng = random.Random(1)
    rows = [
        {
            "tags": sorted(rng.sample([*NAMES[:40], ">_<", "(o)_(o)", "watermark", "safe"], rng.randint(0, 12))),
            "words": rng.sample(["safe", "newest"], rng.randint(0, 2)), "score": rng.choice([None, 1, 9]),
            "caption": rng.choice([None, "one\ntwo words", " \n"]), "made_caption": rng.choice([None, "made"]),
            "boxes": [BOX] * rng.randint(0, 1),
        }
        for _ in range(MAX_PROMPTS + 300)
    ]  # fmt: skip
    config = PromptConfig(
        mean_tags=6, std_tags=4, order="kohaku", first_tags=("tag_003",), tag_dropout=0.2, misspelling_prob=0.1,
        loose_separators_prob=0.5, caption_prob=0.2, caption_and_tags_prob=0.3, made_caption_prob=0.5,
    )  # fmt: skip
    return table(rows), PromptMaker(
        Samples(table(rows)), Vocabulary(BOORU, ALIASES.aliases), config, 3, []
    )


def test_a_prompt_is_the_same_alone_in_any_block_and_in_any_order(mixed_set):
    _, maker = mixed_set
    together = [
        (prompt.text, prompt.trace) for prompt in maker.prompts(range(MAX_PROMPTS + 300), 4)
    ]
    assert len({trace["kind"] for _, trace in together}) == 4
    order = random.Random(2).sample(range(len(together)), len(together))
    for size in (1, 7, MAX_PROMPTS):
        for first in range(0, len(order), size)[:150]:
            rows = order[first : first + size]
            found = [(prompt.text, prompt.trace) for prompt in maker.prompts(rows, 4)]
            assert found == [together[row] for row in rows]
    assert [prompt.text for prompt in maker.prompts(range(100), 5)] != [
        text for text, _ in together[:100]
    ]


def test_a_prompt_does_not_depend_on_the_set_that_its_sample_is_in(mixed_set):
    frame, maker = mixed_set
    part = PromptMaker(Samples(frame[500:560]), maker.vocabulary, maker.config, 3, [])
    expected = [(prompt.text, prompt.trace) for prompt in maker.prompts(range(500, 560), 4)]
    assert [(prompt.text, prompt.trace) for prompt in part.prompts(range(60), 4)] == expected


def test_a_prompt_is_the_same_in_another_process():
    code = (
        "import json; from test_writing import *;"
        "print(json.dumps([p.text for p in many(PromptConfig(misspelling_prob=0.1), 50)]))"
    )
    expected = [prompt.text for prompt in many(PromptConfig(misspelling_prob=0.1), 50)]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root / "tests" / "tools", root)))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          env={"PYTHONHASHSEED": "1", "PYTHONPATH": paths}, check=True)  # fmt: skip
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"alias_prob": 0.9}, {"spaces_prob": 0.1, "mixed_prob": 0.1}, {"loose_separators_prob": 1.0},
        {"misspelling_prob": 0.5}, {"score_tags": False}, {"caption_prob": 0.5, "caption_and_tags_prob": 0.2},
        {"empty_prob": 0.5}, {"chunk_shares": (0.5, 0.5)},
    ],
)  # fmt: skip
def test_an_option_leaves_what_others_draw_alone(changes):
    """Which tags a prompt has, and in which order, does not move with options that are about other
    things."""
    plain, changed = (
        many(dataclasses.replace(PromptConfig(), **own), 200, caption="A sentence.")
        for own in ({}, changes)
    )
    both = [(one.trace, other.trace) for one, other in zip(plain, changed, strict=True)]
    tagged = [pair for pair in both if all("tags" in trace for trace in pair)]
    assert len(tagged) > 50
    assert all(one["tags"] == other["tags"] for one, other in tagged)
    if changes.get("score_tags", True):
        assert all(one["score_tags"] == other["score_tags"] for one, other in tagged)


def test_what_dropout_leaves_keeps_its_order():
    plain, dropped = (many(recipe(tag_dropout=share), 100, num_tags=20) for share in (0.0, 0.4))
    for one, other in zip(plain, dropped, strict=True):
        gone = other.trace["dropped"]
        assert [name for name in one.trace["tags"] if name not in gone] == other.trace["tags"]


def test_a_word_that_is_also_a_tag_is_there_once(mixed_set):
    one = sample(tags=["newest", "safe", "watermark"], words=["safe", "newest"], watermark=True)
    for prompt in make_prompts(table([one] * 20), ALIASES, PLAIN):
        assert sorted(prompt.text.split(", ")) == ["newest", "safe", "watermark"]


def test_words_of_a_stream_follow_from_the_key_alone_and_longer_ones_go_on():
    stream = Stream(1, Purpose.PROMPT, 2)
    long, alone = stream.words(["a", "é"], [8, 5]), stream.words(["é"], [3])
    assert long.dtype == np.uint32
    assert long[8:11].tolist() == alone.tolist()
    assert (long[:8] / 2**32).tolist() == words_of("a", 8)
    assert len({*long.tolist(), *Stream(1, Purpose.PROMPT, 3).words(["a"], [8]).tolist()}) == 21
