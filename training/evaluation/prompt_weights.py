"""Reads the weights that the UIs let people write into prompts, and applies them to what the text encoders say.

`(a)` is 1.1 times as strong, `(a:1.5)` 1.5 times, `[a]` 1 / 1.1 times; they nest, and behind a backslash a bracket is a
letter. Source: A1111's prompt syntax and its emphasis "Original" and "No norm"; docs/decisions/0009-prompt-weights.md
says why no library does it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPTokenizer

from training.data.tokens import CHUNK_LENGTH, CHUNK_TOKENS
from training.errors import EvaluationError
from training.evaluation_config import PromptWeights

_ROUND, _SQUARE = 1.1, 1 / 1.1
_PIECE = re.compile(r"\\[()\[\]\\]|\\|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|:")
_CHANGING = re.compile(r"\||:\s*[\d.]+\s*$")
"""In square brackets: A1111 exchanges words while it samples (`[cat:dog:0.5]`, `[cat|dog]`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedText:
    """A prompt without its marks."""

    text: str
    """What is tokenized."""
    weights: tuple[float, ...]
    """One per character."""


def read_prompt(prompt: str, mode: PromptWeights) -> WeightedText:
    """Read a prompt as the mode has it: literally where it is `off`.

    Raises:
        EvaluationError: it asks for words that change while sampling.
    """
    if mode == "off":
        return WeightedText(text=prompt, weights=(1.0,) * len(prompt))
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for piece in _PIECE.findall(prompt):
        if piece in opened:
            opened[piece].append(len(letters))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), _ROUND)
        elif piece == "]" and opened["["]:
            start = opened["["].pop()
            if _CHANGING.search("".join(letters[start:])):
                inside = "".join(letters[start:])
                raise EvaluationError(
                    f"prompt {prompt!r}: [{inside}] exchanges words while sampling in the UIs, which is not done here; "
                    r"write \[ and \] where the brackets are letters"
                )
            multiply(start, _SQUARE)
        elif len(piece) > 1 and piece[0] == ":" and opened["("]:
            multiply(opened["("].pop(), float(piece[1:-1]))
        else:
            literal = piece[1:] if piece[0] == "\\" else piece  # as in A1111, a backslash alone vanishes
            letters += literal
            weights += [1.0] * len(literal)
    for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):  # what is never closed reaches to the end
        for start in opened[bracket]:
            multiply(start, factor)
    return WeightedText(text="".join(letters), weights=tuple(weights))


def escape(text: str) -> str:
    """A prompt that reads as `text`, every character of weight 1."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def token_weights(prompts: Sequence[WeightedText], tokenizer: CLIPTokenizer, num_chunks: int) -> np.ndarray:
    """Weights `(len(prompts), num_chunks, 77)` fp32 of the tokens that `tokens.tokenize` makes of the texts.

    The text is tokenized whole, so that its tokens are those of the prompt without marks; one that spans a mark has the
    weight of its first character. BOS, EOS and pads have 1.
    """
    texts = [prompt.text for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    out = np.ones((len(prompts), num_chunks, CHUNK_LENGTH), dtype=np.float32)
    for row, (prompt, offsets) in enumerate(zip(prompts, encoded["offset_mapping"], strict=True)):
        for place, (start, _) in enumerate(offsets[: num_chunks * CHUNK_TOKENS]):
            out[row, place // CHUNK_TOKENS, place % CHUNK_TOKENS + 1] = prompt.weights[start]
    return out


def apply_weights(states: torch.Tensor, weights: torch.Tensor, *, restore_mean: bool) -> torch.Tensor:
    """Multiply what one encoder says of each token by the token's weight.

    Args:
        states: `(B, n * 77, d)` hidden states of one encoder.
        weights: `(B, n, 77)`.
        restore_mean: Scale each chunk so that the mean of its numbers is what it was.

    Returns:
        `(B, n * 77, d)`; what pools the text stays unweighted, as in A1111.
    """
    # Laid out alike, both means of a chunk without weights are sums in one order: it stays as it is, bit for bit.
    chunks = states.unflatten(1, weights.shape[1:]).contiguous()  # (B, n, 77, d)
    weighted = chunks * weights[..., None]
    if restore_mean:
        weighted = weighted * (chunks.mean(dim=(2, 3), keepdim=True) / weighted.mean(dim=(2, 3), keepdim=True))
    return weighted.flatten(1, 2)
