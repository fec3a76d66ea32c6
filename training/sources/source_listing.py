"""Which candidates a source holds, in a stable order, and which shard each of them belongs to for
ever.

What looks like an image by its name is a candidate; whether it is one is decided by its bytes, in
`images`.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from training.errors import DataError
from training.sources import folder_walk, sidecars
from training.sources.folder_walk import Found, is_inside
from training.tables.schemas import TABLES, Reason

if TYPE_CHECKING:
    from training.config.workspace import SourceConfig

_LISTED = tuple(
    name for name in TABLES["source_listing"].columns if name not in ("shard", "gone_at")
)
_EXAMPLES = 3
_UNUSED_WORDS = {
    Reason.SIDECAR_UNMATCHED: "sidecars without an image of their name",
    Reason.SIDECAR_UNREADABLE: "sidecars that cannot be read",
    Reason.SIDECAR_MALFORMED: "sidecars that are used in part, or hold nothing that is known",
    Reason.UNREADABLE: "folders and files that cannot be looked at",
}
_ROWS = 50_000
"""Rows held as Python objects at a time."""
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")


class Problem(NamedTuple):
    """Something beside or around the candidates that was not used."""

    path: str
    """The sidecar or folder, relative to the root."""
    reason: str
    """A value of `tables.Reason`."""
    source_id: str
    """The candidate that it belongs to, which goes on; empty for none."""
    detail: str
    """One line."""


def locate(root: Path, locator: str) -> Path:
    """The file that a locator of this folder means.

    Raises:
        DataError: a locator that leads out of the folder.
    """
    name = b"".join(
        bytes([int(part, 16)]) if position % 2 else part.encode()
        for position, part in enumerate(_ESCAPE.split(locator))
    )
    parts = name.split(b"/")
    if not name or b"\0" in name or any(part in (b"", b".", b"..") for part in parts):
        raise DataError(f"locator {locator!r} must be a path inside its folder")
    return root / os.fsdecode(name)


def readable(root: Path, locator: str) -> Path:
    """Where the bytes of a candidate are read: its links resolved, as long as they stay inside the
    folder.

    Of a path that leads out, the link that does is returned, and `images.read_file` refuses it, as
    it does a link to no file.
    """
    path, top = locate(root, locator), os.fsencode(os.path.realpath(root))
    real = os.path.realpath(path)
    if is_inside(os.fsencode(real), top):
        return Path(real) if os.path.isfile(real) or not os.path.islink(path) else path
    above = [
        folder
        for folder in reversed(path.parents)
        if folder.is_relative_to(root) and folder != root
    ]
    leads_out = (at for at in above if not is_inside(os.fsencode(os.path.realpath(at)), top))
    return next(leads_out, path)


def encode_name(name: bytes) -> str:
    """A path as clean printable text: bytes that are not are percent-encoded, and so is a percent
    sign that would read as an encoded byte. `locate` turns it back; different paths give different
    texts.
    """
    text = name.decode("utf-8", "surrogateescape")
    clean = []
    for position, character in enumerate(text):
        escaped = character == "%" and _ESCAPE.match(text, position)
        if character.isprintable() and not escaped:
            clean.append(character)
        else:
            clean += [f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape")]
    return "".join(clean)


def scan_digest(source: "SourceConfig", root: Path) -> str:
    """SHA-256 over names, sizes, times and inodes of all candidates and sidecars, and the source's
    settings.

    It changes whenever `list_folder` could give another result, and reads no file.

    Raises:
        DataError: the folder is missing.
    """
    candidates, problems = _walk(source, root)
    hasher = hashlib.sha256(repr((source.name, source.tags, source.words)).encode())
    for found in candidates:
        for name, status, *_ in ((found.name, found.status), *found.sidecars):
            hasher.update(repr((name, *status)).encode())
    hasher.update(repr(sorted(problems)).encode())
    return hasher.hexdigest()


def list_folder(source: "SourceConfig", root: Path) -> tuple[pl.DataFrame, list[Problem]]:
    """All candidates below a folder (see `folder_walk.walk`) with what their sidecars say.

    Returns: `source_listing` without shard and gone_at, ordered by the bytes of the relative path;
        and what was not used of sidecars and folders.

    Raises:
        DataError: the folder is missing.
    """
    schema = {name: TABLES["source_listing"].schema[name] for name in _LISTED}
    frames = [pl.DataFrame(schema=schema)]
    candidates, problems = _walk(source, root)
    for start in range(0, len(candidates), _ROWS):
        rows = [_row(source, found, problems) for found in candidates[start : start + _ROWS]]
        frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
    return pl.concat(frames), sorted(problems)


def _walk(source: "SourceConfig", root: Path) -> tuple[list[Found], list[Problem]]:
    """Candidates by name, and what is of none."""
    if not root.is_dir():
        raise DataError(
            f"source {source.name!r}: folder {root} is missing; sources.path must name a folder"
        )
    candidates, problems = [], []
    for item in folder_walk.walk(root):
        if isinstance(item, Found):
            candidates.append(item)
        else:
            problems.append(Problem(encode_name(item.name), item.reason, "", item.detail))
    return sorted(candidates), problems


def _row(source: "SourceConfig", found: Found, problems: list[Problem]) -> dict[str, object]:
    """One candidate with its metadata as a row of the listing."""
    source_id = encode_name(found.name)
    metadata = sidecars.Metadata()
    for tag in source.tags:
        metadata.add_tag(tag)
    names = {Path(os.fsdecode(path)): name for name, _, path in found.sidecars}
    for flaw in sidecars.read(list(names), metadata, source.words):
        problems.append(Problem(encode_name(names[flaw.path]), flaw.reason, source_id, flaw.detail))
    return {
        "source": source.name,
        "source_id": source_id,
        "locator": source_id,
        "bytes": found.status.bytes,
        "modified_ns": found.status.modified_ns,
        "tags": [{"name": name, "category": metadata.tags[name]} for name in sorted(metadata.tags)],
        "rating": metadata.rating,
        "favourites": metadata.favourites,
        "created_at": metadata.created_at,
        "caption": metadata.caption,
        "split": metadata.split,
        "crop_box": metadata.crop_box and metadata.crop_box._asdict(),
    }


def rejection(source: str, problem: Problem) -> dict[str, object]:
    """What was not used as a row of `rejected_images`."""
    return {
        "source": source, "source_id": problem.source_id or None, "reason": problem.reason, "value": problem.path,
        "detail": problem.detail,
    }  # fmt: skip


def num_with_words(listed: pl.DataFrame, sources: Sequence["SourceConfig"]) -> int:
    """How many candidates have a caption, or a tag that is not their source's."""
    count = 0
    for source in sources:
        given = sidecars.Metadata()
        for tag in source.tags:
            given.add_tag(tag)
        own = pl.col("tags").list.len() > len(given.tags)
        count += listed.filter(
            pl.col("source") == source.name, own | pl.col("caption").is_not_null()
        ).height
    return count


