"""Which tags the prompts of a block of samples have, and in which order."""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from training.config.run import PromptConfig
from training.errors import DataError
from training.prompts.draws import NUM_SCORE_TAGS, Draws, PerSample, PerTag
from training.prompts.ragged import Ragged, offsets, spans
from training.prompts.samples import Samples
from training.prompts.tag_names import Names

MAX_PROMPTS = 1024
"""Of a block; some 10 MB of numbers."""
_MAX_TAGS = 1 << 22
"""Of a block: what is sorted is a number of 10 bits for the sample, 31 for the key, 22 for the
tag."""
_SAMPLE_BIT, _KEY_BIT, _KEY_BITS = 53, 22, 31
_GROUP_BIT, _CATEGORY_BIT = 29, 27
_FIRST, _PLACED, _SHUFFLED = 1, 2, 3
"""Groups of tags in the order of a prompt, after score tags. Keys have 2 bits of the group and 29
in it."""
_FAR = 7
"""Standard deviations that no number of 32 bits comes to."""


class ChosenTags(NamedTuple):
    """Tags of R prompts, as tags of `Draws`."""

    names: np.ndarray
    """`(E,)` the code of each tag of `Draws`."""
    tags: np.ndarray
    """`(T,)` those that are in, in the order of each prompt."""
    starts: np.ndarray
    """`(R + 1,)` where each prompt's begin."""
    wanted: np.ndarray
    """`(R,)` the number of tags that was drawn, score tags aside; all that there are where the
    recipe draws none."""
    dropped: np.ndarray
    """`(D,)` those that dropout took."""


def own_tags(samples: Samples, rows: np.ndarray, names: Names) -> Ragged:
    """Codes of each row's tags, then its words, then the watermark where it has one: of all `(R,)`
    rows."""
    num_tags, num_words = samples.tags.lengths(rows), samples.words.lengths(rows)
    marked = samples.watermarked(rows)
    starts = offsets(num_tags + num_words + marked)
    codes = np.empty(starts[-1], dtype=np.int64)
    codes[spans(starts[:-1], num_tags)] = samples.tags.take(rows)
    codes[spans(starts[:-1] + num_tags, num_words)] = names.of_words[samples.words.take(rows)]
    codes[starts[1:][marked] - 1] = names.watermark
    return Ragged(codes, starts)


def choose_tags(
    own: np.ndarray,
    scores: np.ndarray,
    tagged: np.ndarray,
    names: Names,
    config: PromptConfig,
    draws: Draws,
) -> ChosenTags:
    """Choose tags: dropout first, then as many as wanted, first and always tags in any case, then
    their order.

    Args:
        own: Codes of all samples' own tags, one sample after the other.
        scores: `(R,)` of the samples, at most `MAX_PROMPTS`.
        tagged: `(R,)` bool: prompts that have tags.
        names: Of the set, by the recipe.
        config: The recipe.
        draws: Of these samples.

    Source: bigASP v1's data.py (number, score tags); HakuBooru's caption.py (order).
    """
    assert len(scores) <= MAX_PROMPTS, len(scores)
    if len(draws.sample) > _MAX_TAGS:
        raise DataError(
            f"{len(scores)} images of the training set have {len(own)} tags, may have {_MAX_TAGS}"
        )
    codes = np.zeros(len(draws.sample), dtype=np.int64)
    codes[draws.own] = own
    score_tags = _choose_score_tags(codes, scores, tagged, names, config, draws)
    there = draws.own & tagged[draws.sample]
    there[_doubles(codes, there, names, draws)] = False
    forced = there & names.forced[codes]
    must, pool = forced.nonzero()[0], (there & ~forced).nonzero()[0]
    dropped = pool[:0]
    if config.tag_dropout:
        goes = (names.place[codes[pool]] < 0) & (
            draws.per_tag(PerTag.DROP, pool) < config.tag_dropout
        )
        dropped, pool = pool[goes], pool[~goes]
    num_must, num_pool = (
        np.bincount(draws.sample[part], minlength=len(scores)) for part in (must, pool)
    )
    wanted = num_must + num_pool
    if config.mean_tags:
        wanted = draw_number(draws.per_sample(PerSample.WANTED), config)
        by_rank = _sort(pool, draws.words(PerTag.WHICH, pool) >> (32 - _KEY_BITS), draws)
        rank = spans(np.zeros_like(num_pool), num_pool)
        pool = by_rank[rank < np.maximum(wanted - num_must, 0).repeat(num_pool)]
    chosen = np.concatenate([score_tags, must, pool])
    chosen = _sort(chosen, _ranks(chosen, codes, names, config, draws), draws)
    starts = offsets(np.bincount(draws.sample[chosen], minlength=len(scores)))
    return ChosenTags(codes, chosen, starts, wanted, dropped)


