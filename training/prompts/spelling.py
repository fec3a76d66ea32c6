"""How prompts' tags are written: synonyms, underscores or spaces, slips, and the separators that
people type.

A written prompt is a row of pieces that no token of CLIP spans, so that the tokens of a piece are
looked up.
"""

from typing import NamedTuple

import numpy as np

from training.config.run import PromptConfig
from training.prompts.chosen_tags import ChosenTags
from training.prompts.draws import Draws, PerSample, PerTag
from training.prompts.tag_names import COMMA, NUM_FORMS, SPACES, Names, opens_word

SPELLINGS = ("spaces", "mixed", "underscores")
"""Of a whole prompt."""
_SPACES, _MIXED = 0, 1
_MIXED_SPACES_PROB = 0.8
_COMMA_PROB = 0.8
_SPACE_PROB = 0.8
"""In mixed prompts, and between carelessly separated tags: bigASP's code."""
_MIN_LETTERS = 4
"""A shorter tag would not be known again with a slip in it."""


class Extras:
    """Pieces that are no form of a name, counted behind the forms."""

    def __init__(self, names: Names) -> None:
        """None yet."""
        self._names = names
        self._codes: dict[str, int] = {}

    def code(self, text: str) -> int:
        """The code of such a piece."""
        return self._codes.setdefault(text, self._names.num_forms + len(self._codes))

    def texts(self) -> list[str]:
        """All of them, in order of their codes."""
        return list(self._codes)


class WrittenTags(NamedTuple):
    """The tags of R prompts as T pieces at most."""

    spelling: np.ndarray
    """`(R,)` into `SPELLINGS`."""
    loose: np.ndarray
    """`(R,)` bool: separators are typed carelessly."""
    spelled: np.ndarray
    """`(T,)` spelling of each tag, by `Names`."""
    exchanged: np.ndarray
    """`(T,)` bool: it is an alias."""
    slips: dict[int, str]
    """Misspelled tags, by number in T."""
    kept: np.ndarray
    """`(T,)` bool: a piece ends here; tags that are joined to the next one do not end one."""
    pieces: np.ndarray
    """`(T,)` codes of pieces: forms of `Names`, or `Extras`."""
    bare: np.ndarray
    """`(T,)` the same without the commas that part them, so that a prompt can be cut after any of
    them."""
    gaps: np.ndarray
    """`(T,)` spaces after each piece."""


def write(
    chosen: ChosenTags,
    interrupted: np.ndarray,
    names: Names,
    extras: Extras,
    config: PromptConfig,
    draws: Draws,
) -> WrittenTags:
    """Write the tags of prompts.

    Separators are a comma and a space, which is left out with `missing_space_prob`; in loose
    prompts 80 % have a comma and the others a space, then 80 % have a space more. Two tags that
    nothing but a comma parts are two pieces where the second begins with a letter or digit of
    ASCII, else one.

    Args:
        chosen: The tags.
        interrupted: Those of them, by number in T, that a caption follows: they have a comma and a
            space always.
        names: Of the set.
        extras: Takes what is no form of a name.
        config: The recipe.
        draws: Of these samples.
    """
    spelled, exchanged = _exchange(chosen, names, config, draws)
    drawn = draws.per_sample(PerSample.SPELLING)
    spelling = np.searchsorted(
        [config.spaces_prob, config.spaces_prob + config.mixed_prob], drawn, side="right"
    )
    how = spelling[draws.sample[chosen.tags]]  # (T,)
    spaced = how == _SPACES
    mixed = (how == _MIXED).nonzero()[0]
    spaced[mixed] = draws.per_tag(PerTag.SPACES, chosen.tags[mixed]) < _MIXED_SPACES_PROB
    bare = NUM_FORMS * spelled + SPACES * (spaced & names.spaced[spelled])
    slips = _slips(chosen, bare, names, config, draws)
    loose = draws.per_sample(PerSample.LOOSE) < config.loose_separators_prob
    comma, gaps = _separate(chosen, loose, config, draws)
    comma[interrupted], gaps[interrupted] = True, 1
    kept = np.ones(len(bare), dtype=np.bool_)
    pieces = bare + COMMA * comma
    opens = names.opens_word[spelled]
    for tag, slip in slips.items():
        opens[tag] = opens_word(slip)
    joined = (comma[:-1] & (gaps[:-1] == 0) & ~opens[1:]).nonzero()[0]
    if slips or len(joined):
        kept[joined] = False
        _write_odd(bare, pieces, comma, joined.tolist(), slips, names, extras)
    return WrittenTags(spelling, loose, spelled, exchanged, slips, kept, pieces, bare, gaps)


