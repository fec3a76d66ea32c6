"""Chunks of 77: nothing is lost, doubled or reordered, and each encoder gets its own pads."""

from hypothesis import given
from hypothesis import strategies as st

from training.data.tokens import CHUNK_LENGTH, CHUNK_TOKENS, count_chunks, tokenize


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