def notes(num_candidates: int, num_with_words: int, unused: pl.DataFrame) -> list[str]:
    """What a listing says to whoever started it: how many images have words, and which words were
    not used.

    Args:
        num_candidates: Files that are there now.
        num_with_words: Those of them with words.
        unused: The listing's rows of `rejected_images`.
    """
    lines = [
        f"words: {num_with_words} of {num_candidates} image files have tags or a caption beside them"
    ]
    for reason, what in _UNUSED_WORDS.items():
        rows = unused.filter(pl.col("reason") == reason)
        if rows.height:
            examples = "; ".join(
                f"{row['value']}: {row['detail']}" if row["source_id"] else str(row["value"])
                for row in rows.head(_EXAMPLES).iter_rows(named=True)
            )
            lines.append(f"{what}: {rows.height}, such as {examples}")
    if unused.height:
        lines.append(
            "see them with `foundry sql \"from rejected_images where stage = 'source_listing'\"`"
        )
    return lines


def merge_listing(
    previous: pl.DataFrame, found: pl.DataFrame, *, shard_size: int, now: datetime
) -> pl.DataFrame:
    """The next `source_listing`: it only grows.

    Args:
        previous: `source_listing` so far; may be empty.
        found: What is there now, all sources, without shard and gone_at, in the order of listing.
        shard_size: Candidates in a shard at most.
        now: Time of the listing, UTC: set where a candidate is missed for the first time.

    Returns: `source_listing`. A candidate keeps its shard. New ones fill their source's last shard,
        then open the next; shards are numbered over all sources and hold one source each.
    """
    table = TABLES["source_listing"]
    key = list(table.key)
    known = previous.select(*key, "shard")
    present = found.join(known, on=key, how="left", maintain_order="left")
    new = present.filter(pl.col("shard").is_null()).drop("shard")
    new = new.with_columns(_new_shards(previous, new, shard_size))
    gone = previous.join(found.select(key), on=key, how="anti")
    gone = gone.with_columns(
        pl.col("gone_at").fill_null(pl.lit(now, dtype=table.schema["gone_at"]))
    )
    here = pl.concat([present.filter(pl.col("shard").is_not_null()), new])
    here = here.with_columns(gone_at=pl.lit(None, dtype=table.schema["gone_at"]))
    return table.conform(pl.concat([here.select(list(table.columns)), gone]))


def _new_shards(previous: pl.DataFrame, new: pl.DataFrame, shard_size: int) -> pl.Series:
    """A shard for each new candidate, in order."""
    sizes = previous.group_by("source", "shard").len()
    fill: dict[str, tuple[int, int]] = {}  # source -> its last shard and how many it holds
    for source, shard, size in sizes.iter_rows():
        fill[source] = max(fill.get(source, (-1, 0)), (int(shard[1:]), size))
    last = max((number for number, _ in fill.values()), default=-1)
    shards = []
    for source in new["source"]:
        number, size = fill.get(source, (-1, shard_size))
        if size >= shard_size:
            last += 1
            number, size = last, 0
        fill[source] = number, size + 1
        shards.append(f"s{number:06d}")
    return pl.Series("shard", shards, dtype=pl.String)