def _exchange(
    chosen: ChosenTags, names: Names, config: PromptConfig, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Spellings of tags, and which of them are aliases."""
    spelled = chosen.names[chosen.tags]
    can = ((names.num_aliases[spelled] > 0) & draws.own[chosen.tags]).nonzero()[0]
    does = can[draws.per_tag(PerTag.ALIAS, chosen.tags[can]) < config.alias_prob]
    own = spelled[does]
    which = (draws.per_tag(PerTag.OTHER_NAME, chosen.tags[does]) * names.num_aliases[own]).astype(
        np.int64
    )
    spelled[does] = names.first_alias[own] + which
    exchanged = np.zeros(len(spelled), dtype=np.bool_)
    exchanged[does] = True
    return spelled, exchanged


def _slips(
    chosen: ChosenTags, bare: np.ndarray, names: Names, config: PromptConfig, draws: Draws
) -> dict[int, str]:
    """Slips of the keyboard, by number of the tag."""
    if not config.misspelling_prob:
        return {}
    own = draws.own[chosen.tags].nonzero()[0]
    slipped = own[draws.per_tag(PerTag.SLIP, chosen.tags[own]) < config.misspelling_prob]
    letters, kinds = (
        draws.per_tag(choice, chosen.tags[slipped]).tolist()
        for choice in (PerTag.SLIP_LETTER, PerTag.SLIP_KIND)
    )
    texts = [names.write(form) for form in bare[slipped].tolist()]
    slips = map(misspell, texts, letters, kinds)
    return {
        tag: slip
        for tag, text, slip in zip(slipped.tolist(), texts, slips, strict=True)
        if slip != text
    }


def misspell(text: str, letter_drawn: float, kind_drawn: float) -> str:
    """`text` with two neighbouring letters exchanged, one left out or one doubled; short texts
    stay.

    Args:
        text: As it should be.
        letter_drawn: In [0, 1): at which letter.
        kind_drawn: In [0, 1): which of the three.
    """
    letters = [place for place, letter in enumerate(text) if letter.isalpha()]
    if len(letters) < _MIN_LETTERS:
        return text
    place, kind = letters[int(letter_drawn * len(letters))], int(kind_drawn * 3)
    before, letter, after = text[:place], text[place], text[place + 1 :]
    if kind == 0 and after[:1].isalpha() and after[0] != letter:
        return before + after[0] + letter + after[1:]
    return before + after if kind == 1 else before + letter + letter + after


def _separate(
    chosen: ChosenTags, loose: np.ndarray, config: PromptConfig, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a comma follows each tag, and how many spaces."""
    comma = np.ones(len(chosen.tags), dtype=np.bool_)
    comma[chosen.starts[1:][chosen.starts[1:] > chosen.starts[:-1]] - 1] = (
        False  # the last of each prompt
    )
    gaps = comma.astype(np.int64)
    careful = comma & ~loose[draws.sample[chosen.tags]]
    careless = (comma & ~careful).nonzero()[0]
    tags = chosen.tags[careless]
    comma[careless] = own = draws.per_tag(PerTag.COMMA, tags) < _COMMA_PROB
    gaps[careless] = ~own + (draws.per_tag(PerTag.SPACE, tags) < _SPACE_PROB).astype(np.int64)
    if config.missing_space_prob:
        gaps[careful] = (
            draws.per_tag(PerTag.SPACE, chosen.tags[careful]) < 1 - config.missing_space_prob
        )
    return comma, gaps


def _write_odd(
    bare: np.ndarray,
    pieces: np.ndarray,
    comma: np.ndarray,
    joined: list[int],
    slips: dict[int, str],
    names: Names,
    extras: Extras,
) -> None:
    """Write what is no form of a name into `bare` and `pieces`: slips, and tags that are joined to
    the next one."""
    texts = dict(slips)

    def text_of(tag: int) -> str:
        return texts[tag] if tag in texts else names.write(int(bare[tag]))

    for tag in joined:
        texts[tag + 1] = text_of(tag) + "," + text_of(tag + 1)
    for tag, text in texts.items():
        bare[tag] = extras.code(text)
        pieces[tag] = extras.code(text + "," if comma[tag] else text)
