"""What the small files beside a picture say about it: kohya's `.txt` and `.caption`, and `.json`.

A sidecar that cannot be used costs its content and a line in the report, never the listing.
"""

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.data.geometry import Box
from training.data.tags import CATEGORIES, canonical

SUFFIXES = (".txt", ".caption", ".json")
"""Read in this order; what a later one says of caption replaces what an earlier one said."""
MAX_BYTES = 1_000_000
"""Largest sidecar that is read, bytes."""

_RATINGS = {
    **{name: name for name in ("general", "sensitive", "questionable", "explicit")},
    **{"g": "general", "safe": "general", "s": "sensitive", "q": "questionable", "e": "explicit"},
}
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


def read(paths: list[Path], metadata: Metadata) -> list[str]:
    """Fill `metadata` from sidecars.

    Args:
        paths: Existing sidecars of one picture, in the order of `SUFFIXES`.
        metadata: Filled in place.

    Returns:
        What was wrong, one line each; all the rest was taken.
    """
    problems: list[str] = []
    for path in paths:
        try:
            text = _text(path)
            if path.suffix == ".json":
                problems += _take_json(text, metadata)
            else:
                _take_text(text, metadata)
        except RecursionError:
            problems.append(f"sidecar {path.suffix}: nested too deeply")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problems.append(f"sidecar {path.suffix}: {' '.join(str(reason).split())[:120]}")
    return problems


def _text(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def reads_as_sentence(text: str) -> bool:
    """Whether a text sidecar is a caption and not a list of tags.

    It is one when it holds no underscore and one of its comma-separated parts has more than five words, or its
    last part has at least three words and ends in a full stop, question or exclamation mark, or its first part
    has at least three words and begins with an article.
    """
    if "_" in text:
        return False
    parts = [words for part in text.replace("\n", ",").split(",") if (words := part.split())]
    if not parts:
        return False
    ends = len(parts[-1]) >= 3 and parts[-1][-1].endswith((".", "?", "!"))
    begins = len(parts[0]) >= 3 and parts[0][0].lower() in {"a", "an", "the"}
    return ends or begins or max(map(len, parts)) > 5


def _take_text(text: str, metadata: Metadata) -> None:
    if reads_as_sentence(text):
        metadata.caption = text.strip()
    else:
        for name in text.replace("\n", ",").split(","):
            metadata.add_tag(name)


def _take_json(text: str, metadata: Metadata) -> list[str]:
    """Take each key that is well-formed; say which were not."""
    content = json.loads(text, parse_constant=_no_constant)
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
            problems.append(f"sidecar .json: {key} {error}")
    return problems + _take_tags(content.get("tags"), metadata)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _take_tags(value: object, metadata: Metadata) -> list[str]:
    """Tags as a list, a comma-separated string, or either of them by category."""
    groups = value.items() if isinstance(value, dict) else [("general", value)]
    problems = []
    for category, listed in groups:
        names = listed.split(",") if isinstance(listed, str) else listed or []
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_unicode(name) for name in names):
            problems.append("sidecar .json: tags must be strings of valid Unicode")
            continue
        for name in names:
            metadata.add_tag(name, category if category in CATEGORIES else "general")
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
    return value.strip() or None


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
