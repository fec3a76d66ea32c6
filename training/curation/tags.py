"""From what sources and taggers say to canonical tags: one spelling, aliases resolved, a vocabulary
counted."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from training.errors import DataError
from training.tables.schemas import TABLES

CATEGORIES = ("general", "artist", "character", "copyright", "meta", "rating")
"""Every tag is in one of these; names, never numbers, because booru dumps number them
differently."""

_NUMBERS = {
    "0": "general",
    "1": "artist",
    "3": "copyright",
    "4": "character",
    "5": "meta",
    "9": "rating",
}
"""Danbooru's API numbers, as tagcomplete's CSV and the WD taggers' use them."""
LETTERBOXED = "letterboxed"
"""Tag of a sample with padding, so that a prompt can ask for none."""

_OTHER_SIDE = {
    "left": "right",
    "right": "left",
    "Left": "Right",
    "Right": "Left",
    "LEFT": "RIGHT",
    "RIGHT": "LEFT",
}
_SIDE = re.compile(rf"(?<![a-zA-Z])({'|'.join(_OTHER_SIDE)})(?![a-zA-Z])")
_ESCAPED = re.compile(r"\\+([()])")
_MAX_FIELD_BYTES = 10_000_000


def canonical(name: str) -> str:
    """The one spelling of a tag: NFC, lower case, runs of white space as one underscore, `\\(` as
    `(`.

    Empty when nothing but white space and underscores is there.
    """
    text = unicodedata.normalize("NFC", _ESCAPED.sub(r"\1", name).lower())
    return "_".join(text.split()) if text.strip("_ \t\n\r") else ""


def swap_sides(text: str) -> str:
    """`text` with the words left and right exchanged, their capitals kept; `_` parts words as a
    space does."""
    return _SIDE.sub(lambda match: _OTHER_SIDE[match[0]], text)


@dataclass(frozen=True, slots=True)
class Aliases:
    """Names that mean a tag, and the tags' categories. Every target is a tag of the table and no
    alias itself."""

    to_tag: Mapping[str, str] = field(default_factory=dict)
    """Canonical alias to canonical tag."""
    category: Mapping[str, str] = field(default_factory=dict)
    """Category of each tag of the table."""
    problems: Mapping[str, int] = field(default_factory=dict)
    """How many entries were dropped, by rule."""


def load_aliases(path: Path) -> Aliases:
    """Read an alias table: CSV without a header, `name,category,count,"alias1,alias2"`.

    Entries are dropped, and counted, in this order: `malformed` (a row without name and known
    category, of a name seen before, or with an oversized field), `shortcut` (begins with a slash),
    `self` (means itself), `cycle` (two tags that are each other's alias), `chain` (a tag that has
    aliases of its own), `is_tag` (any other tag: a name with a row of its own stays itself),
    `ambiguous` (would mean several tags). So every alias resolves in one step and none is guessed.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.

    Source: the layout of a1111-sd-webui-tagcomplete's danbooru.csv.
    """
    problems: Counter[str] = Counter()
    category: dict[str, str] = {}
    links: list[tuple[str, str]] = []  # (alias, tag)
    for row in _rows(path, problems):
        name = canonical(row[0]) if row else ""
        kind = _NUMBERS.get(row[1].strip(), row[1].strip().lower()) if len(row) > 1 else ""
        if not name or name in category or kind not in CATEGORIES:
            problems["malformed"] += 1
            continue
        category[name] = kind
        listed = row[3].split(",") if len(row) > 3 else []
        links += [(alias, name) for text in listed if (alias := canonical(text))]
    return Aliases(
        _keep_links(sorted(set(links)), category, problems),
        category,
        dict(sorted(problems.items())),
    )


