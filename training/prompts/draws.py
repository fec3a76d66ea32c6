"""The random numbers of a block of prompts: a place of its own for each choice, keyed by the sample
alone.

A sample draws `NUM_PER_SAMPLE` words of 32 bits, then one for each of its tags by `PerTag.WHICH`,
then one for each by `PerTag.WHERE`, and so on. A choice that is added takes the next free place,
and moves no other's numbers.
"""

from collections.abc import Sequence
from enum import IntEnum, auto

import numpy as np

from training.config.run import PromptConfig
from training.prompts.ragged import offsets
from training.prompts.samples import Samples
from training.seeds import Stream

NUM_PER_SAMPLE = 16
"""Words before the tags' own; those that `PerSample` does not name are free."""
NUM_SCORE_TAGS = 3
"""Score tags of a prompt, at most: they are the first three tags of every sample, whether it uses
them or not."""
_UNIT = 2.0**-32


class PerSample(IntEnum):
    """Places of the choices that a prompt makes once."""

    CHUNKS = 0
    """How many chunks it has, by shares."""
    EMPTY = auto()
    """Whether it is the unconditional one."""
    KIND = auto()
    """Caption, caption and tags, or tags."""
    MADE = auto()
    """The made caption or the given one."""
    LINE = auto()
    """The caption's line."""
    WANTED = auto()
    """The number of tags."""
    SCORE_TAGS = auto()
    """The number of score tags."""
    SPELLING = auto()
    """Underscores, spaces or mixed."""
    LOOSE = auto()
    """Whether separators are typed carelessly."""


class PerTag(IntEnum):
    """Places of the choices that a prompt makes for each tag; those that few recipes ask for are
    the last."""

    WHICH = 0
    """Its rank among tags that few of are taken; of a score tag, which one it is."""
    WHERE = auto()
    """Its rank among those that are taken."""
    ALIAS = auto()
    """Whether it is written as one of its aliases."""
    OTHER_NAME = auto()
    """The alias."""
    SPACES = auto()
    """Whether it has spaces, in a mixed prompt."""
    COMMA = auto()
    """Whether a comma follows it, in a loose prompt."""
    SPACE = auto()
    """Whether a space follows that, or the comma of a careful prompt."""
    DROP = auto()
    """Whether dropout takes it."""
    SLIP = auto()
    """Whether it is misspelled."""
    SLIP_LETTER = auto()
    """At which letter."""
    SLIP_KIND = auto()
    """How."""


def _num_per_tag(config: PromptConfig) -> int:
    """Words of each tag that a recipe can ask for."""
    if config.misspelling_prob:
        return len(PerTag)
    return PerTag.DROP + 1 if config.tag_dropout else PerTag.DROP


class Draws:
    """Numbers of R samples, and the E tags that these have: three for scores and then each sample's
    own."""

    def __init__(
        self, stream: Stream, image_ids: Sequence[str], num_own: np.ndarray, config: PromptConfig
    ) -> None:
        """Draw all that the recipe may ask for.

        Args:
            stream: Of the seed and epoch.
            image_ids: Of the samples.
            num_own: `(R,)` their own tags.
            config: The recipe.
        """
        num_tags = num_own + NUM_SCORE_TAGS
        counts = num_tags * _num_per_tag(config) + NUM_PER_SAMPLE
        words = stream.words(image_ids, counts.tolist())
        starts, first = offsets(counts)[:-1], offsets(num_tags)
        self._words = words
        self._per_sample = words[starts + np.arange(NUM_PER_SAMPLE)[:, None]] * _UNIT
        self.score_tags = first[:-1, None] + np.arange(NUM_SCORE_TAGS)
        """Each sample's tags for scores, `(R, 3)`."""
        self.sample = np.arange(len(num_tags)).repeat(num_tags)
        """Each tag's sample, `(E,)`: its number in the block."""
        self.own = np.ones(first[-1], dtype=np.bool_)
        """Whether a tag is one of the sample's own, `(E,)`; others are for scores."""
        self.own[self.score_tags] = False
        # Where a tag's first word is, and how far apart its words are.
        self._place = np.arange(first[-1]) + (starts + NUM_PER_SAMPLE - first[:-1])[self.sample]
        self._stride = num_tags[self.sample]

    def per_sample(self, choice: PerSample) -> np.ndarray:
        """`(R,)` float64 in [0, 1)."""
        return self._per_sample[int(choice)]

    def words(self, choice: PerTag, tags: np.ndarray) -> np.ndarray:
        """Of some tags `(n,)` uint32."""
        return self._words[self._place[tags] + self._stride[tags] * int(choice)]

    def per_tag(self, choice: PerTag, tags: np.ndarray) -> np.ndarray:
        """Of some tags `(n,)` float64 in [0, 1)."""
        return self.words(choice, tags) * _UNIT


def draw_chunks(drawn: np.ndarray, config: PromptConfig) -> np.ndarray:
    """Chunks of prompts by the recipe's shares: `(R,)` int64 from the numbers of
    `PerSample.CHUNKS`."""
    edges = np.cumsum(config.chunk_shares)
    return np.searchsorted(edges, drawn * edges[-1], side="right").clip(max=len(edges) - 1) + 1


def draw_only_chunks(
    stream: Stream, samples: Samples, rows: np.ndarray, config: PromptConfig
) -> np.ndarray:
    """The same for rows of which nothing else is asked."""
    assert PerSample.CHUNKS == 0
    return draw_chunks(stream.words(samples.image_ids.take(rows), [1] * len(rows)) * _UNIT, config)
