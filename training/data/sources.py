"""Which candidates a source holds, in a stable order, and which shard each of them belongs to for ever.

What looks like an image by its name is a candidate; whether it is one is decided by its bytes, in `images`.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from training.data import sidecars
from training.data.tables import TABLES
from training.errors import DataError

if TYPE_CHECKING:
    from training.config import SourceConfig

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".ico",
    ".cur", ".icns", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".dds", ".exr", ".hdr", ".eps",
    ".xcf", ".raw", ".dng", ".cr2", ".nef", ".arw",
))
# fmt: on
"""Names that claim to be an image. Most of these formats are rejected later, with a reason."""

_LISTED = tuple(name for name in TABLES["source_listing"].columns if name not in ("shard", "gone_at"))
_ROWS = 50_000
"""Rows held as Python objects at a time."""
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")


class Problem(NamedTuple):
    """Something beside or around a candidate that could not be used; the candidate itself goes on."""

    source_id: str
    """The candidate, or the folder."""
    what: str
    """One line."""


class _Status(NamedTuple):
    bytes: int
    modified_ns: int
    kind: int
    """File type bits of st_mode."""


class _Found(NamedTuple):
    name: bytes
    """Path relative to the root."""
    status: _Status
    """Of the candidate itself, links not followed."""
    sidecars: tuple[tuple[bytes, _Status], ...]
    """Name relative to the root and status of each, in the order of `sidecars.SUFFIXES`."""


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


def encode_name(name: bytes) -> str:
    """A path as clean printable text: bytes that are not are percent-encoded, and so is a percent sign that
    would read as an encoded byte. `locate` turns it back; different paths give different texts.
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
    """SHA-256 over the relative names, sizes and times of all candidates and sidecars, and the fixed tags.

    It changes whenever `list_folder` could give another result, and reads no file.

    Raises:
        DataError: the folder is missing.
    """
    hasher = hashlib.sha256(repr((source.name, source.tags)).encode())
    for found in sorted(_walk(source, root, [])):
        for name, status in ((found.name, found.status), *found.sidecars):
            hasher.update(repr((name, *status)).encode())
    return hasher.hexdigest()


def list_folder(source: "SourceConfig", root: Path) -> tuple[pl.DataFrame, list[Problem]]:
    """All candidates below a folder with what their sidecars say.

    Links are never followed. A link, pipe or device that is named like an image is listed all the same, so that
    it is rejected with a reason and does not just vanish; folders are walked whatever their name.

    Returns:
        `source_listing` without shard and gone_at, ordered by the bytes of the relative path; and what could
        not be used of sidecars and folders.

    Raises:
        DataError: the folder is missing.
    """
    problems: list[Problem] = []
    schema = {name: TABLES["source_listing"].schema[name] for name in _LISTED}
    frames = [pl.DataFrame(schema=schema)]
    candidates = sorted(_walk(source, root, problems))
    for start in range(0, len(candidates), _ROWS):
        rows = [_row(source, root, found, problems) for found in candidates[start : start + _ROWS]]
        frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
    return pl.concat(frames), sorted(problems)


def _row(source: "SourceConfig", root: Path, found: _Found, problems: list[Problem]) -> dict[str, object]:
    """One candidate with its metadata as a row of the listing."""
    source_id = encode_name(found.name)
    metadata = sidecars.Metadata()
    for tag in source.tags:
        metadata.add_tag(tag)
    paths = [root / os.fsdecode(name) for name, _ in found.sidecars]
    problems += [Problem(source_id, what) for what in sidecars.read(paths, metadata)]
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


def _walk(source: "SourceConfig", root: Path, problems: list[Problem]) -> Iterator[_Found]:
    """Candidates in no particular order; folders that cannot be read go to `problems`."""
    if not root.is_dir():
        raise DataError(f"source {source.name!r}: folder {root} is missing; sources.path must name a folder")
    top = os.fsencode(root)
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(os.path.join(top, folder)) as entries:
                files, folders = _sort_entries(entries, folder, problems)
        except OSError as error:
            problems.append(Problem(encode_name(folder) or ".", f"folder: {error.strerror}"))
            continue
        waiting += folders
        for name, status in files.items():
            stem, suffix = os.path.splitext(name)
            if os.fsdecode(suffix).lower() in IMAGE_SUFFIXES:
                beside = [stem + end.encode() for end in sidecars.SUFFIXES]
                yield _Found(name, status, tuple((side, files[side]) for side in beside if side in files))


def _sort_entries(
    entries: Iterator["os.DirEntry[bytes]"], folder: bytes, problems: list[Problem]
) -> tuple[dict[bytes, _Status], list[bytes]]:
    """Files by relative name with status, and folders, of one folder."""
    files: dict[bytes, _Status] = {}
    folders = []
    for entry in entries:
        name = os.path.join(folder, entry.name)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            problems.append(Problem(encode_name(name), f"status: {error.strerror}"))
            continue
        if stat.S_ISDIR(status.st_mode):
            folders.append(name)
        else:
            files[name] = _Status(status.st_size, status.st_mtime_ns, stat.S_IFMT(status.st_mode))
    return files, folders


def merge_listing(previous: pl.DataFrame, found: pl.DataFrame, *, shard_size: int, now: datetime) -> pl.DataFrame:
    """The next `source_listing`: it only grows.

    Args:
        previous: `source_listing` so far; may be empty.
        found: What is there now, all sources, without shard and gone_at, in the order of listing.
        shard_size: Candidates in a shard at most.
        now: Time of the listing, UTC: set where a candidate is missed for the first time.

    Returns:
        `source_listing`. A candidate keeps its shard. New ones fill their source's last shard, then open the
        next; shards are numbered over all sources and hold one source each.
    """
    table = TABLES["source_listing"]
    key = list(table.key)
    known = previous.select(*key, "shard")
    present = found.join(known, on=key, how="left", maintain_order="left")
    new = present.filter(pl.col("shard").is_null()).drop("shard")
    new = new.with_columns(_new_shards(previous, new, shard_size))
    gone = previous.join(found.select(key), on=key, how="anti")
    gone = gone.with_columns(pl.col("gone_at").fill_null(pl.lit(now, dtype=table.schema["gone_at"])))
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
