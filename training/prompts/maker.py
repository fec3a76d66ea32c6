"""Prompts and token ids of a training set's samples, for every text encoder at once; needs no
torch.

The recipe, the frozen vocabulary, the seed and the epoch say what a row's prompt is: equal on every
process.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.models.tokens import CHUNK_TOKENS, Tokenizer
from training.prompts.chosen_tags import MAX_PROMPTS
from training.prompts.draws import draw_only_chunks
from training.prompts.ragged import Ragged, offsets, spans, sums
from training.prompts.samples import Samples
from training.prompts.tag_names import Names
from training.prompts.tokens import TokenCache, fill_chunks, fit
from training.prompts.writing import Block, Prompt, make_block
from training.seeds import Purpose, Stream


@dataclass(slots=True, kw_only=True)
class MadePrompt:
    """A prompt as text encoders read it, cut to the chunks that it may have."""

    prompt: Prompt
    """What the tokens say: up to where it was cut."""
    tokens: np.ndarray
    """`(n,)` int32 of the first encoder, without BOS, EOS and pads."""
    ids: tuple[np.ndarray, ...]
    """Per encoder `(num_chunks, 77)` int64."""
    num_tokens: int
    """Tokens of the whole prompt, by the first encoder."""

    @property
    def num_chunks(self) -> int:
        """Chunks of 75 that it has, empty ones included."""
        return len(self.ids[0])

    @property
    def text(self) -> str:
        """What the tokens say."""
        return self.prompt.text

    @property
    def num_truncated(self) -> int:
        """Tokens that were cut off."""
        return self.num_tokens - len(self.tokens)

    @property
    def zeroed(self) -> bool:
        """The text encoders' output is to be replaced by zeros."""
        return self.prompt.zeroed


