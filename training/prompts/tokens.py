"""The tokens of blocks of prompts, laid out for one text encoder; each piece of text is tokenized
once."""

from collections.abc import Sequence
from threading import Lock

import numpy as np

from training.models.tokens import CHUNK_LENGTH, CHUNK_TOKENS, Tokenizer, encode
from training.prompts.ragged import Ragged, offsets, spans
from training.prompts.tag_names import Names

_MAX_CACHED = 500_000
"""Pieces beside the forms of names that a cache holds, some 100 MB; then it begins anew."""
_ROOM = 1 << 16
"""Tokens that a cache begins with room for."""


def fill_chunks(prompts: Ragged, num_chunks: int, tokenizer: Tokenizer) -> np.ndarray:
    """Lay the tokens of B prompts out as one text encoder reads them.

    Args:
        prompts: Tokens of each prompt, at most `75 * num_chunks`.
        num_chunks: Chunks of all; what a prompt does not fill stays empty.
        tokenizer: Of that encoder.

    Returns:
        `(B, num_chunks, 77)` int64.
    """
    lengths = prompts.starts[1:] - prompts.starts[:-1]
    assert lengths.max(initial=0) <= num_chunks * CHUNK_TOKENS, (lengths.max(), num_chunks)
    out = np.full((len(lengths), num_chunks * CHUNK_LENGTH), tokenizer.pad_token_id, dtype=np.int64)
    begins = np.arange(num_chunks) * CHUNK_LENGTH
    out[:, begins] = tokenizer.bos_token_id
    place = spans(np.zeros_like(lengths), lengths)
    row = np.arange(len(lengths)).repeat(lengths)
    out[row, place + (CHUNK_LENGTH - CHUNK_TOKENS) * (place // CHUNK_TOKENS) + 1] = prompts.values
    filled = np.minimum(
        np.maximum(lengths[:, None] - CHUNK_TOKENS * np.arange(num_chunks), 0), CHUNK_TOKENS
    )  # (B, n)
    out[np.arange(len(lengths))[:, None], begins + filled + 1] = tokenizer.eos_token_id
    return out.reshape(len(lengths), num_chunks, CHUNK_LENGTH)


class TokenCache:
    """Tokens of the pieces that prompts are made of: each piece is tokenized once.

    Exact for pieces that no token spans: CLIP's pre-tokenizer ends every word at white space, and
    where letters or digits meet other characters. A piece is a form of a name, known by its code,
    or any other text.
    """

    def __init__(self, tokenizer: Tokenizer, names: Names) -> None:
        """Cache what this tokenizer says."""
        self._tokenizer, self._names = tokenizer, names
        self._lock = Lock()  # the thread of the next batch and validation ask at the same time
        self._clear()

    def _clear(self) -> None:
        num_forms = self._names.num_forms
        self._extras: dict[str, int] = {}
        self._tokens, self._num_tokens = np.empty(_ROOM, dtype=np.int32), 0
        # Per piece, forms first; what was never asked for has length -1.
        self._starts, self._lengths = (
            np.zeros(num_forms, dtype=np.int64),
            np.full(num_forms, -1, dtype=np.int64),
        )

    def count(self, codes: np.ndarray, extras: Sequence[str]) -> np.ndarray:
        """Numbers of tokens of pieces, `(P,)` int64.

        Args:
            codes: `(P,)` forms of names, and behind them `extras`.
            extras: Other texts.
        """
        with self._lock:
            found = self._find(codes, extras)
            return self._lengths[found]

    def encode(self, codes: np.ndarray, extras: Sequence[str]) -> Ragged:
        """The tokens of pieces, int32; arguments as `count`."""
        with self._lock:
            found = self._find(codes, extras)
            starts, lengths = self._starts[found], self._lengths[found]
            return Ragged(self._tokens[spans(starts, lengths)], offsets(lengths))

    def _find(self, codes: np.ndarray, extras: Sequence[str]) -> np.ndarray:
        """Where pieces are in `_starts`; what is new is tokenized together."""
        if len(self._extras) > _MAX_CACHED:
            self._clear()
        num_forms = self._names.num_forms
        if extras:
            if new := [text for text in extras if text not in self._extras]:
                first = num_forms + len(self._extras)
                self._extras.update(zip(new, range(first, first + len(new)), strict=True))
                self._add(np.arange(first, first + len(new)), new)
            codes, odd = codes.copy(), np.flatnonzero(codes >= num_forms)
            codes[odd] = np.array([self._extras[text] for text in extras])[codes[odd] - num_forms]
        if (unknown := self._lengths[codes] < 0).any():
            forms = np.unique(codes[unknown])
            self._add(forms, [self._names.write(form) for form in forms.tolist()])
        return codes

    def _add(self, places: np.ndarray, texts: list[str]) -> None:
        """Tokenize pieces and keep their tokens."""
        encoded = encode(texts, self._tokenizer)
        starts = self._num_tokens + offsets(np.array([len(tokens) for tokens in encoded]))
        self._starts, self._lengths = (
            _grow(array, int(places[-1]) + 1) for array in (self._starts, self._lengths)
        )
        self._starts[places], self._lengths[places] = starts[:-1], np.diff(starts)
        self._tokens = _grow(self._tokens, int(starts[-1]))
        self._tokens[self._num_tokens : starts[-1]] = [
            token for tokens in encoded for token in tokens
        ]
        self._num_tokens = int(starts[-1])


def _grow(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or one at least twice as long that begins with it, where it has less than
    `size`."""
    if len(array) >= size:
        return array
    grown = np.empty(max(2 * len(array), size), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


def fit(
    lengths: np.ndarray, bare_lengths: np.ndarray, num_pieces: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """As many pieces of prompts from the first on as have at most so many tokens, the last one
    without its comma.

    Args:
        lengths: Tokens of the pieces, one prompt after the other.
        bare_lengths: The same without the commas that part them.
        num_pieces: `(R,)` pieces of each prompt, 1 at least.
        limits: `(R,)` tokens.

    Returns:
        `(R,)` int64: the pieces that are left; 1 also where the first one is longer than all.
    """
    starts = offsets(num_pieces)
    before = offsets(lengths)[:-1]
    before = before - np.repeat(before[starts[:-1]], num_pieces)
    place = spans(np.ones(len(num_pieces), dtype=np.int64), num_pieces)
    fits = before + bare_lengths <= np.repeat(limits, num_pieces)
    return np.maximum.reduceat(np.where(fits, place, 1), starts[:-1])
