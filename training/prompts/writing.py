"""What the prompts of a block of samples say in one epoch, made for all of them at once, with a
trace of every choice.

A pure function of the samples, the frozen vocabulary, the recipe and the numbers drawn, which
follow from each sample's id alone: a prompt is the same in every block.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from training.config.run import PromptConfig
from training.prompts.chosen_tags import ChosenTags, choose_tags, own_tags
from training.prompts.draws import Draws, PerSample, draw_chunks
from training.prompts.ragged import offsets, spans
from training.prompts.samples import Samples
from training.prompts.spelling import SPELLINGS, Extras, WrittenTags, write
from training.prompts.tag_names import Names
from training.seeds import Stream

PROMPTS_VERSION = 3
"""Raised when equal samples, recipes and seeds come to other prompts: epochs that were begun are
not finished then."""
_SENTENCE_ENDS = (".", "!", "?", ",", ";", ":")


class Caption(NamedTuple):
    """The sentence that a prompt uses."""

    words: list[str]
    source: str
    """`given` or `made`."""
    line: int
    """Of that caption's lines."""


class Pieces(NamedTuple):
    """R prompts as P pieces that no token of CLIP spans: words of captions, tags with the commas
    after them."""

    codes: np.ndarray
    """`(P,)` forms of `Names`, and behind them `extras`."""
    bare: np.ndarray
    """`(P,)` the same without the commas that part them, so that a prompt can be cut after any of
    them."""
    gaps: np.ndarray
    """`(P,)` spaces after each piece."""
    starts: np.ndarray
    """`(R + 1,)` where each prompt begins."""
    extras: list[str]
    """Pieces that are no form of a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The prompts of R samples."""

    names: Names
    config: PromptConfig
    draws: Draws
    empty: np.ndarray
    """`(R,)` bool: unconditional."""
    num_chunks: np.ndarray | None
    """`(R,)` int64, by the recipe's shares; None lets each prompt have those that it fills."""
    captions: dict[int, Caption]
    """By prompt, of those that use one."""
    tagged: np.ndarray
    """`(R,)` bool: tags are asked for, of which there may be none."""
    chosen: ChosenTags
    written: WrittenTags
    pieces: Pieces

    def prompt(self, number: int, num_pieces: int | None = None) -> "Prompt":
        """One of them, cut after so many pieces; None for all."""
        whole = int(self.pieces.starts[number + 1] - self.pieces.starts[number])
        return Prompt(self, number, whole if num_pieces is None else num_pieces)

    def texts(self, codes: np.ndarray) -> list[str]:
        """Pieces as text."""
        num_forms, extras, write_form = self.names.num_forms, self.pieces.extras, self.names.write
        return [
            write_form(code) if code < num_forms else extras[code - num_forms]
            for code in codes.tolist()
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt of a block, perhaps cut; what it says is put into words when asked for."""

    block: Block
    number: int
    """In its block."""
    num_pieces: int
    """That are left of it, from the first on."""

    @property
    def pieces(self) -> list[str]:
        """Pieces that no token spans; the last one of a cut prompt has lost its comma."""
        pieces = self.block.pieces
        start, end = (int(place) for place in pieces.starts[self.number : self.number + 2])
        codes = pieces.codes[start : start + self.num_pieces]
        if start + self.num_pieces < end:
            codes = np.append(codes[:-1], pieces.bare[start + self.num_pieces - 1])
        return self.block.texts(codes)

    @property
    def text(self) -> str:
        """The prompt as a string."""
        start = int(self.block.pieces.starts[self.number])
        gaps = self.block.pieces.gaps[start : start + self.num_pieces].tolist()
        gaps[-1:] = [0] * bool(gaps)
        return "".join([piece + " " * gap for piece, gap in zip(self.pieces, gaps, strict=True)])

    @property
    def zeroed(self) -> bool:
        """The text encoders' output is to be replaced by zeros."""
        return bool(self.block.empty[self.number]) and self.block.config.empty_as == "zeros"

    @property
    def trace(self) -> dict[str, Any]:
        """Every choice. `kind`: empty, caption, caption_and_tags, tags; `as` of an empty one:
        string or zeros; `caption`: given or made, and `line` of it; of tags `wanted`, `num_tags`,
        `tags` and `score_tags` (canonical, in order), `dropped`, `aliases` and `misspelled` by tag,
        `spelling`, `loose`. Of the whole prompt, where it is cut.
        """
        block, number = self.block, self.number
        if block.empty[number]:
            return {"kind": "empty", "as": block.config.empty_as}
        trace: dict[str, Any] = {"kind": "tags"}
        if caption := block.captions.get(number):
            kind = "caption_and_tags" if block.tagged[number] else "caption"
            trace = {"kind": kind, "caption": caption.source, "line": caption.line}
        return trace | _trace_tags(block, number) if block.tagged[number] else trace


def make_block(
    samples: Samples, rows: np.ndarray, names: Names, config: PromptConfig, stream: Stream
) -> Block:
    """The prompts of samples.

    In order: the number of chunks where the recipe has shares of them; the empty prompt with
    `empty_prob`; caption, caption and tags, or tags, by their shares; a caption alone where there
    is no tag.

    Args:
        samples: The set.
        rows: Whose prompts, `(R,)` int64, at most `MAX_PROMPTS`.
        names: Of the set, by the recipe.
        config: The recipe.
        stream: Draws everything, keyed by image_id.

    Source: bigASP v1's page and data.py (spelling, separators); DALL-E 3, section 3 (given and made
    captions).
    """
    own = own_tags(samples, rows, names)
    draws = Draws(stream, samples.image_ids.take(rows), own.starts[1:] - own.starts[:-1], config)
    empty = draws.per_sample(PerSample.EMPTY) < config.empty_prob
    captioned = ~empty & (samples.captions.present(rows) | samples.made_captions.present(rows))
    drawn = draws.per_sample(PerSample.KIND)
    alone = (drawn < config.caption_prob) | (own.starts[1:] == own.starts[:-1])
    used = captioned & (alone | (drawn < config.caption_prob + config.caption_and_tags_prob))
    captions = _choose_captions(samples, rows, used.nonzero()[0], config, draws)
    tagged = ~empty
    tagged[[number for number in captions if alone[number]]] = False
    chosen = choose_tags(own.values, samples.scores[rows], tagged, names, config, draws)
    num_score = np.bincount(draws.sample[chosen.tags[~draws.own[chosen.tags]]], minlength=len(rows))
    both = np.array([number for number in captions if num_score[number]], dtype=np.int64)
    extras = Extras(names)
    written = write(chosen, chosen.starts[both] + num_score[both] - 1, names, extras, config, draws)
    return Block(
        names=names, config=config, draws=draws, empty=empty, captions=captions, tagged=tagged, chosen=chosen,
        num_chunks=draw_chunks(draws.per_sample(PerSample.CHUNKS), config) if config.chunk_shares else None,
        written=written, pieces=_join(captions, num_score, chosen, written, extras, draws),
    )  # fmt: skip


def _choose_captions(
    samples: Samples, rows: np.ndarray, numbers: np.ndarray, config: PromptConfig, draws: Draws
) -> dict[int, Caption]:
    """Captions of some prompts, by prompt; none of one whose lines are all blank."""
    found = {}
    take_made = draws.per_sample(PerSample.MADE) < config.made_caption_prob
    line_drawn = draws.per_sample(PerSample.LINE)
    for number in numbers.tolist():
        row = int(rows[number])
        given, made = ([line.strip() for line in (text or "").splitlines() if line.strip()]
                       for text in (samples.captions[row], samples.made_captions[row]))  # fmt: skip
        source, lines = (
            ("made", made) if made and (not given or take_made[number]) else ("given", given)
        )
        if lines:
            line = int(line_drawn[number] * len(lines))
            found[number] = Caption(lines[line].split(" "), source, line)
    return found


def _join(
    captions: dict[int, Caption],
    num_score: np.ndarray,
    chosen: ChosenTags,
    written: WrittenTags,
    extras: Extras,
    draws: Draws,
) -> Pieces:
    """Score tags, of which there are `num_score` `(R,)`, then the words of a caption, then tags.

    A comma stands between the words and the tags where no sign ends the sentence.
    """
    kept = written.kept
    num_tags = np.bincount(draws.sample[chosen.tags[kept]], minlength=len(chosen.wanted))
    if not captions:
        codes, bare, gaps = written.pieces[kept], written.bare[kept], written.gaps[kept]
        return Pieces(codes, bare, gaps, offsets(num_tags), extras.texts())
    num_words = np.zeros_like(num_tags)
    own: list[int] = []
    own_bare: list[int] = []
    for number, (words, _, _) in sorted(captions.items()):
        num_words[number] = len(words)
        own_bare += map(extras.code, words)
        own += own_bare[len(own) :]
        if num_tags[number] > num_score[number] and not words[-1].endswith(_SENTENCE_ENDS):
            own[-1] = extras.code(words[-1] + ",")
    starts = offsets(num_words + num_tags)
    of_words, of_tags = spans(starts[:-1] + num_score, num_words), spans(starts[:-1], num_tags)
    behind = spans(np.zeros_like(num_tags), num_tags) >= num_score.repeat(num_tags)
    of_tags[behind] += num_words.repeat(num_tags)[behind]
    codes, bare, gaps = np.empty((3, starts[-1]), dtype=np.int64)
    codes[of_words], bare[of_words], gaps[of_words] = own, own_bare, 1
    codes[of_tags], bare[of_tags], gaps[of_tags] = (
        written.pieces[kept],
        written.bare[kept],
        written.gaps[kept],
    )
    return Pieces(codes, bare, gaps, starts, extras.texts())


def _trace_tags(block: Block, number: int) -> dict[str, Any]:
    """What was chosen of tags."""
    chosen, written, draws, names = block.chosen, block.written, block.draws, block.names
    start, end = (int(place) for place in chosen.starts[number : number + 2])
    tags = [names.names[code] for code in chosen.names[chosen.tags[start:end]].tolist()]
    num_score = int((~draws.own[chosen.tags[start:end]]).sum())
    exchanged = np.flatnonzero(written.exchanged[start:end]).tolist()
    dropped = chosen.dropped[draws.sample[chosen.dropped] == number]
    return {
        "wanted": int(chosen.wanted[number]),
        "dropped": [names.names[code] for code in chosen.names[dropped].tolist()],
        "num_tags": end - start - num_score,
        "tags": tags[num_score:],
        "score_tags": tags[:num_score],
        "aliases": {
            tags[place]: names.spellings[int(written.spelled[start + place])] for place in exchanged
        },
        "spelling": SPELLINGS[written.spelling[number]],
        "misspelled": {
            tags[place - start]: written.slips[place]
            for place in range(start, end)
            if place in written.slips
        },
        "loose": bool(written.loose[number]),
    }
