"""What the small files beside an image say about it: kohya's `.txt` and `.caption`, and `.json`.

A sidecar that cannot be used costs its content and a row in `rejected_images`, never the listing.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from training.buckets.geometry import Box
from training.curation.tags import CATEGORIES, canonical
from training.sources import wording

SUFFIXES = (".txt", ".caption", ".json")
"""Read in this order; what a later one says of caption replaces what an earlier one said."""
MAX_BYTES = 1_000_000
"""Largest sidecar that is read, bytes."""
Words = Literal["auto", "tags", "captions"]
"""What text sidecars hold: judged line by line (`.caption` is prose), or always the one or the
other."""

_RATINGS = {
    **{name: name for name in ("general", "sensitive", "questionable", "explicit")},
    **{"g": "general", "safe": "general", "s": "sensitive", "q": "questionable", "e": "explicit"},
}
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_OTHER_ALPHABET = re.compile("[^\x00-\x7f]{3}")
_INT64_MAX = 2**63 - 1


@dataclass(slots=True)
class Metadata:
    """What a source knows of one candidate."""

    tags: dict[str, str] = field(default_factory=dict)
    """Canonical name to category."""
    rating: str | None = None
    favourites: int | None = None
    created_at: datetime | None = None
    caption: str | None = None
    split: str | None = None
    crop_box: Box | None = None

    def add_tag(self, name: str, category: str = "general") -> None:
        """Take up a tag; a special category wins over `general`."""
        name = canonical(name)
        if name and self.tags.get(name, "general") == "general":
            self.tags[name] = category


class Flaw(NamedTuple):
    """Something in a sidecar that was not used."""

    path: Path
    reason: str
    """A value of `tables.Reason`."""
    detail: str
    """One line."""


def read(paths: list[Path], metadata: Metadata, words: Words = "auto") -> list[Flaw]:
    """Fill `metadata` from sidecars.

    Args:
        paths: Existing sidecars of one image, in the order of `SUFFIXES`. Links are not followed.
        metadata: Filled in place.
        words: What text files hold.

    Returns:
        What was wrong; all the rest was taken.
    """
    flaws: list[Flaw] = []
    for path in paths:
        suffix = path.suffix.lower()
        try:
            text = _text(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                reason = "a link that leads out of the source, or nowhere, is not followed"
            flaws.append(Flaw(path, "sidecar_unreadable", " ".join(str(reason).split())[:120]))
            continue
        try:
            if suffix == ".json":
                flaws += [
                    Flaw(path, "sidecar_malformed", problem)
                    for problem in _take_json(text, metadata)
                ]
            else:
                _take_text(
                    text,
                    metadata,
                    "captions" if suffix == ".caption" and words == "auto" else words,
                )
        except RecursionError:
            flaws.append(Flaw(path, "sidecar_malformed", "nested too deeply"))
        except ValueError as error:
            flaws.append(Flaw(path, "sidecar_malformed", " ".join(str(error).split())[:120]))
    return flaws


def _text(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return clean(decode(data))


def decode(data: bytes) -> str:
    """Text in UTF-8, in UTF-16 by its byte order mark or its zeros, or in Windows-1252 where that
    can be told.

    Windows-1252 is believed when no more than two bytes beyond ASCII stand together: longer runs
    are of another alphabet, and reading them would make up words.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return data.decode(_utf16(data) or "utf-8-sig")
    except UnicodeDecodeError as error:
        unusable = ValueError(
            f"not {error.encoding.upper()} at byte {error.start}, and no other encoding that is known"
        )
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise unusable from None
    if _OTHER_ALPHABET.search(text) or _CONTROL.search(text):
        raise unusable
    return text


