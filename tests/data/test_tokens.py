"""Chunks of 77: nothing is lost, doubled or reordered, and each encoder gets its own pads."""

import string

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.data.tokens import CHUNK_LENGTH, CHUNK_TOKENS, TokenCache, count_chunks, encode, fill_chunks, tokenize


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
    assert cut.num_chunks == max(min_chunks, count_chunks(num_tokens, max_chunks))


def test_an_empty_prompt_is_one_chunk_of_bos_eos_and_pads():
    (cut,) = tokenize([""], Words())
    assert cut.ids == ((1000, 1001, *[1001] * 75),)
    assert (cut.num_chunks, cut.num_tokens, cut.num_truncated) == (1, 0, 0)


def test_chunk_counts_at_the_borders():
    assert [count_chunks(n) for n in (0, 1, 75, 76, 150, 151, 225, 226, 1000)] == [1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_no_prompts_give_no_rows():
    assert tokenize([], Words()) == []


@given(lengths=st.lists(st.integers(0, 225), min_size=1, max_size=4), pad=st.sampled_from([0, 1001]))
def test_filled_chunks_are_those_of_tokenize(lengths, pad):
    texts = [" ".join(str(number) for number in range(length)) for length in lengths]
    most = max(count_chunks(length) for length in lengths)
    expected = [one.ids for one in tokenize(texts, Words(pad), min_chunks=most)]
    found = fill_chunks([np.arange(length) for length in lengths], most, Words(pad))
    assert found.dtype == np.int64
    assert found.tolist() == [[list(row) for row in rows] for rows in expected]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), limit=st.integers(1, 100))
def test_a_prompt_is_cut_after_a_piece_and_loses_its_comma(lengths, limit):
    bare = [" ".join("7" * length) for length in lengths]
    pieces = [text + " 9" for text in bare[:-1]] + bare[-1:]  # a comma is a token of its own, here 9
    kept, tokens = TokenCache(Words()).fit(pieces, bare, limit)
    assert tokens.tolist() == [int(word) for word in " ".join(kept).split()][:limit]
    if lengths[0] > limit:
        assert (kept, len(tokens)) == ([bare[0]], limit)
        return
    assert kept == [*pieces[: len(kept) - 1], bare[len(kept) - 1]]
    if len(kept) < len(pieces):
        assert len(tokens) + 1 + lengths[len(kept)] > limit


odd = st.text(
    st.one_of(
        st.sampled_from(string.ascii_letters + string.digits + "_()'!,.;:-&<|>^@ \t\n"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=15,
)


@given(texts=st.lists(odd, max_size=6), end=st.booleans())
def test_words_between_spaces_have_the_tokens_that_they_have_together(clip_tokenizers, texts, end):
    text = " ".join(texts) + ("<|endoftext|>," if end else "")
    for tokenizer in clip_tokenizers:
        assert TokenCache(tokenizer).encode(text.split(" ")).tolist() == encode([text], tokenizer)[0]
