"""Cuts a prompt's tokens into the chunks of 77 that CLIP's text encoders read, for training and for
sampling alike.

A chunk is BOS, up to 75 tokens, EOS and pads; a prompt has one chunk or more, an empty one
included. Source: bigASP (three chunks of 75) with the layout of A1111 and ComfyUI, in which each
chunk keeps its own BOS and EOS.
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
    backend_tokenizer: Any
    """The `tokenizers.Tokenizer` that does the work."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, truncation: bool, verbose: bool
    ) -> Any:
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


def tokenize(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_chunks: int = MAX_CHUNKS,
    min_chunks: int = 1,
) -> list[TokenizedPrompt]:
    """Tokenize prompts and cut each into chunks of 77 ids.

    Args:
        prompts: The texts; one may be empty.
        tokenizer: The encoder's own: its pad id differs between SDXL's two (EOS for the first, 0
            for the second).
        max_chunks: Tokens beyond `75 * max_chunks` are cut and counted.
        min_chunks: Empty chunks are added up to this number, to pair a short negative with a long
            prompt.

    Returns:
        One entry per prompt, in order.
    """
    return tokenize_sections(
        [[prompt] for prompt in prompts], tokenizer, max_chunks=max_chunks, min_chunks=min_chunks
    )


def tokenize_sections(
    prompts: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    max_chunks: int = MAX_CHUNKS,
    min_chunks: int = 1,
) -> list[TokenizedPrompt]:
    """As `tokenize`, of prompts in one section or more, each of which begins a chunk of its own."""
    assert 1 <= min_chunks <= max_chunks, (min_chunks, max_chunks)
    if not prompts:
        return []
    ids = iter(encode([section for sections in prompts for section in sections], tokenizer))
    return [
        _cut([next(ids) for _ in sections], tokenizer, min_chunks, max_chunks)
        for sections in prompts
    ]


def chunk_spans(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """The chunks that sections of so many tokens fill: section, first token, end.

    An empty section has one chunk, as in A1111, but none where it is the last of several.
    """
    last = len(lengths) - 1
    return [
        (section, start, min(start + CHUNK_TOKENS, length))
        for section, length in enumerate(lengths)
        if length or section == 0 or section < last
        for start in range(0, max(length, 1), CHUNK_TOKENS)
    ]


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each text, without BOS, EOS and pads."""
    # verbose=False: "longer than the maximum length" is what chunks are for.
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _cut(
    sections: list[list[int]], tokenizer: Tokenizer, min_chunks: int, max_chunks: int
) -> TokenizedPrompt:
    chunks = [
        sections[section][start:stop]
        for section, start, stop in chunk_spans([len(ids) for ids in sections])
    ]
    num_tokens, kept = sum(len(words) for words in chunks), chunks[:max_chunks]
    rows = []
    for words in [*kept, *[[]] * (min_chunks - len(kept))]:
        pads = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(words))
        rows.append((tokenizer.bos_token_id, *words, tokenizer.eos_token_id, *pads))
    return TokenizedPrompt(
        ids=tuple(rows),
        num_tokens=num_tokens,
        num_truncated=num_tokens - sum(len(words) for words in kept),
    )
