"""Cuts a prompt's tokens into the chunks of 77 that CLIP's text encoders read, for training and for sampling alike.

A chunk is BOS, up to 75 tokens, EOS and pads; a prompt has one chunk or more, an empty one included. Source: bigASP
(three chunks of 75) with the layout of A1111 and ComfyUI, in which each chunk keeps its own BOS and EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CHUNK_TOKENS = 75
CHUNK_LENGTH = 77
MAX_CHUNKS = 3


class Tokenizer(Protocol):
    """What is asked of a `CLIPTokenizer`."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: list[str], *, add_special_tokens: bool, truncation: bool, verbose: bool) -> Any:
        """A mapping with `input_ids`: one list of ids per text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    """One prompt as one text encoder reads it."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids, `num_chunks` rows of 77."""
    num_tokens: int
    """Tokens of the whole prompt, without BOS, EOS and pads."""
    num_truncated: int
    """Tokens at the prompt's end that no chunk holds."""

    @property
    def num_chunks(self) -> int:
        """How many rows `ids` has."""
        return len(self.ids)


def count_chunks(num_tokens: int, max_chunks: int = MAX_CHUNKS) -> int:
    """The chunks that `num_tokens` tokens fill: at least 1, at most `max_chunks`."""
    return min(max(-(-num_tokens // CHUNK_TOKENS), 1), max_chunks)


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, *, max_chunks: int = MAX_CHUNKS, min_chunks: int = 1
) -> list[TokenizedPrompt]:
    """Tokenize prompts and cut each into chunks of 77 ids.

    Args:
        prompts: The texts; one may be empty.
        tokenizer: The encoder's own: its pad id differs between SDXL's two (EOS for the first, 0 for the second).
        max_chunks: Tokens beyond `75 * max_chunks` are cut and counted.
        min_chunks: Empty chunks are added up to this number, to pair a short negative with a long prompt.

    Returns:
        One entry per prompt, in order.
    """
    assert 1 <= min_chunks <= max_chunks, (min_chunks, max_chunks)
    if not prompts:
        return []
    # verbose=False: "longer than the maximum length" is what chunks are for.
    encoded = tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)
    return [_cut(list(ids), tokenizer, min_chunks, max_chunks) for ids in encoded["input_ids"]]


def _cut(tokens: list[int], tokenizer: Tokenizer, min_chunks: int, max_chunks: int) -> TokenizedPrompt:
    num_chunks = max(count_chunks(len(tokens), max_chunks), min_chunks)
    rows = []
    for start in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        words = tokens[start : start + CHUNK_TOKENS]
        pads = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(words))
        rows.append((tokenizer.bos_token_id, *words, tokenizer.eos_token_id, *pads))
    return TokenizedPrompt(
        ids=tuple(rows), num_tokens=len(tokens), num_truncated=max(len(tokens) - num_chunks * CHUNK_TOKENS, 0)
    )
