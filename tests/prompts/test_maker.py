"""Prompts with ids: those of the tokenizers themselves, cut at a tag's border, counted alike by all
workers."""

import dataclasses
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_table import table

from training import manifests
from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.errors import DataError, PipelineError
from training.models.tokens import CHUNK_TOKENS, tokenize
from training.prompts import chunk_counts
from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples

NAMES = [f"long_hair_{number}" for number in range(60)]


def maker(rows, tokenizers, seed=0, **changes):
    config = dataclasses.replace(PromptConfig(), **changes)
    aliases = Vocabulary({}, {NAMES[0]: ("hair!", "(o)_(o)", ">_<")})
    return PromptMaker(Samples(table(rows)), aliases, config, seed, tokenizers)


hostile = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
    st.sampled_from(
        ["a,b", "(medium)", "photo_(medium)", "wow!!!", ":)", "😀", "<|endoftext|>", "x" * 5000, "it's", "é́", "o_o",
         "^_^", "1girl", "tag_(series)", "'s_own", "\u0301x", ",", "_", "a_", "K"]
    ),
    st.sampled_from(NAMES),
)  # fmt: skip
rows_of_sets = st.fixed_dictionaries(
    {
        "tags": st.lists(hostile, unique=True, max_size=60),
        "words": st.lists(st.sampled_from(["safe", "!"]), unique=True),
        "caption": st.sampled_from([None, "A  caption, with (odd) gaps!", "it's " * 300]),
        "score": st.sampled_from([None, 1, 9]),
    }
)
recipes = st.fixed_dictionaries(
    {
        "mean_tags": st.sampled_from([0.0, 5.0, 32.0]), "order": st.sampled_from(["shuffled", "kohaku"]),
        "tag_dropout": st.sampled_from([0.0, 0.3]), "alias_prob": st.sampled_from([0.0, 0.5]),
        "spaces_prob": st.sampled_from([0.0, 0.4]), "mixed_prob": st.sampled_from([0.0, 0.4]),
        "loose_separators_prob": st.sampled_from([0.0, 0.5, 1.0]), "misspelling_prob": st.sampled_from([0.0, 0.3]),
        "caption_prob": st.sampled_from([0.0, 0.2]), "caption_and_tags_prob": st.sampled_from([0.0, 0.3]),
        "missing_space_prob": st.sampled_from([0.0, 0.5, 1.0]),
        "empty_prob": st.sampled_from([0.0, 0.1]), "chunk_shares": st.sampled_from([(), (0.5, 0.5)]),
    }
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(rows_of_sets, min_size=1, max_size=4), recipe=recipes, seed=st.integers(0, 50))
def test_ids_are_those_of_each_tokenizer(clip_tokenizers, rows, recipe, seed):
    one = maker(rows, clip_tokenizers, seed, **recipe)
    numbers = list(range(len(rows)))
    prompts = one.make(numbers, 0)
    assert one.count_chunks(np.array(numbers), 0).tolist() == [made.num_chunks for made in prompts]
    for made, whole in zip(prompts, one.prompts(numbers, 0), strict=True):
        (uncut,) = tokenize([whole.text], clip_tokenizers[0])
        assert made.num_tokens == uncut.num_tokens
        assert made.num_chunks == uncut.num_chunks or recipe["chunk_shares"]
        if not made.num_truncated:
            assert made.text == whole.text
        elif (
            len(made.prompt.pieces) > 1
        ):  # of one piece longer than all only the first tokens are there
            assert len(tokenize([made.text], clip_tokenizers[0])[0].ids) <= made.num_chunks
            assert whole.text.startswith(made.text)
        for number, (found, tokenizer) in enumerate(
            zip(one.ids([made]), clip_tokenizers, strict=True)
        ):
            (expected,) = tokenize(
                [made.text], tokenizer, max_chunks=made.num_chunks, min_chunks=made.num_chunks
            )
            assert found[0].tolist() == [list(row) for row in expected.ids], number
            assert found.dtype == np.int64


def test_a_long_prompt_is_cut_after_a_tag_and_the_rest_is_counted(clip_tokenizers):
    one = maker([{"tags": NAMES}], clip_tokenizers, mean_tags=0, empty_prob=0, alias_prob=0, loose_separators_prob=0,
                spaces_prob=0, mixed_prob=0, max_chunks=2)  # fmt: skip
    (made,) = one.make([0], 0)
    assert len(made.tokens) <= 2 * CHUNK_TOKENS < made.num_tokens
    assert made.num_truncated == made.num_tokens - len(made.tokens) > 0
    kept = made.text.split(", ")
    assert set(kept) - {name for name in kept if name.startswith("score_")} <= set(NAMES)
    longer = one.prompts([0], 0)[0].text.split(", ")
    (one_more,) = tokenize([", ".join(longer[: len(kept) + 1])], clip_tokenizers[0])
    assert longer[: len(kept)] == kept
    assert one_more.num_tokens > 2 * CHUNK_TOKENS


