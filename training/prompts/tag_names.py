"""Every name that prompts of a training set can have, as codes with what the recipe and the
vocabulary say of each.

A name has one or more spellings, its own and its aliases; a spelling is written in four forms: with
underscores or spaces, and with a comma behind it or without.
"""

from collections.abc import Callable

import numpy as np

from training.config.run import PromptConfig
from training.curation.vocabulary import GENERAL, PEOPLE, Vocabulary
from training.prompts.ragged import offsets
from training.prompts.samples import Samples

WATERMARK = "watermark"
"""The tag of an image that has one."""
SHORT_TAG = 3
"""Tags of at most this many characters are faces (o_o, ^_^) and keep their underscore. Kohaku's
rule."""
NUM_FORMS = 4
SPACES, COMMA = 2, 1
"""Form `NUM_FORMS * spelling + SPACES * with_spaces + COMMA * with_comma`."""
PLACES = {PEOPLE: 0, "character": 1, "copyright": 2, "artist": 3}
"""Categories that stand before special and general tags in Kohaku's order."""
NUM_SCORES = 10


class Names:
    """Names by code: the tags of the set as the set counts them, then its words, the watermark and
    the score tags."""

    def __init__(self, samples: Samples, vocabulary: Vocabulary, config: PromptConfig) -> None:
        """Count the names of a set."""
        codes = {name: code for code, name in enumerate(samples.tag_names)}

        def code_of(name: str) -> int:
            return codes.setdefault(name, len(codes))

        self.of_words = np.array([code_of(word) for word in samples.word_names], dtype=np.int64)
        """Code of each of the set's words."""
        self.watermark = code_of(WATERMARK)
        up = [code_of(f"score_{step}_up") for step in range(1, NUM_SCORES)]
        exact = [code_of(f"score_{score}") for score in range(NUM_SCORES)]
        self.of_scores = np.array(
            [[*up[:score], exact[score], *up[score:]] for score in range(NUM_SCORES)]
        )
        """`(10, 10)`: the first score + 1 of row `score` are the score tags that an image of that
        score may have."""
        self.names = list(codes)
        """By code."""
        self.shared = np.zeros(len(self.names), dtype=np.bool_)
        """Of more than one source: an image may have it twice."""
        self.shared[
            [self.watermark, *self.of_words[self.of_words < len(samples.tag_names)].tolist()]
        ] = True
        place = [PLACES.get(vocabulary.category.get(name, GENERAL), -1) for name in self.names]
        self.place = np.array(place, dtype=np.int64)
        """In Kohaku's order; -1 of special and general tags."""
        self.first = np.full(len(self.names), -1)
        """Rank among the recipe's first tags, -1 of others."""
        first = [name for name in config.first_tags if name in codes]
        self.first[[codes[name] for name in first]] = np.arange(len(first))
        self.forced = self.first >= 0
        """Of the recipe's first tags, or of those that are always in."""
        self.forced[[codes[name] for name in config.always_tags if name in codes]] = True
        self.alphabetical = np.zeros(len(self.names), dtype=np.int64)
        """Rank by name, in recipes that put them so."""
        if config.order == "kohaku":
            self.alphabetical[sorted(range(len(self.names)), key=self.names.__getitem__)] = (
                np.arange(len(self.names))
            )
        others = [vocabulary.aliases.get(name, ()) for name in self.names]
        self.num_aliases = np.array([len(aliases) for aliases in others], dtype=np.int64)
        """Of each name."""
        self.first_alias = len(self.names) + offsets(self.num_aliases)[:-1]
        """The spelling that is a name's first alias; the others follow it."""
        self.spellings = [*self.names, *(alias for aliases in others for alias in aliases)]
        """Names as themselves, then the aliases."""
        self.spaced = self._each(lambda text: len(text) > SHORT_TAG and "_" in text)
        """Of a spelling: it can be written with spaces."""
        self.opens_word = self._each(opens_word)
        """Of a spelling: no token spans a comma and its beginning."""

    def _each(self, rule: Callable[[str], bool]) -> np.ndarray:
        return np.fromiter(map(rule, self.spellings), dtype=np.bool_, count=len(self.spellings))

    @property
    def num_forms(self) -> int:
        """Forms of all spellings."""
        return NUM_FORMS * len(self.spellings)

    def write(self, form: int) -> str:
        """A form as text."""
        text = self.spellings[form // NUM_FORMS]
        if form & SPACES:
            text = text.replace("_", " ")
        return text + "," if form & COMMA else text


def opens_word(text: str) -> bool:
    """Whether CLIP's pre-tokenizer begins a word at `text` when a comma stands before it."""
    return text[:1].isascii() and text[:1].isalnum()
