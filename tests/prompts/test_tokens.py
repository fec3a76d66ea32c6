"""Chunks of 77: nothing is lost, doubled or reordered, and each encoder gets its own pads."""

import string
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prompt_table import table

from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.models.tokens import (
    CHUNK_LENGTH,
    CHUNK_TOKENS,
    chunk_spans,
    encode,
    tokenize,
    tokenize_sections,
)
from training.prompts import tokens as tokens_module
from training.prompts.ragged import Ragged, offsets
from training.prompts.samples import Samples
from training.prompts.tag_names import COMMA, NUM_FORMS, SPACES, Names, opens_word
from training.prompts.tokens import TokenCache, fill_chunks, fit


class Words:
    """A tokenizer of numbers written as words."""

    bos_token_id = 1000
    eos_token_id = 1001

    def __init__(self, pad_token_id=1001):
        self.pad_token_id = pad_token_id

    def __call__(self, text, *, add_special_tokens, truncation, verbose):
        assert [add_special_tokens, truncation, verbose] == [False, False, False]
        return {"input_ids": [[int(word) for word in prompt.split()] for prompt in text]}


@given(num_tokens=st.integers(0, 400), max_chunks=st.integers(1, 4), data=st.data())
def test_chunks_hold_the_prompt_in_order_and_count_the_rest(num_tokens, max_chunks, data):
    min_chunks = data.draw(st.integers(1, max_chunks))
    prompt = " ".join(str(number) for number in range(num_tokens))
    (cut,) = tokenize([prompt], Words(0), max_chunks=max_chunks, min_chunks=min_chunks)
    words = []
    for row in cut.ids:
        assert len(row) == CHUNK_LENGTH
        assert row[0] == Words.bos_token_id
        end = row.index(Words.eos_token_id)
        words += row[1:end]
        assert set(row[end + 1 :]) <= {0}
    assert words == list(range(num_tokens))[: max_chunks * CHUNK_TOKENS]
    assert len(words) + cut.num_truncated == cut.num_tokens == num_tokens
    assert cut.num_chunks == max(
        min_chunks, min(-(-max(num_tokens, 1) // CHUNK_TOKENS), max_chunks)
    )


def test_an_empty_prompt_is_one_chunk_of_bos_eos_and_pads():
    (cut,) = tokenize([""], Words())
    assert cut.ids == ((1000, 1001, *[1001] * 75),)
    assert (cut.num_chunks, cut.num_tokens, cut.num_truncated) == (1, 0, 0)


def test_chunks_at_the_borders():
    assert [len(chunk_spans([n])) for n in (0, 1, 75, 76, 150, 151, 225, 226)] == [
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]
    assert chunk_spans([76]) == [(0, 0, 75), (0, 75, 76)]


def test_sections_begin_chunks_of_their_own():
    """As A1111's BREAK: an empty section is an empty chunk, but nothing follows one at the end."""
    long = " ".join(str(number) for number in range(80))
    (cut,) = tokenize_sections([["7 8", "", long]], Words())
    rows = [[id for id in row if id < 1000] for row in cut.ids]
    assert rows == [[7, 8], [], list(range(75))]
    assert (cut.num_tokens, cut.num_truncated) == (82, 5)
    for sections, counts in (
        (["1", ""], [1]),
        (["", "1"], [0, 1]),
        (["", ""], [0]),
        (["", "", ""], [0, 0]),
    ):
        (cut,) = tokenize_sections([sections], Words())
        assert [len([id for id in row if id < 1000]) for row in cut.ids] == counts
    assert tokenize_sections([["1 2"], [long]], Words(), min_chunks=2) == tokenize(
        ["1 2", long], Words(), min_chunks=2
    )


def test_no_prompts_give_no_rows():
    assert tokenize([], Words()) == []


@given(
    lengths=st.lists(st.integers(0, 225), min_size=1, max_size=4), pad=st.sampled_from([0, 1001])
)
def test_filled_chunks_are_those_of_tokenize(lengths, pad):
    texts = [" ".join(str(number) for number in range(length)) for length in lengths]
    most = max(len(chunk_spans([length])) for length in lengths)
    expected = [one.ids for one in tokenize(texts, Words(pad), min_chunks=most)]
    prompts = Ragged(
        np.concatenate([np.arange(length) for length in lengths]), offsets(np.array(lengths))
    )
    found = fill_chunks(prompts, most, Words(pad))
    assert found.dtype == np.int64
    assert found.tolist() == [[list(row) for row in rows] for rows in expected]


@given(
    prompts=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=4),
    data=st.data(),
)
def test_prompts_are_cut_after_a_piece_and_lose_its_comma(prompts, data):
    limits = [data.draw(st.integers(1, 100)) for _ in prompts]
    # A comma is a token of its own; the last piece has none.
    with_comma = [length + 1 for lengths in prompts for length in lengths]
    ends = np.cumsum([len(lengths) for lengths in prompts]) - 1
    for end in ends:
        with_comma[end] -= 1
    bare = [length for lengths in prompts for length in lengths]
    kept = fit(
        np.array(with_comma),
        np.array(bare),
        np.array([len(lengths) for lengths in prompts]),
        np.array(limits),
    )
    for lengths, limit, count in zip(prompts, limits, kept.tolist(), strict=True):
        totals = [sum(lengths[:number]) + number - 1 for number in range(1, len(lengths) + 1)]
        assert count == max(
            [number for number, total in enumerate(totals, 1) if total <= limit], default=1
        )


odd = st.text(
    st.one_of(
        st.sampled_from(string.ascii_letters + string.digits + "_()'!,.;:-&<|>^@ \t\n"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=15,
)


NAMES = Names(
    Samples(table([{"tags": ["long_hair", "o_o", "photo_(medium)"]}])), Vocabulary(), PromptConfig()
)


def extras_of(texts):
    """Codes of texts that are no form of a name, and these."""
    known = list(dict.fromkeys(texts))
    return np.array([NAMES.num_forms + known.index(text) for text in texts], dtype=np.int64), known


@given(texts=st.lists(odd, max_size=6), end=st.booleans())
def test_words_between_spaces_have_the_tokens_that_they_have_together(clip_tokenizers, texts, end):
    text = " ".join(texts) + ("<|endoftext|>," if end else "")
    for tokenizer in clip_tokenizers:
        found = TokenCache(tokenizer, NAMES).encode(*extras_of(text.split(" ")))
        assert found.values.tolist() == encode([text], tokenizer)[0]


@given(before=odd, after=odd, first=st.sampled_from([*"aZ09", "s", "'s", "t"]))
def test_a_comma_and_what_begins_with_a_letter_are_parted(clip_tokenizers, before, after, first):
    second = first + after
    for tokenizer in clip_tokenizers:
        whole, *parts = encode([f"{before},{second}", f"{before},", second], tokenizer)
        assert whole == parts[0] + parts[1] or not opens_word(second)
    assert opens_word("1girl")
    assert not any(map(opens_word, ("", "_x", ":)", "^_^", "é", "'s", " a")))


def test_forms_and_other_texts_have_the_tokens_of_what_they_say(clip_tokenizers):
    texts = {}
    for spelling, name in enumerate(NAMES.spellings):
        for spaces in (0, SPACES):
            for comma in (0, COMMA):
                said = name.replace("_", " ") if spaces else name
                texts[NUM_FORMS * spelling + spaces + comma] = said + "," * bool(comma)
    cache, rng = TokenCache(clip_tokenizers[0], NAMES), np.random.default_rng(0)
    for turn in range(20):
        extras = [f"word{number}" for number in range(turn, turn + 5)]
        codes = rng.integers(NAMES.num_forms + len(extras), size=30)
        said = [
            texts[code] if code in texts else extras[code - NAMES.num_forms]
            for code in codes.tolist()
        ]
        expected = encode(said, clip_tokenizers[0])
        found = cache.encode(codes, extras)
        assert [found.row(number).tolist() for number in range(30)] == expected
        assert cache.count(codes, extras).tolist() == [len(tokens) for tokens in expected]


def test_a_full_cache_begins_anew(clip_tokenizers, monkeypatch):
    monkeypatch.setattr(tokens_module, "_MAX_CACHED", 10)
    cache = TokenCache(clip_tokenizers[0], NAMES)
    for turn in range(30):
        texts = [f"word{turn}", f"other{turn % 7}", "the same"]
        codes, extras = extras_of(texts)
        found = cache.encode(np.append(codes, 0), extras)
        assert [found.row(n).tolist() for n in range(4)] == encode(
            [*texts, NAMES.write(0)], clip_tokenizers[0]
        )
        assert len(cache._extras) < 15


def test_two_threads_read_what_one_reads(clip_tokenizers):
    """The next batch is made in a thread while validation reads its prompts."""
    cache = TokenCache(clip_tokenizers[0], NAMES)

    def read(thread):
        rng = np.random.default_rng(thread)
        return all(
            [cache.encode(*extras_of(texts)).row(n).tolist() for n in range(3)]
            == encode(texts, clip_tokenizers[0])
            for texts in (
                [f"word{number}" for number in rng.integers(3000, size=3)] for _ in range(400)
            )
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