def test_shares_of_chunks_are_the_mix_and_short_prompts_are_filled(clip_tokenizers):
    rows = [{"tags": NAMES[: number % 60 + 1]} for number in range(400)]
    one = maker(rows, clip_tokenizers, chunk_shares=(0.09, 0.66, 0.25))
    made = one.make(range(400), 0)
    chunks = np.array([prompt.num_chunks for prompt in made])
    assert chunks.tolist() == one.count_chunks(np.arange(400), 0).tolist()
    assert np.bincount(chunks, minlength=4)[1:] / 400 == pytest.approx([0.09, 0.66, 0.25], abs=0.07)
    short = next(
        prompt for prompt in made if prompt.num_chunks == 3 and prompt.num_tokens <= CHUNK_TOKENS
    )
    bos, eos = clip_tokenizers[0].bos_token_id, clip_tokenizers[0].eos_token_id
    assert one.ids([short])[0][0, 2].tolist() == [bos, eos, *[clip_tokenizers[0].pad_token_id] * 75]
    assert all(len(prompt.tokens) <= CHUNK_TOKENS * prompt.num_chunks for prompt in made)
    assert any(prompt.num_truncated for prompt in made)


def test_validation_reads_the_same_prompts_for_ever_and_never_the_empty_one(clip_tokenizers):
    one = maker([{"tags": NAMES[:5]}] * 40, clip_tokenizers, empty_prob=0.5)
    fixed = [made.text for made in one.make(range(40), None)]
    assert fixed == [made.text for made in one.make(range(40), None)]
    assert all(fixed)
    assert any(made.text == "" for made in one.make(range(40), 0))
    assert [made.text for made in one.make(range(40), 0)] != [
        made.text for made in one.make(range(40), 1)
    ]


def test_empty_prompts_are_strings_or_zeros(clip_tokenizers):
    for empty_as, zeroed in (("string", False), ("zeros", True)):
        one = maker([{"tags": NAMES[:5]}], clip_tokenizers, empty_prob=1.0, empty_as=empty_as)
        (made,) = one.make([0], 0)
        assert (made.text, made.zeroed, made.num_chunks) == ("", zeroed, 1)


def test_tokenizers_of_other_vocabularies_each_read_for_themselves(clip_tokenizers, tiny_sdxl):
    from training.models.text_encoders import load_tokenizer

    pair = [clip_tokenizers[0], load_tokenizer(tiny_sdxl / "tokenizer")]
    one = maker([{"tags": NAMES[:3]}], pair, empty_prob=0)
    (made,) = one.make([0], 0)
    for found, tokenizer in zip(one.ids([made]), pair, strict=True):
        (expected,) = tokenize(
            [made.text], tokenizer, max_chunks=made.num_chunks, min_chunks=made.num_chunks
        )
        assert found[0].tolist() == [list(row) for row in expected.ids]


def test_rows_that_are_expected_have_the_prompts_that_they_have_alone(clip_tokenizers, monkeypatch):
    rows = [{"tags": NAMES[: number % 60 + 1]} for number in range(3000)]
    one, other = (maker(rows, clip_tokenizers, 3) for _ in range(2))
    made_at_once = []
    encode = PromptMaker._encode
    monkeypatch.setattr(
        PromptMaker,
        "_encode",
        lambda self, block: made_at_once.append(len(block.empty)) or encode(self, block),
    )
    order = np.random.default_rng(0).permutation(3000)
    one.expect(order, 1)

    def same(rows, epoch):
        found = [(made.text, [ids.tolist() for ids in made.ids]) for made in one.make(rows, epoch)]
        made_at_once_by_one = made_at_once[:]
        expected = [
            (made.text, [ids.tolist() for ids in made.ids]) for made in other.make(rows, epoch)
        ]
        made_at_once[:] = made_at_once_by_one
        assert found == expected

    batches = [order[first : first + 7].tolist() for first in range(0, 2500, 7)]
    for number, batch in enumerate(batches):
        same(batch, 1)
        if number == 100:  # validation, and a batch out of turn, are made for themselves
            same(order[:5].tolist(), None)
            same(order[-5:].tolist(), 1)
    assert sum(made_at_once) < 3 * 1024 + 11
    assert made_at_once.count(1024) >= 2
    one.expect(order[2000:], 2)
    # The rows that are expected, of another epoch and then of theirs; the first of them again, out
    # of turn.
    for first, epoch in ((2000, 1), (2010, 2), (2000, 2), (2010, None), (2010, 2), (2000, 2)):
        same(order[first : first + 10].tolist(), epoch)


@pytest.fixture
def many_groups(tmp_path):
    """A set of 300 rows in groups of 64."""
    rng = np.random.default_rng(0)
    frame = table([{"tags": sorted(rng.choice(NAMES, rng.integers(1, 60), replace=False)), "words": ["safe"]}
                   for _ in range(300)])  # fmt: skip
    path = tmp_path / "set.parquet"
    pq.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), path, row_group_size=64)
    return path, frame


