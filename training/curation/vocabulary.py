"""What a run knows of its tags, frozen beside it: each one's category and the other names that
people write for it.

The trainer makes prompts without the workspace's tables, also on another machine.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from training import commit, manifests
from training.curation.tags import LETTERBOXED, swap_sides
from training.errors import DamageError

GENERAL = "general"
PEOPLE = "people"
"""Category of general tags that count who is in the image: `1girl`, `6+boys`,
`multiple_others`."""
SPECIAL = "special"
"""Category of the words for quality, rating and date."""
_COUNTS = re.compile(r"\d\+?(girl|boy|other)s?|multiple_(girls|boys|others)|male_focus")
"""Source: HakuBooru, caption.py."""
_SCHEMA = pl.Schema(
    [("tag", pl.String()), ("category", pl.String()), ("aliases", pl.List(pl.String))]
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Categories and aliases of canonical tags; a tag that it lacks is general and has no alias."""

    category: Mapping[str, str] = field(default_factory=dict)
    """Canonical tag to its category: one of `tags.CATEGORIES`, `people` or `special`."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Canonical tag to other names of it, sorted; tags without any are absent."""


def from_tables(
    tag_vocabulary: pl.DataFrame, tags: Iterable[str], words: Iterable[str]
) -> Vocabulary:
    """What a workspace's table says of the tags and words of a training set.

    A tag that the table lacks was turned with its mirrored image: it is of the category of its
    other side.

    Args:
        tag_vocabulary: Columns tag, category, aliases.
        tags: Every tag of the set, `Samples.tag_names`.
        words: Every word of the set, `Samples.word_names`.
    """
    rows = tag_vocabulary.select("tag", "category", "aliases").iter_rows()
    known = {tag: (kind, names) for tag, kind, names in rows}
    category: dict[str, str] = dict.fromkeys(words, SPECIAL)
    aliases: dict[str, tuple[str, ...]] = {}
    for tag in tags:
        kind, names = known.get(tag, (None, ()))
        kind = kind or (
            "meta" if tag == LETTERBOXED else known.get(swap_sides(tag), (GENERAL, ()))[0]
        )
        category[tag] = place_of(tag, kind)
        if names:
            aliases[tag] = tuple(sorted(names))
    return Vocabulary(category, aliases)


def place_of(tag: str, category: str) -> str:
    """The category by which a tag is placed in a prompt: its own, or `people`."""
    return PEOPLE if category == GENERAL and _COUNTS.fullmatch(tag) else category


def write(path: Path, vocabulary: Vocabulary) -> str:
    """Write a vocabulary as Parquet; returns the SHA-256 of the file, which equal vocabularies
    share."""
    rows = [
        (tag, kind, list(vocabulary.aliases.get(tag, ())))
        for tag, kind in sorted(vocabulary.category.items())
    ]
    with commit.atomic_file(path) as temporary:
        pl.DataFrame(rows, _SCHEMA, orient="row").write_parquet(temporary, compression="zstd")
    return commit.sha256_file(path)


def read(path: Path, sha256: str) -> Vocabulary:
    """Read what `write` wrote.

    Raises:
        DamageError: the file is gone or is not the one that was written.
    """
    found = commit.sha256_file(path) if path.is_file() else "no such file"
    if found != sha256:
        raise DamageError(
            f"vocabulary {path}: {found[:16]}, inputs.json says SHA-256 {sha256[:16]}"
        )
    rows = manifests.read_parquet(path).iter_rows()
    category: dict[str, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for tag, kind, names in rows:
        category[tag] = kind
        if names:
            aliases[tag] = tuple(names)
    return Vocabulary(category, aliases)
