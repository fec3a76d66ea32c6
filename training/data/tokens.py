"""Cuts a prompt's tokens into the chunks of 77 that CLIP's text encoders read, for training and for sampling alike.

A chunk is BOS, up to 75 tokens, EOS and pads; a prompt has one chunk or more, an empty one included. Source: bigASP
(three chunks of 75) with the layout of A1111 and ComfyUI, in which each chunk keeps its own BOS and EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

CHUNK_TOKENS = 75
CHUNK_LENGTH = 77
MAX_CHUNKS = 3
_TOKEN_BYTES = 4
_MAX_CACHED = 500_000
"""Pieces that a cache holds, some 100 MB; then it begins anew."""


class Tokenizer(Protocol):
    """What is asked of a `CLIPTokenizer`."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    backend_tokenizer: Any
    """The `tokenizers.Tokenizer` that does the work."""

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
    return [_cut(ids, tokenizer, min_chunks, max_chunks) for ids in encode(prompts, tokenizer)]


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each text, without BOS, EOS and pads."""
    # verbose=False: "longer than the maximum length" is what chunks are for.
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


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


def fill_chunks(prompts: Sequence[np.ndarray], num_chunks: int, tokenizer: Tokenizer) -> np.ndarray:
    """Lay the tokens of prompts out as one text encoder reads them.

    Args:
        prompts: Tokens of each prompt, at most `75 * num_chunks`.
        num_chunks: Chunks of all; what a prompt does not fill stays empty.
        tokenizer: Of that encoder.

    Returns:
        `(len(prompts), num_chunks, 77)` int64.
    """
    lengths = np.array([len(tokens) for tokens in prompts])
    assert lengths.max(initial=0) <= num_chunks * CHUNK_TOKENS, (lengths.max(), num_chunks)
    words = np.full((len(prompts), num_chunks * CHUNK_TOKENS), tokenizer.pad_token_id, dtype=np.int64)
    words[np.arange(words.shape[1]) < lengths[:, None]] = np.concatenate(prompts)
    out = np.full((len(prompts), num_chunks, CHUNK_LENGTH), tokenizer.pad_token_id, dtype=np.int64)
    out[:, :, 0] = tokenizer.bos_token_id
    out[:, :, 1:-1] = words.reshape(len(prompts), num_chunks, CHUNK_TOKENS)
    ends = (lengths[:, None] - CHUNK_TOKENS * np.arange(num_chunks)).clip(0, CHUNK_TOKENS) + 1  # (B, n)
    np.put_along_axis(out, ends[:, :, None], tokenizer.eos_token_id, axis=2)
    return out


class TokenCache:
    """Tokens of the pieces that prompts are made of: each piece is tokenized once.

    Exact for pieces that no token spans: CLIP's pre-tokenizer ends every word at white space, and where letters or
    digits meet other characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Cache what this tokenizer says."""
        self.tokenizer = tokenizer
        self._tokens: dict[str, bytes] = {}

    def encode(self, pieces: Sequence[str]) -> np.ndarray:
        """Tokens of all pieces in a row, `(n,)` int32."""
        return np.frombuffer(self._pack([pieces])[0], dtype=np.int32)

    def encode_all(self, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Tokens of the pieces of each prompt; what is new in all of them is tokenized together."""
        return [np.frombuffer(packed, dtype=np.int32) for packed in self._pack(prompts)]

    def count_all(self, prompts: Sequence[Sequence[str]]) -> list[int]:
        """Numbers of tokens of the pieces of each prompt."""
        return [len(packed) // _TOKEN_BYTES for packed in self._pack(prompts)]

    def _pack(self, prompts: Sequence[Sequence[str]]) -> list[bytes]:
        if len(self._tokens) > _MAX_CACHED:
            self._tokens.clear()
        known, packed, new = self._tokens.__getitem__, list[bytes](), list[int]()
        for pieces in prompts:
            try:
                packed.append(b"".join(map(known, pieces)))
            except KeyError:
                new.append(len(packed))
                packed.append(b"")
        if new:
            self._add([piece for number in new for piece in prompts[number]])
            for number in new:
                packed[number] = b"".join(map(known, prompts[number]))
        return packed

    def _add(self, pieces: Sequence[str]) -> None:
        """Tokenize those pieces that are new."""
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._tokens]
        for piece, tokens in zip(new, encode(new, self.tokenizer), strict=True):
            self._tokens[piece] = np.array(tokens, dtype=np.int32).tobytes()

    def fit(self, pieces: Sequence[str], bare: Sequence[str], limit: int) -> tuple[list[str], np.ndarray]:
        """As many pieces from the first on as have at most `limit` tokens, the last one without its comma.

        Args:
            pieces: As in the prompt.
            bare: The same without the commas that part them.
            limit: Tokens.

        Returns:
            The pieces that are left, and their tokens. Of a first piece that is longer than all, its first tokens.
        """
        lengths = self.count_all([[piece] for piece in pieces])
        last = self.count_all([[piece] for piece in bare])
        before = list(accumulate(lengths, initial=0))
        count = next((place for place in range(len(pieces), 0, -1) if before[place - 1] + last[place - 1] <= limit), 1)
        kept = [*pieces[: count - 1], bare[count - 1]]
        return kept, self.encode(kept)[:limit]
