"""What is committed in a workspace: manifests, parts and rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from resources.workspace import reading
from resources.workspace.layouts import layout_of
from resources.workspace.paths import Paths
from training.errors import DataError
from training.manifests import (
    Manifest,
    check_entry,
    parquet_columns,
    read_manifest,
    read_parquet,
)
from training.tables.schemas import TABLES


@dataclass(frozen=True)
class Tables:
    """Reads the tables of one workspace."""

    paths: Paths

    def folder(self, table: str, part: str) -> Path:
        """Folder with the content files and the manifest of a part."""
        return layout_of(table).folder(self.paths.home, table, part)

    def manifest_path(self, table: str, part: str) -> Path:
        """The manifest of a part; where it has generations, that of the current one."""
        return layout_of(table).manifest(self.folder(table, part), part)

    def manifest(self, table: str, part: str) -> Manifest | None:
        """The committed manifest of a part, or None."""
        return read_manifest(self.manifest_path(table, part))

    def parts(self, table: str) -> list[str]:
        """Names of all committed parts of a table, in the order in which they are read."""
        return layout_of(table).parts(self.paths.home, table)

    def file(self, table: str, part: str) -> Path:
        """The Parquet file of a committed part, checked against its manifest on the first open of
        this process.

        Raises:
            DataError: the part is not committed.
            DamageError: the file does not match its manifest.
            DeclarationError: a stage is at work that does not declare to read the table.
        """
        reading.check(table)
        return self._checked_file(table, part)

    def _checked_file(self, table: str, part: str) -> Path:
        manifest = self.manifest(table, part)
        if manifest is None:
            raise DataError(
                f"table {table} has no part {part!r} yet; run `foundry run --select {table}`"
            )
        entry = manifest.files[0]
        folder = self.folder(table, part)
        if (path := folder / entry.name) not in self._checked:
            check_entry(folder, entry)
            self._checked.add(path)
        return path

    @cached_property
    def _checked(self) -> set[Path]:
        return set()

    def read(
        self, table: str, columns: Sequence[str] = (), parts: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Rows of the given parts (default: all), sorted by the table's key; null in columns
        younger than a part.

        Raises:
            DeclarationError: a stage is at work that does not declare to read these columns.
        """
        reading.check(table, columns)
        schema = TABLES[table].schema
        names = list(columns) or list(schema)
        wanted = self.parts(table) if parts is None else list(parts)
        frames = [_read_columns(self._checked_file(table, part), names, schema) for part in wanted]
        if not frames:
            return pl.DataFrame(schema={name: schema[name] for name in names})
        return pl.concat(frames)

    @reading.beside()
    def shards(self) -> list[str]:
        """All shards of the listing, sorted."""
        if self.manifest("source_listing", "all") is None:
            return []
        return sorted(self.read("source_listing", ["shard"])["shard"].unique().to_list())

    def forgotten(self) -> frozenset[str]:
        """Image ids that must never return."""
        path = self.paths.home / "forget.txt"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return frozenset(line.split("#")[0].strip() for line in lines if line.split("#")[0].strip())


def _read_columns(
    path: Path, names: Sequence[str], schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """Columns of a part; those that it lacks, because an older version wrote it, are null."""
    there = parquet_columns(path)
    frame = read_parquet(path, [name for name in names if name in there])
    missing = [pl.lit(None, dtype=schema[name]).alias(name) for name in names if name not in there]
    return frame.with_columns(missing).select(names)
