"""From what sources and taggers say to canonical tags."""

import re
import unicodedata

CATEGORIES = ("general", "artist", "character", "copyright", "meta", "rating")
"""Every tag is in one of these; names, never numbers, because booru dumps number them differently."""

_ESCAPED = re.compile(r"\\([()])")


def canonical(name: str) -> str:
    """The one spelling of a tag: NFC, lower case, runs of white space as one underscore, `\\(` as `(`.

    Empty when nothing is left.
    """
    text = _ESCAPED.sub(r"\1", unicodedata.normalize("NFC", name)).lower()
    return "_".join(text.split()).strip("_") if text.strip(" _") else ""
