"""What is committed: content files, and the manifests that name them by digest.

A *commit* is the atomic replacement of a manifest; content without a manifest does not exist.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from training import commit
from training.errors import DamageError

MANIFEST_FORMAT = 2
"""Since 2 a manifest carries the digest of its own text; those of format 1 have none and stay
readable."""
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@|~-]*\.json")
"""The name of a part's manifest."""
_ROW_GROUP = 131_072
"""Rows of a Parquet row group: what is read at once."""
_DICTIONARY_BYTES = 8_000_000
"""A column with longer dictionaries is written out in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One content file of a commit."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a commit holds and what it was made from. Everything but `provenance` and `report`
    decides currency."""

    table: str
    part: str
    version: int
    """The stage's VERSION when it was made."""
    files: tuple[Entry, ...]
    rows: int
    digest: str
    """Logical digest of the table: equal content, equal digest."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Logical digest per column, so that a slice of columns is known without reading."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input slice -> its logical digest."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Resolved section of the configuration that the stage reads."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Model name -> digest of its files."""
    rejected: Mapping[str, Any] = field(default_factory=dict)
    """Part, digest and rows of this part's `rejected_images`."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What the UI shows; recorded, so that a current part can answer at once."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Git revision, time, host, Dagster run: never decides anything."""
    format: int = MANIFEST_FORMAT
    """Version of the file's form."""

    @property
    def basis(self) -> dict[str, Any]:
        """What the content follows from: equal bases mean that nothing needs to be made again."""
        return {
            "version": self.version,
            "inputs": dict(self.inputs),
            "config": commit.json_digest(self.config),
            "models": dict(self.models),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for `write_json`."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {
            **plain,
            "files": [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in self.files],
        }


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`, or None where nothing is committed.

    Raises:
        DamageError: it is there but unreadable, or was written by a newer version.
    """
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest with this content.

    Raises:
        DamageError: it is unreadable, or was written by a newer version; the message names `path`.
    """
    damaged = f"manifest {path} is damaged ({{}}); run `foundry verify --repair`"
    try:
        values = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamageError(damaged.format(error)) from None
    found = values.get("format") if isinstance(values, dict) else type(values).__name__
    if found not in (1, MANIFEST_FORMAT):
        raise DamageError(
            f"manifest {path} has format {found!r}, this version reads format 1 to {MANIFEST_FORMAT}"
        )
    if found != 1:
        values.pop(_SEAL, None)
        if _sealed(values) != content:
            raise DamageError(damaged.format(f"its text does not match its own {_SEAL}"))
    try:
        files = tuple(Entry(**item) for item in values["files"])
        return Manifest(**{**values, "files": files, "format": MANIFEST_FORMAT})
    except (TypeError, KeyError) as error:
        raise DamageError(damaged.format(error)) from None


_SEAL = "manifest_sha256"


def _sealed(values: Mapping[str, Any]) -> bytes:
    """The text of a manifest with the digest of its values in it; every byte of it follows from
    them."""
    plain = json.loads(
        commit.json_text(values)
    )  # with the keys that a reader finds: text, and so in its order
    return commit.json_text({**plain, _SEAL: commit.json_digest(plain)})


def commit_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest: the moment at which new content becomes the truth."""
    commit.write_bytes(path, _sealed(manifest.to_json()))


def manifests(folder: Path) -> list[Path]:
    """The manifests of the parts in a table's folder, sorted; temporary and other files are
    none."""
    return sorted(path for path in folder.glob("*.json") if _PART.fullmatch(path.name))


def write_named(folder: Path, stem: str, suffix: str, write: Callable[[Path], None]) -> Entry:
    """Let `write` fill a temporary file, then keep it as `<stem>-<digest8><suffix>`: other bytes,
    other name."""
    with commit.temporary(folder / f"{stem}{suffix}") as name:
        write(name)
        with name.open("rb+") as file:
            os.fsync(file.fileno())
        sha256 = commit.sha256_file(name)
        entry = Entry(name=f"{stem}-{sha256[:8]}{suffix}", sha256=sha256, bytes=name.stat().st_size)
        os.replace(name, folder / entry.name)
        commit.sync_folder(folder)
    return entry


def write_parquet(folder: Path, part: str, frame: pl.DataFrame) -> Entry:
    """Write a table as `<part>-<digest8>.parquet`.

    Arrow writes it, with dictionaries for strings also inside lists, which Polars writes out in
    full: a training set is less than half as large, and opens without making its strings.
    """
    import pyarrow.parquet as pq

    strings = [path for name, dtype in frame.schema.items() for path in _string_paths(name, dtype)]
    return write_named(
        folder,
        part,
        ".parquet",
        lambda path: pq.write_table(
            frame.to_arrow(compat_level=pl.CompatLevel.oldest()),
            path,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            use_dictionary=strings,
            dictionary_pagesize_limit=_DICTIONARY_BYTES,
        ),
    )


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read exactly the file `path`: Polars takes `[`, `*` and `?` in a path for a pattern, and
    would read others."""
    return pl.read_parquet(
        path, columns=None if columns is None else list(columns), memory_map=False, glob=False
    )


def parquet_columns(path: Path) -> set[str]:
    """Names of the columns of exactly the file `path`."""
    with path.open("rb") as file:
        return set(pl.read_parquet_schema(file))


def _string_paths(name: str, dtype: pl.DataType) -> list[str]:
    """Parquet's names of the string columns in a column of this type."""
    if isinstance(dtype, pl.List):
        return _string_paths(f"{name}.list.element", dtype.inner)  # type: ignore[arg-type]
    if isinstance(dtype, pl.Struct):
        return [
            path
            for item in dtype.fields
            for path in _string_paths(f"{name}.{item.name}", item.dtype)  # type: ignore[arg-type]
        ]
    return [name] if dtype == pl.String else []


def check_entry(folder: Path, entry: Entry, *, whole: bool = True) -> None:
    """Compare a content file with its manifest: size, and with `whole` its SHA-256.

    Raises:
        DamageError: it is gone, cut or changed; the message names file, expected and found.
    """
    path = folder / entry.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DamageError(f"{path} is missing; run `foundry verify --repair`") from None
    if found != entry.bytes:
        raise DamageError(
            f"{path} has {found} bytes, its manifest says {entry.bytes}; run `foundry verify --repair`"
        )
    if whole and (digest := commit.sha256_file(path)) != entry.sha256:
        raise DamageError(
            f"{path} has SHA-256 {digest[:16]}, its manifest says {entry.sha256[:16]}; run `foundry verify --repair`"
        )
