"""Reads the weights that the UIs let people write into prompts, and applies them to what the text
encoders say.

`(a)` is 1.1 times as strong, `(a:1.5)` 1.5 times, `[a]` 1 / 1.1 times; they nest, and behind a
backslash a bracket is a letter. The word BREAK begins a new chunk. Source: A1111's prompt syntax,
measured on its parser, and its emphasis "Original" and "No norm";
docs/decisions/0009-prompt-weights.md says why no library does it.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from training.config.evaluation import PromptWeights
from training.errors import EvaluationError
from training.models.tokens import CHUNK_LENGTH, chunk_spans

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

_ROUND, _SQUARE = 1.1, 1 / 1.1
_PIECE = re.compile(r"\\[()\[\]\\]|\\|:\s*([+-]?[.\d]+)\s*\)|[()\[\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\b(BREAK)\b\s*")
_MARK = ("BREAK", -1.0)
"""The run that begins a new chunk: brackets around it multiply its weight, and it is a word."""
_UNREAD = re.compile(r"\\[()\[\]\\]|:\s*[+-]?[.\d]+\s*\)|\[|\({2,}|\bBREAK\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedText:
    """A prompt without its marks, or the part of it that has chunks of its own."""

    text: str
    """What is tokenized."""
    weights: tuple[float, ...]
    """One per character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadText:
    """A prompt as its weights are read."""

    runs: tuple[tuple[str, float], ...]
    """Text and weight; neighbours differ in weight."""
    num_words: int = 0
    """How many BREAK stand in brackets, and so are words."""

    @property
    def sections(self) -> tuple[WeightedText, ...]:
        """The parts between each BREAK and the next, one at least."""
        sections: list[list[tuple[str, float]]] = [[]]
        for run in self.runs:
            if run == _MARK:
                sections.append([])
            else:
                sections[-1].append(run)
        return tuple(
            WeightedText(
                text="".join(text for text, _ in runs),
                weights=tuple(weight for text, weight in runs for _ in text),
            )
            for runs in sections
        )


def read_text(text: str, mode: PromptWeights) -> ReadText:
    """Read a text as the mode has it: literally where it is `off`.

    Raises:
        EvaluationError: a weight is no number.
    """
    if mode == "off":
        return ReadText(runs=((text, 1.0),))
    letters: list[str] = []
    weights: list[float] = []
    marks: set[int] = set()
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _PIECE.finditer(text):
        piece, weight = match.group(), match.group(1)
        if piece in opened:
            opened[piece].append(len(letters))
        elif piece == ")" and opened["("]:
            close("(", _ROUND)
        elif piece == "]" and opened["["]:
            close("[", _SQUARE)
        elif weight is not None and opened["("]:
            close("(", _number(weight, piece))
        elif piece[0] == "\\":
            letters.append(piece[1:])  # a backslash alone vanishes
            weights.append(1.0)
        else:
            parts = _BREAK.split(piece)
            marks.update(range(len(letters) + 1, len(letters) + len(parts), 2))
            letters += parts
            weights += [_MARK[1] if place % 2 else 1.0 for place in range(len(parts))]
    for bracket, factor in (
        ("(", _ROUND),
        ("[", _SQUARE),
    ):  # what is never closed reaches to the end
        while opened[bracket]:
            close(bracket, factor)
    runs, num_words = [], 0
    for run_weight, places in itertools.groupby(range(len(letters)), key=weights.__getitem__):
        members = list(places)
        run = ("".join(letters[place] for place in members), run_weight)
        runs.append(run)
        num_words += 0 if run == _MARK else len(marks.intersection(members))
    return ReadText(runs=tuple(runs) or (("", 1.0),), num_words=num_words)


def _number(weight: str, piece: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise EvaluationError(f"{piece!r}: the weight {weight} is no number") from None


def unread_marks(text: str) -> list[str]:
    """Marks that mode `off` reads as letters, each once. Single round brackets are none: many tags
    have some."""
    return list(dict.fromkeys(match.group() for match in _UNREAD.finditer(text)))


def token_weights(
    prompts: Sequence[Sequence[WeightedText]], tokenizer: "CLIPTokenizer", num_chunks: int
) -> np.ndarray:
    """Weights `(len(prompts), num_chunks, 77)` fp32 of the tokens that `tokens.tokenize_sections`
    makes of the texts.

    A section is tokenized whole, so that its tokens are those of the prompt without marks; one that
    spans a mark has the weight of its first character. BOS, EOS and pads have 1.
    """
    texts = [section.text for sections in prompts for section in sections]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        verbose=False,
        return_offsets_mapping=True,
    )
    offsets = iter(encoded["offset_mapping"])
    out = np.ones((len(prompts), num_chunks, CHUNK_LENGTH), dtype=np.float32)
    for row, sections in enumerate(prompts):
        places = [next(offsets) for _ in sections]
        spans = chunk_spans([len(tokens) for tokens in places])
        for chunk, (section, start, stop) in enumerate(spans[:num_chunks]):
            found = [sections[section].weights[first] for first, _ in places[section][start:stop]]
            out[row, chunk, 1 : len(found) + 1] = found
    return out


def apply_weights(
    states: "torch.Tensor", weights: "torch.Tensor", *, restore_mean: bool
) -> "torch.Tensor":
    """Multiply what one encoder says of each token by the token's weight.

    Args:
        states: `(B, n * 77, d)` hidden states of one encoder.
        weights: `(B, n, 77)`.
        restore_mean: Scale each chunk so that the mean of its numbers is what it was.

    Returns:
        `(B, n * 77, d)`; what pools the text stays unweighted, as in A1111.
    """
    # Laid out alike, both means of a chunk without weights are sums in one order: it stays as it
    # is, bit for bit.
    chunks = states.unflatten(1, weights.shape[1:]).contiguous()  # (B, n, 77, d)
    weighted = chunks * weights[..., None]
    if restore_mean:
        weighted = weighted * (
            chunks.mean(dim=(2, 3), keepdim=True) / weighted.mean(dim=(2, 3), keepdim=True)
        )
    return weighted.flatten(1, 2)
