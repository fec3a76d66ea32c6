"""Whether a line of words is a sentence or a list of tags, and which tags a list holds."""

import re

_SEPARATORS = re.compile("[,\uff0c\u3001\uff64\u060c]")
"""Commas: ASCII, full-width, ideographic, half-width ideographic, Arabic."""
_UNDERSCORED = re.compile(r"(?=\S*[^\W_]{2})\S*[^\W_]_+\S*[^\W_]\S*")
"""A word that an underscore joins, such as `long_hair` or `saber_(fate)`; `^_^` and `o_o` are
none."""
_COUNT = re.compile(r"\d\+?(girl|boy|other)s?", re.IGNORECASE)
"""How boorus count people, such as `1girl` and `6+boys`."""
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Kana and Han characters: written without spaces, about two to a word."""
_NARROW = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Thai, Lao, Burmese and Khmer letters: written without spaces, about four to a word."""
_FULL_STOP = ("\u3002", "\uff0e", "\uff61", "\u0964")
"""Full stops that no tag ends in: ideographic, full-width, half-width, Devanagari."""
_ENDS = (".", "?", "!", "\uff1f", "\uff01", "\u061f", "\u06d4", *_FULL_STOP)
_ARTICLES = frozenset(("a", "an", "the"))
_JOINING = _ARTICLES | {
    "of",
    "in",
    "on",
    "at",
    "with",
    "and",
    "is",
    "are",
    "to",
    "for",
    "from",
    "by",
    "his",
    "her",
    "its",
}
"""Words that sentences hold and lists of tags between spaces do not."""
_MANY = 6
"""Parts that make a list of short ones one of tags, though one of them is long."""


def reads_as_sentence(line: str) -> bool:
    """Whether a line is a caption and not a list of tags.

    It is one when one of its comma-separated parts has more than five words, or its last part has
    at least three and ends in a full stop, question or exclamation mark, or its first part has at
    least three and begins with an article. It is none when it is a list of tags between spaces;
    when it has six parts or more, does not end like a sentence, and three of four parts have at
    most three words; or when a part of it is one word joined by underscores and none has more than
    five. An underscore inside of a longer part proves nothing. In languages without spaces, words
    are estimated from the number of letters.
    """
    parts = [part for part in map(str.strip, _SEPARATORS.split(line)) if part]
    if not parts or _between_spaces(line):
        return False
    counts = [_num_words(part) for part in parts]
    ends = parts[-1].endswith(_ENDS)
    if (
        len(parts) >= _MANY
        and not ends
        and sum(count <= 3 for count in counts) >= 0.75 * len(parts)
    ):
        return False
    if max(counts) > 5 or parts[-1].endswith(_FULL_STOP):
        return True
    if any(_UNDERSCORED.fullmatch(part) for part in parts):
        return False
    begins = counts[0] >= 3 and parts[0].split()[0].lower() in _ARTICLES
    return begins or (ends and counts[-1] >= 3)


def split_tags(line: str) -> list[str]:
    """The tags of a list: parted by commas, lines, or, where words are joined by underscores, by
    spaces."""
    names: list[str] = []
    for part in line.split("\n"):
        names += (
            part.split()
            if _between_spaces(part)
            else [name.strip() for name in _SEPARATORS.split(part)]
        )
    if names and names[-1].endswith(".") and _num_words(names[-1]) > 1:
        names[-1] = names[-1].rstrip(".")
    return [name for name in names if name]


def _between_spaces(line: str) -> bool:
    """Whether a line is a list as boorus write it: no commas, words that only tags have, none that
    sentences have."""
    words = line.split()
    if (
        len(words) < 2
        or _SEPARATORS.search(line)
        or any(word.lower() in _JOINING for word in words)
    ):
        return False
    marks = sum(bool(_UNDERSCORED.fullmatch(word) or _COUNT.fullmatch(word)) for word in words)
    return marks >= 2 or 2 * marks >= len(words)


def _num_words(part: str) -> float:
    """Words of a part; estimated where they are not parted by spaces."""
    wide, narrow = len(_WIDE.findall(part)), len(_NARROW.findall(part))
    if not wide and not narrow:
        return len(part.split())
    rest = _NARROW.sub(" ", _WIDE.sub(" ", part))
    return wide / 2 + narrow / 4 + sum(any(map(str.isalnum, word)) for word in rest.split())