def _utf16(data: bytes) -> str | None:
    """The kind of UTF-16 that the bytes are in; None for another encoding."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    high, low = data[::2], data[1::2]
    for zeros, others, encoding in ((low, high, "utf-16-le"), (high, low, "utf-16-be")):
        if zeros.count(0) > len(zeros) / 2 and 0 not in others:
            return encoding
    return None


def clean(text: str) -> str:
    """`text` with one kind of line end, and without control characters and byte order marks."""
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def _take_text(text: str, metadata: Metadata, words: Words) -> None:
    """Each line is a caption or a list of tags, by itself."""
    sentences = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        if words == "captions" or (words == "auto" and wording.reads_as_sentence(line)):
            sentences.append(line)
        else:
            for name in wording.split_tags(line):
                metadata.add_tag(name)
    if sentences:
        metadata.caption = "\n".join(sentences)


def _take_json(text: str, metadata: Metadata) -> list[str]:
    """Take each key that is well-formed; say which were not."""
    content = json.loads(text, parse_constant=_no_constant, strict=False)
    if not isinstance(content, dict):
        raise ValueError(f"must hold an object, holds {type(content).__name__}")
    takers: dict[str, Callable[[Any], object]] = {
        "rating": _rating,
        "favourites": _count,
        "fav_count": _count,
        "created_at": _time,
        "caption": _caption,
        "split": _split,
        "crop_box": _box,
    }
    problems = []
    for key, take in takers.items():
        if (value := content.get(key)) is None:
            continue
        try:
            setattr(metadata, "favourites" if key == "fav_count" else key, take(value))
        except ValueError as error:
            problems.append(f"{key} {error}")
    return (
        problems + _take_tags(content.get("tags"), metadata) + _take_tag_strings(content, metadata)
    )


def _take_tag_strings(content: dict[str, Any], metadata: Metadata) -> list[str]:
    """Tags as boorus' own records have them: names parted by spaces in `tag_string` and
    `tag_string_CATEGORY`."""
    problems = []
    for key in ("tag_string", *(f"tag_string_{category}" for category in CATEGORIES)):
        value = content.get(key)
        if isinstance(value, str) and _is_unicode(value):
            for name in clean(value).split():
                metadata.add_tag(
                    name, key.removeprefix("tag_string_") if key != "tag_string" else "general"
                )
        elif value is not None:
            problems.append(f"{key} must be a string of valid Unicode")
    return problems


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _take_tags(value: object, metadata: Metadata) -> list[str]:
    """Tags as a list, a string, or either of them by category."""
    groups = value.items() if isinstance(value, dict) else [("general", value)]
    problems = []
    for category, listed in groups:
        names = wording.split_tags(listed) if isinstance(listed, str) else listed or []
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _is_unicode(name) for name in names
        ):
            problems.append("tags must be strings of valid Unicode")
            continue
        for name in names:
            metadata.add_tag(clean(name), category if category in CATEGORIES else "general")
    return problems


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _rating(value: object) -> str:
    if not isinstance(value, str) or value.lower() not in _RATINGS:
        raise ValueError(f"must be one of {sorted(_RATINGS)}")
    return _RATINGS[value.lower()]


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INT64_MAX:
        raise ValueError("must be a whole number from 0")
    return value


def _time(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError("must be an ISO 8601 string")
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be an ISO 8601 string") from None


def _caption(value: object) -> str | None:
    if not isinstance(value, str) or not _is_unicode(value):
        raise ValueError("must be a string of valid Unicode")
    return clean(value).strip() or None


def _split(value: object) -> str:
    if value not in ("train", "validation"):
        raise ValueError("must be train or validation")
    return str(value)


def _box(value: object) -> Box:
    names = ("y0", "x0", "y1", "x1")
    if isinstance(value, dict):
        value = [value.get(name) for name in names]
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError("must be [y0, x0, y1, x1]")
    if any(isinstance(side, bool) or not isinstance(side, int | float) for side in value):
        raise ValueError("must hold four numbers")
    try:
        box = Box(*(float(side) for side in value))
    except OverflowError:
        raise ValueError("must hold four finite numbers") from None
    if not all(map(math.isfinite, box)) or not (0 <= box.y0 < box.y1 and 0 <= box.x0 < box.x1):
        raise ValueError("must be a box with 0 <= y0 < y1 and 0 <= x0 < x1")
    return box