def test_workers_count_what_this_process_counts(many_groups, clip_tokenizers):
    path, _ = many_groups
    one = PromptMaker(
        Samples(path), Vocabulary({}, {NAMES[0]: ("x",)}), PromptConfig(), 3, clip_tokenizers
    )
    rows = np.flatnonzero(np.arange(300) % 7)
    expected = [
        min(max(-(-made.num_tokens // CHUNK_TOKENS), 1), 3) for made in one.make(rows.tolist(), 2)
    ]
    assert len(set(expected)) > 1
    for num_workers in (0, 1, 3):
        assert chunk_counts.count_in_processes(one, path, rows, 2, num_workers).tolist() == expected


def test_a_worker_that_fails_says_why(many_groups, clip_tokenizers, tmp_path):
    path, _ = many_groups
    one = PromptMaker(Samples(path), Vocabulary(), PromptConfig(), 3, clip_tokenizers)
    other = tmp_path / "other.parquet"
    table([{"tags": ["a"]}] * 300).drop("words").write_parquet(other)
    with pytest.raises(
        PipelineError, match=r"counting the chunks of 300 prompts failed .*lacks the columns"
    ):
        chunk_counts.count_in_processes(one, other, np.arange(300), 0, 1)


def test_a_set_is_read_without_pandas(many_groups):
    """Which pyarrow imports for itself where it can, for a third of a second of every process."""
    path, frame = many_groups
    code = (
        "import sys; from pathlib import Path; from training.prompts.samples import Samples\n"
        "print(len(Samples(Path(sys.argv[1]))), 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(len(frame)), "False"]


def test_columns_give_back_the_rows_of_the_table(tmp_path):
    box = {"y0": 1.0, "x0": 2.0, "y1": 3.0, "x1": 4.5, "confidence": 0.5}
    frame = table(
        [
            {
                "tags": ["a", "b"],
                "words": ["safe", "newest"],
                "caption": "é\nzwei",
                "boxes": [box],
                "score": 9,
            },
            {"tags": [], "made_caption": "made", "split": "validation", "score": None},
            {"tags": ["b", "c"], "stable": True},
        ]
    )
    entry = manifests.write_parquet(tmp_path, "set", frame)
    for source in (tmp_path / entry.name, frame):
        samples = Samples(source)
        assert list(samples.image_ids) == frame["image_id"].to_list() == samples.image_ids[:]
        everyone = np.arange(3)
        for row, expected in enumerate(frame.iter_rows(named=True)):
            own = [samples.tag_names[code] for code in samples.tags.row(row)]
            assert own == [tag["name"] for tag in expected["tags"]]
            assert [samples.word_names[code] for code in samples.words.row(row)] == expected[
                "words"
            ]
            assert samples.scores[row] == (expected["score"] or 0)
            for texts, name in (
                (samples.captions, "caption"),
                (samples.made_captions, "made_caption"),
            ):
                assert texts[row] == expected[name]
                assert texts.present(everyone)[row] == (expected[name] is not None)
            assert samples.watermarked(everyone)[row] == bool(expected["boxes"])
            assert [tuple(own) for own in samples.boxes(row)] == [(1.0, 2.0, 3.0, 4.5)] * len(
                expected["boxes"]
            )
            assert samples.image_ids[row] == expected["image_id"]
            assert samples.shard_names[samples.shards[row]] == expected["shard"]
            assert samples.validates[row] == (expected["split"] == "validation")
            assert samples.stable[row] == expected["stable"]
            assert samples.buckets[row].tolist() == [64, 64]
        assert sorted(samples.tag_names) == ["a", "b", "c"]
        some = np.array([2, 0, 2])
        assert samples.tags.lengths(some).tolist() == [2, 2, 2]
        assert [samples.tag_names[code] for code in samples.tags.take(some)] == [
            "b",
            "c",
            "a",
            "b",
            "b",
            "c",
        ]


def test_row_groups_are_parts_of_the_whole(many_groups):
    path, frame = many_groups
    whole, part = Samples(path), Samples(path, [1, 2])
    assert len(whole) == 300
    for row in range(128):
        names, own = ([samples.tag_names[code] for code in samples.tags.row(number)]
                      for samples, number in ((part, row), (whole, row + 64)))  # fmt: skip
        assert names == own
    assert part.scores.tolist() == whole.scores[64:192].tolist()
    assert part.image_ids[:] == frame["image_id"][64:192].to_list()


def test_a_set_in_another_order_or_with_other_ids_is_refused(tmp_path):
    frame = table([{"tags": ["a"]}] * 3)
    path = tmp_path / "set.parquet"
    frame.reverse().write_parquet(path)
    with pytest.raises(DataError, match="do not ascend"):
        Samples(path)
    frame.with_columns(pl.col("image_id").str.slice(1)).write_parquet(path)
    with pytest.raises(DataError, match="no SHA-256 of 64"):
        Samples(path)
