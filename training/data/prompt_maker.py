"""Prompts and token ids of a training set's samples, for every text encoder at once; needs no torch.

The recipe, the frozen vocabulary, the seed and the epoch say what a row's prompt is: equal on every process.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.prompts import Prompt, draw_chunks, make_prompt
from training.data.samples import Samples
from training.data.tokens import CHUNK_TOKENS, TokenCache, Tokenizer, count_chunks, fill_chunks
from training.data.vocabulary import Vocabulary
from training.run_config import PromptConfig
from training.seeds import Purpose, Stream

_BLOCK = 256
"""Prompts whose new pieces are tokenized together."""


@dataclass(slots=True, kw_only=True)
class MadePrompt:
    """A prompt as text encoders read it, cut to the chunks that it may have."""

    prompt: Prompt
    text: str
    """What the tokens say: the prompt up to where it was cut."""
    tokens: np.ndarray
    """`(n,)` int32 of the first encoder, without BOS, EOS and pads."""
    num_tokens: int
    """Tokens of the whole prompt."""
    num_chunks: int
    """Chunks of 75 that it has, empty ones included."""

    @property
    def num_truncated(self) -> int:
        """Tokens that were cut off."""
        return self.num_tokens - len(self.tokens)

    @property
    def zeroed(self) -> bool:
        """The text encoders' output is to be replaced by zeros."""
        return bool(self.prompt.trace.get("as") == "zeros")


class PromptMaker:
    """Makes the prompts of rows of a set in an epoch; with None for the epoch, those that validation reads."""

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
        self._caches = [TokenCache(tokenizer) for tokenizer in tokenizers]
        self._marks = [None, *(marks_apart(tokenizers[0], other) for other in tokenizers[1:])]

    def prompts(self, rows: Iterable[int], epoch: int | None) -> list[Prompt]:
        """Prompts of rows, whole."""
        config, stream = self._draws(epoch)
        ids, samples, vocabulary = self.samples.image_ids, self.samples, self.vocabulary
        return [make_prompt(samples[row], vocabulary, config, stream.generator(ids[row])) for row in rows]

    def make(self, rows: Iterable[int], epoch: int | None) -> list[MadePrompt]:
        """Prompts of rows with their tokens."""
        prompts = self.prompts(rows, epoch)
        tokens = self._caches[0].encode_all([prompt.pieces for prompt in prompts])
        return [self._cut(prompt, own) for prompt, own in zip(prompts, tokens, strict=True)]

    def ids(self, made: Sequence[MadePrompt]) -> tuple[np.ndarray, ...]:
        """Token ids `(B, n, 77)` int64 per encoder, of prompts that have the same number of chunks."""
        num_chunks = made[0].num_chunks
        assert all(one.num_chunks == num_chunks for one in made), "prompts of one batch share a number of chunks"
        first = [one.tokens for one in made]
        return tuple(
            fill_chunks(first if number == 0 else self._others(number, made, num_chunks), num_chunks, tokenizer)
            for number, tokenizer in enumerate(self.tokenizers)
        )

    def count_chunks(self, rows: np.ndarray, epoch: int | None) -> np.ndarray:
        """Chunks of the prompts of rows in an epoch, `(len(rows),)` int64."""
        if self.config.chunk_shares:
            config, stream = self._draws(epoch)
            ids = self.samples.image_ids
            drawn = (draw_chunks(config, stream.generator(ids[row])) for row in rows.tolist())
            return np.fromiter(drawn, dtype=np.int64, count=len(rows))
        counts = np.empty(len(rows), dtype=np.int64)
        cache, most = self._caches[0], self.config.max_chunks
        for start in range(0, len(rows), _BLOCK):
            prompts = self.prompts(rows[start : start + _BLOCK].tolist(), epoch)
            for place, num_tokens in enumerate(cache.count_all([prompt.pieces for prompt in prompts]), start):
                counts[place] = count_chunks(num_tokens, most)
        return counts

    def _draws(self, epoch: int | None) -> tuple[PromptConfig, Stream]:
        if epoch is None:
            return self._fixed, Stream(self.seed, Purpose.VALIDATION, "prompt")
        return self.config, Stream(self.seed, Purpose.PROMPT, epoch)

    def _cut(self, prompt: Prompt, tokens: np.ndarray) -> MadePrompt:
        num_tokens = len(tokens)
        num_chunks = prompt.num_chunks or count_chunks(num_tokens, self.config.max_chunks)
        if num_tokens > num_chunks * CHUNK_TOKENS:
            kept, tokens = self._caches[0].fit(prompt.pieces, prompt.bare, num_chunks * CHUNK_TOKENS)
            count = len(kept)
            gaps = None if prompt.gaps is None else [*prompt.gaps[: count - 1], ""]
            prompt = prompt._replace(pieces=kept, bare=prompt.bare[:count], gaps=gaps)
        return MadePrompt(prompt=prompt, text=prompt.text, tokens=tokens, num_tokens=num_tokens, num_chunks=num_chunks)

    def _others(self, number: int, made: Sequence[MadePrompt], num_chunks: int) -> list[np.ndarray]:
        """Tokens of a further encoder: the first one's, but where its tokenizer reads a prompt in its own way."""
        marks = self._marks[number]
        return [
            one.tokens
            if marks is not None and not any(mark in one.text for mark in marks)
            else self._caches[number].encode(one.prompt.pieces)[: num_chunks * CHUNK_TOKENS]
            for one in made
        ]


def marks_apart(one: Tokenizer, other: Tokenizer) -> tuple[str, ...] | None:
    """The only strings that part two tokenizers: texts without any of these have the same tokens.

    SDXL's second tokenizer pads with `!`, and so reads that sign as its pad wherever it stands.

    Returns:
        None where the tokenizers have other vocabularies or rules.
    """
    described = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other)]
    if any(described[0][part] != described[1][part] for part in ("model", "normalizer", "pre_tokenizer")):
        return None
    first, second = ({json.dumps(token, sort_keys=True) for token in part["added_tokens"]} for part in described)
    return tuple(sorted({json.loads(token)["content"] for token in first ^ second}))