def draw_number(drawn: np.ndarray, config: PromptConfig) -> np.ndarray:
    """Numbers of tags: N(`mean_tags`, `std_tags`) rounded down, at least `min_tags`, `(R,)` int64.

    Args:
        drawn: `(R,)` in [0, 1): the share of the distribution that lies below.
        config: The recipe.
    """
    return np.searchsorted(_below(config.mean_tags, config.std_tags), drawn, side="right").clip(
        config.min_tags
    )


@cache
def _below(mean: float, std: float) -> list[float]:
    """The share of a normal distribution that lies below 1, 2, ..."""
    if std == 0:
        return [0.0] * int(mean)
    normal = NormalDist(mean, std)
    return [normal.cdf(number) for number in range(1, int(mean + _FAR * std) + 2)]


def _choose_score_tags(
    codes: np.ndarray,
    scores: np.ndarray,
    tagged: np.ndarray,
    names: Names,
    config: PromptConfig,
    draws: Draws,
) -> np.ndarray:
    """The score tags of prompts, whose `codes` it fills in: one to three of a score's score + 1,
    all alike."""
    if not config.score_tags:
        return np.empty(0, dtype=np.int64)
    score = scores.astype(np.int64)[:, None]
    # Each drawn from those that the ones before it left: (R, 3).
    left = np.maximum(score + np.arange(1, 1 - NUM_SCORE_TAGS, -1), 1)
    pick = (draws.per_tag(PerTag.WHICH, draws.score_tags) * left).astype(np.int64)
    one, two, three = pick.T
    two += two >= one
    three += three >= np.minimum(one, two)
    three += three >= np.maximum(one, two)
    codes[draws.score_tags] = names.of_scores[score, pick]
    most = np.minimum(score[:, 0] + 1, NUM_SCORE_TAGS)
    count = (draws.per_sample(PerSample.SCORE_TAGS) * most).astype(np.int64) + 1
    return spans(draws.score_tags[:, 0], count * (tagged & (scores > 0)))


def _doubles(codes: np.ndarray, there: np.ndarray, names: Names, draws: Draws) -> np.ndarray:
    """Tags that their sample has already, from another source."""
    shared = (there & names.shared[codes]).nonzero()[0]
    if not len(shared):
        return shared
    _, firsts = np.unique(
        draws.sample[shared] * len(names.names) + codes[shared], return_index=True
    )
    return np.delete(shared, firsts)


def _ranks(
    chosen: np.ndarray, codes: np.ndarray, names: Names, config: PromptConfig, draws: Draws
) -> np.ndarray:
    """Keys of tags in their prompt: score tags, first tags, in Kohaku's order the placed ones, then
    the others."""
    own = codes[chosen]
    rank = (_SHUFFLED << _GROUP_BIT) | (
        draws.words(PerTag.WHERE, chosen) >> (32 - _GROUP_BIT)
    ).astype(np.int64)
    if config.order == "kohaku":
        placed = (
            (_PLACED << _GROUP_BIT) | (names.place[own] << _CATEGORY_BIT) | names.alphabetical[own]
        )
        rank = np.where(names.place[own] >= 0, placed, rank)
    if config.first_tags:
        rank = np.where(names.first[own] >= 0, (_FIRST << _GROUP_BIT) | names.first[own], rank)
    return rank * draws.own[chosen]


def _sort(tags: np.ndarray, keys: np.ndarray, draws: Draws) -> np.ndarray:
    """Tags by sample and key; those with equal keys as they are in the sample."""
    packed = (draws.sample[tags] << _SAMPLE_BIT) | (keys.astype(np.int64) << _KEY_BIT) | tags
    packed.sort()
    return packed & (_MAX_TAGS - 1)
