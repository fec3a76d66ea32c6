"""How a prompt's tags are written: synonyms, underscores or spaces, slips, and the separators that people type.

A written prompt is a row of pieces that no token of CLIP spans, so that tokens can be cached by piece.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal

from training.run_config import PromptConfig

Spelling = Literal["underscores", "spaces", "mixed"]

SHORT_TAG = 3
"""Tags of at most this many characters are faces (o_o, ^_^) and keep their underscore. Kohaku's rule."""
_MIXED_SPACES_PROB = 0.8
_COMMA_PROB = 0.8
_SPACE_PROB = 0.8
"""In mixed prompts, and between carelessly separated tags: bigASP's code."""
_MIN_LETTERS = 4
"""A shorter tag would not be known again with a slip in it."""


def mutate(
    names: list[str], aliases: Mapping[str, tuple[str, ...]], prob: float, rng: Random
) -> tuple[list[str], dict[str, str]]:
    """Exchange each tag that has aliases for one of them with probability `prob`.

    Returns:
        The names in the same order, and alias by tag of those that were exchanged.
    """
    changed: dict[str, str] = {}
    random = rng.random
    for name in [name for name in names if random() < prob]:
        if others := aliases.get(name):
            changed[name] = others[int(random() * len(others))]
    return ([changed.get(name, name) for name in names] if changed else names), changed


def choose_spelling(config: PromptConfig, rng: Random) -> Spelling:
    """How a whole prompt treats underscores."""
    draw = rng.random()
    if draw < config.spaces_prob:
        return "spaces"
    return "mixed" if draw < config.spaces_prob + config.mixed_prob else "underscores"


def write(names: list[str], spelling: Spelling, rng: Random) -> list[str]:
    """Names as they are typed."""
    if spelling == "underscores":
        return names
    if spelling == "spaces":
        return [name.replace("_", " ") if len(name) > SHORT_TAG else name for name in names]
    random = rng.random
    return [
        name.replace("_", " ") if random() < _MIXED_SPACES_PROB and len(name) > SHORT_TAG else name for name in names
    ]


def misspell(text: str, rng: Random) -> str:
    """`text` with two neighbouring letters exchanged, one left out or one doubled; short texts stay."""
    letters = [place for place, letter in enumerate(text) if letter.isalpha()]
    if len(letters) < _MIN_LETTERS:
        return text
    place, slip = letters[int(rng.random() * len(letters))], int(rng.random() * 3)
    before, letter, after = text[:place], text[place], text[place + 1 :]
    if slip == 0 and after[:1].isalpha() and after[0] != letter:
        return before + after[0] + letter + after[1:]
    return before + after if slip == 1 else before + letter + letter + after


def separate(written: list[str]) -> list[str]:
    """Pieces that a comma ends, for tags that a comma and a space part; the last one ends the prompt."""
    pieces = [text + "," for text in written]
    if pieces:
        pieces[-1] = written[-1]
    return pieces


def separate_loosely(written: Sequence[str], rng: Random) -> tuple[list[str], list[str], list[str]]:
    """Separators as people type them: 80 % have a comma and the others a space, then 80 % have a space more.

    Returns:
        Pieces, the same without the commas between them, and the white space after each. Two tags that nothing but a
        comma parts are two pieces where the second begins with a letter or digit of ASCII, else one.
    """
    pieces: list[str] = []
    bare: list[str] = []
    gaps: list[str] = []
    random, last = rng.random, len(written) - 1
    joined = ""
    for place, text in enumerate(written):
        own = joined + text
        comma, space = random() < _COMMA_PROB, random() < _SPACE_PROB
        if place < last and comma and not space:
            first = written[place + 1][:1]
            if not (first.isascii() and first.isalnum()):
                joined = own + ","
                continue
        bare.append(own)
        pieces.append(own + "," if comma and place < last else own)
        gaps.append((" " * space if comma else " " + " " * space) if place < last else "")
        joined = ""
    return pieces, bare, gaps