def _rows(path: Path, problems: Counter[str]) -> Iterable[list[str]]:
    """Rows of a CSV; one that the parser refuses is counted and the next ones are read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"alias table {path}: {error.strerror}; tags.aliases must name a CSV file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"alias table {path}: not UTF-8 at byte {error.start}") from None
    limit = csv.field_size_limit(_MAX_FIELD_BYTES)
    try:
        for line in (
            text.splitlines()
        ):  # Line by line: no tag holds a line break, and an open quote ends here.
            try:
                yield from csv.reader([line])
            except csv.Error:
                problems["malformed"] += 1
    finally:
        csv.field_size_limit(limit)


def _keep_links(
    links: Sequence[tuple[str, str]], category: Mapping[str, str], problems: Counter[str]
) -> dict[str, str]:
    """Drop and count what cannot be resolved in one step; see `load_aliases`."""
    pairs = set(links)
    has_aliases = {tag for _, tag in links}
    targets = Counter(alias for alias, _ in links)
    kept = {}
    for alias, tag in links:
        if alias.startswith("/"):
            problems["shortcut"] += 1
        elif alias == tag:
            problems["self"] += 1
        elif (tag, alias) in pairs:
            problems["cycle"] += 1
        elif alias in category:
            problems["chain" if alias in has_aliases else "is_tag"] += 1
        elif targets[alias] > 1:
            problems["ambiguous"] += 1
        else:
            kept[alias] = tag
    return kept


def resolve(
    source_tags: Iterable[Mapping[str, str]],
    tagger_tags: Iterable[Mapping[str, Any]],
    *,
    threshold: float,
    aliases: Aliases,
    blacklist: Iterable[str] = (),
) -> list[dict[str, str]]:
    """One image's canonical tags, sorted by name; `resolve_all` of one row.

    Args:
        source_tags: Rows of TAG (name, category).
        tagger_tags: Rows of SCORED_TAG (name, probability).
        threshold: Probability from which a tagger's tag counts.
        aliases: Alias table.
        blacklist: Canonical tags that are dropped.
    """
    schema = TABLES["source_listing"].schema["tags"], TABLES["tags"].schema["tags"]
    source = pl.DataFrame(
        {"image_id": [""], "tags": [list(source_tags)]}, {"image_id": pl.String, "tags": schema[0]}
    )
    tagger = pl.DataFrame(
        {"image_id": [""], "tags": [list(tagger_tags)]}, {"image_id": pl.String, "tags": schema[1]}
    )
    found = resolve_all(source, tagger, threshold=threshold, aliases=aliases, blacklist=blacklist)
    return [] if found.is_empty() else found["tags"][0].to_list()


def resolve_all(
    source_tags: pl.DataFrame,
    tagger_tags: pl.DataFrame,
    *,
    threshold: float,
    aliases: Aliases,
    blacklist: Iterable[str] = (),
) -> pl.DataFrame:
    """Canonical tags of all images, from sources and taggers together.

    A tag is named by its canonical spelling and its aliases' tag. Its category is what a source
    says, unless that is `general`; else the alias table's; else `general`.

    Args:
        source_tags: Columns image_id, tags (List(TAG)); an image may have several rows, or none.
        tagger_tags: Columns image_id, tags (List(SCORED_TAG)); the same.
        threshold: Probability from which a tagger's tag counts.
        aliases: Alias table.
        blacklist: Canonical tags that are dropped.

    Returns:
        Columns image_id, tags (List(TAG), sorted by name); images without any tag are absent.
    """
    long = _long(source_tags, tagger_tags, threshold, aliases, blacklist)
    tag = pl.struct("name", "category")
    return long.group_by("image_id").agg(tags=tag.sort_by("name")).sort("image_id")


def _long(
    source_tags: pl.DataFrame,
    tagger_tags: pl.DataFrame,
    threshold: float,
    aliases: Aliases,
    blacklist: Iterable[str],
) -> pl.DataFrame:
    """One row per image and tag: image_id, name, category, by_source, by_tagger."""
    source = (
        source_tags.select("image_id", "tags").explode("tags").drop_nulls("tags").unnest("tags")
    )
    tagger = (
        tagger_tags.select("image_id", "tags").explode("tags").drop_nulls("tags").unnest("tags")
    )
    tagger = tagger.filter(pl.col("probability") >= threshold)
    both = pl.concat(
        [
            source.select("image_id", "name", "category", by_source=True),
            tagger.select("image_id", "name", category=pl.lit("general"), by_source=False),
        ]
    )
    spelled = _spelling(both["name"].unique().drop_nulls(), aliases, set(blacklist))
    both = both.join(spelled, on="name").drop("name").rename({"tag": "name"})
    special = pl.col("category").filter(
        pl.col("category").is_in(CATEGORIES) & (pl.col("category") != "general")
    )
    merged = both.group_by("image_id", "name").agg(
        special.min().alias("said"),
        pl.col("by_table").first(),
        pl.col("by_source").any(),
        by_tagger=(~pl.col("by_source")).any(),
    )
    category = pl.coalesce("said", "by_table", pl.lit("general"))
    return merged.select("image_id", "name", "by_source", "by_tagger", category=category)


def _spelling(names: pl.Series, aliases: Aliases, blacklist: set[str]) -> pl.DataFrame:
    """Columns name (as found), tag (canonical, resolved), by_table (category or null); dropped
    names are absent."""
    rows = []
    for name in names:
        tag = canonical(name)
        tag = aliases.to_tag.get(tag, tag)
        if tag and tag not in blacklist:
            rows.append((name, tag, aliases.category.get(tag)))
    return pl.DataFrame(
        rows, {"name": pl.String, "tag": pl.String, "by_table": pl.String}, orient="row"
    )


def vocabulary(
    source_tags: pl.DataFrame,
    tagger_tags: pl.DataFrame,
    *,
    threshold: float,
    aliases: Aliases,
    blacklist: Iterable[str] = (),
    pieces: Callable[[list[str]], Sequence[Sequence[str]]] | None = None,
) -> pl.DataFrame:
    """Count every tag over all images.

    Args:
        source_tags: As `resolve_all`.
        tagger_tags: As `resolve_all`.
        threshold: As `resolve_all`.
        aliases: As `resolve_all`.
        blacklist: As `resolve_all`.
        pieces: What a tokenizer makes of each tag, all at once; None leaves the column null.

    Returns:
        `tag_vocabulary`. A tag's category is the one that most of its images say; the first by name
        on a tie.
    """
    long = _long(source_tags, tagger_tags, threshold, aliases, blacklist)
    counted = long.group_by("name").agg(
        num_images=pl.len().cast(pl.Int64),
        num_source=pl.col("by_source").sum().cast(pl.Int64),
        num_tagger=pl.col("by_tagger").sum().cast(pl.Int64),
        category=pl.col("category").mode().min(),
    )
    counted = counted.sort("name").rename({"name": "tag"})
    tags = counted["tag"].to_list()
    names: dict[str, list[str]] = {}
    for alias, tag in sorted(aliases.to_tag.items()):
        names.setdefault(tag, []).append(alias)
    cut = [None] * len(tags) if pieces is None else [list(words) for words in pieces(tags)]
    table = TABLES["tag_vocabulary"]
    counted = counted.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int32).alias("tag_id"),
        pl.Series("aliases", [names.get(tag, []) for tag in tags], dtype=pl.List(pl.String)),
        pl.Series("pieces", cut, dtype=pl.List(pl.String)),
    )
    return table.conform(counted.select(list(table.columns)))