class PromptMaker:
    """Makes the prompts of rows of a set in an epoch; with None for the epoch, those that
    validation reads."""

    def __init__(
        self,
        samples: Samples,
        vocabulary: Vocabulary,
        config: PromptConfig,
        seed: int,
        tokenizers: Sequence[Tokenizer],
    ) -> None:
        """Take what prompts are made from; `tokenizers` are one per text encoder."""
        self.samples, self.vocabulary, self.seed = samples, vocabulary, seed
        self.tokenizers = tokenizers
        self.config = config
        # What validation measures must not depend on which samples happen to be unconditional.
        self._fixed = dataclasses.replace(config, empty_prob=0.0)
        self._names = Names(samples, vocabulary, config)
        self._caches = [TokenCache(tokenizer, self._names) for tokenizer in tokenizers]
        self.expect(np.empty(0, dtype=np.int64), None)

    def expect(self, rows: np.ndarray, epoch: int | None) -> None:
        """Say which rows of an epoch `make` will be asked for next, in order: it then makes them by
        large blocks."""
        self._expected, self._expected_epoch = rows, epoch
        self._num_asked, self._ready = 0, dict[int, MadePrompt]()

    def prompts(self, rows: Iterable[int], epoch: int | None) -> list[Prompt]:
        """Prompts of rows, whole."""
        return [
            block.prompt(number)
            for block in self._blocks(rows, epoch)
            for number in range(len(block.empty))
        ]

    def make(self, rows: Iterable[int], epoch: int | None) -> list[MadePrompt]:
        """Prompts of rows with their tokens."""
        rows, first = list(rows), self._num_asked
        if (
            epoch != self._expected_epoch
            or rows != self._expected[first : first + len(rows)].tolist()
        ):
            return self._make(rows, epoch)
        if not all(row in self._ready for row in rows):
            block = self._expected[first : first + max(MAX_PROMPTS, len(rows))].tolist()
            self._ready = dict(zip(block, self._make(block, epoch), strict=True))
        self._num_asked += len(rows)
        return [self._ready[row] for row in rows]

    def _make(self, rows: list[int], epoch: int | None) -> list[MadePrompt]:
        return [made for block in self._blocks(rows, epoch) for made in self._encode(block)]

    def ids(self, made: Sequence[MadePrompt]) -> tuple[np.ndarray, ...]:
        """Token ids `(B, n, 77)` int64 per encoder, of prompts that have the same number of
        chunks."""
        assert len({one.num_chunks for one in made}) == 1, (
            "prompts of one batch share a number of chunks"
        )
        return tuple(np.array(own) for own in zip(*(one.ids for one in made), strict=True))

    def count_chunks(self, rows: np.ndarray, epoch: int | None) -> np.ndarray:
        """Chunks of the prompts of rows in an epoch, `(len(rows),)` int64."""
        config, stream = self._draws(epoch)
        if config.chunk_shares:
            return draw_only_chunks(stream, self.samples, rows, config)
        counts = [np.empty(0, dtype=np.int64)]
        for block in self._blocks(rows, epoch):
            pieces = block.pieces
            num_tokens = sums(self._caches[0].count(pieces.codes, pieces.extras), pieces.starts)
            counts.append(self._chunks(block, num_tokens))
        return np.concatenate(counts)

    def _draws(self, epoch: int | None) -> tuple[PromptConfig, Stream]:
        if epoch is None:
            return self._fixed, Stream(self.seed, Purpose.VALIDATION, "prompt")
        return self.config, Stream(self.seed, Purpose.PROMPT, epoch)

    def _blocks(self, rows: Iterable[int], epoch: int | None) -> Iterator[Block]:
        config, stream = self._draws(epoch)
        rows = np.fromiter(rows, dtype=np.int64)
        for start in range(0, len(rows), MAX_PROMPTS):
            yield make_block(
                self.samples, rows[start : start + MAX_PROMPTS], self._names, config, stream
            )

    def _chunks(self, block: Block, num_tokens: np.ndarray) -> np.ndarray:
        """Chunks of prompts that have so many tokens, `(R,)` int64."""
        if block.num_chunks is not None:
            return block.num_chunks
        return (-(-num_tokens // CHUNK_TOKENS)).clip(1, self.config.max_chunks)

    def _encode(self, block: Block) -> Iterator[MadePrompt]:
        """The prompts of a block, cut after a tag or a caption's word where they are longer than
        their chunks."""
        pieces, cache = block.pieces, self._caches[0]
        lengths = cache.count(pieces.codes, pieces.extras)
        num_tokens, num_pieces = sums(lengths, pieces.starts), np.diff(pieces.starts)
        num_chunks = self._chunks(block, num_tokens)
        limits = num_chunks * CHUNK_TOKENS
        codes, kept = pieces.codes, num_pieces
        if len(cut := np.flatnonzero(num_tokens > limits)):
            own = spans(pieces.starts[cut], num_pieces[cut])
            bare_lengths = cache.count(pieces.bare[own], pieces.extras)
            kept = num_pieces.copy()
            kept[cut] = fit(lengths[own], bare_lengths, num_pieces[cut], limits[cut])
            last = pieces.starts[cut] + kept[cut] - 1
            codes = codes.copy()
            codes[last] = pieces.bare[last]
            codes = codes[spans(pieces.starts[:-1], kept)]
        encoded = [_cut(cache.encode(codes, pieces.extras), kept, limits) for cache in self._caches]
        ids = [_fill(*pair, num_chunks) for pair in zip(encoded, self.tokenizers, strict=True)]
        for number, own in enumerate(zip(*ids, strict=True)):
            yield MadePrompt(prompt=block.prompt(number, int(kept[number])), tokens=encoded[0].row(number), ids=own,
                             num_tokens=int(num_tokens[number]))  # fmt: skip


def _cut(tokens: Ragged, num_pieces: np.ndarray, limits: np.ndarray) -> Ragged:
    """Tokens of prompts, whose pieces have these tokens; of each at most its limit."""
    starts = tokens.starts[offsets(num_pieces)]
    lengths = np.minimum(starts[1:] - starts[:-1], limits)
    return Ragged(tokens.values[spans(starts[:-1], lengths)], offsets(lengths))


def _fill(tokens: Ragged, tokenizer: Tokenizer, num_chunks: np.ndarray) -> list[np.ndarray]:
    """Ids `(n, 77)` of each prompt, which has its own number of chunks."""
    found: dict[int, np.ndarray] = {}
    for count in set(num_chunks.tolist()):
        those = (num_chunks == count).nonzero()[0]
        own = Ragged(tokens.take(those), offsets(tokens.lengths(those)))
        found.update(zip(those.tolist(), fill_chunks(own, count, tokenizer), strict=True))
    return [found[number] for number in range(len(num_chunks))]
