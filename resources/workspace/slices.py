"""The slices of tables that stages declare to read: their rows, and the digests that say whether
they changed."""

from dataclasses import dataclass
from functools import cached_property

import polars as pl

from resources.graph import Per, Reads, Stage
from resources.workspace import reading
from resources.workspace.tables import Tables
from training.commit import column_digests, json_digest, logical_digest
from training.errors import DeclarationError
from training.manifests import Manifest
from training.names import OwnedPart, ShardKey
from training.tables.schemas import TABLES


@dataclass(frozen=True)
class Slices:
    """What the stages of one workspace read."""

    tables: Tables

    def read(self, stage: Stage, table: str, key: str) -> pl.DataFrame:
        """Exactly the slice of `table` that the stage declares to read for partition `key`.

        Raises:
            DeclarationError: it declares none.
        """
        reads = next((item for item in stage.reads if item.table == table), None)
        if reads is None:
            raise DeclarationError(
                f"stage {stage.name} declares no slice of table {table}: add it to its `reads`"
            )
        reading.check(table, reads.columns)
        parts = self._parts(stage, reads, key)
        with reading.beside():
            frame = self.tables.read(table, _columns_with_shard(reads), parts)
        if _is_by_rows(reads):
            frame = frame.filter(pl.col("shard") == stage.shard(key))
        return frame.select(list(reads.columns) or list(TABLES[table].schema))

    @reading.beside()
    def digest(self, stage: Stage, reads: Reads, key: str) -> str | None:
        """Logical digest of the slice that partition `key` reads; None while a needed part is
        missing."""
        parts = self._parts(stage, reads, key)
        if not parts:
            return None
        digests = {}
        for part in parts:
            manifest = self.tables.manifest(reads.table, part)
            assert manifest is not None
            if _is_by_rows(reads):
                digests[part] = self._rows_digest(manifest, reads, stage.shard(key))
            elif reads.columns:
                chosen = {name: manifest.columns[name] for name in reads.columns}
                digests[part] = logical_digest(chosen, manifest.rows)
            else:
                digests[part] = manifest.digest
        return json_digest(digests)

    def _parts(self, stage: Stage, reads: Reads, key: str) -> list[str]:
        """The committed parts that a slice covers."""
        parts = self.tables.parts(reads.table)
        match reads.per:
            case Per.ALL | Per.ROWS:
                return parts
            case Per.SHARD:
                shard = stage.shard(key)
                return [part for part in parts if OwnedPart.owner_of(part) == shard]
            case Per.KEY:
                return [part for part in parts if part == key]
            case Per.ENCODING | Per.ENCODING_ROWS:
                return [part for part in parts if part == stage.encoding(key)]
            case Per.ENCODING_ALL:
                encoding = stage.encoding(key)
                return [part for part in parts if ShardKey.parse(part).encoding == encoding]

    def _rows_digest(self, manifest: Manifest, reads: Reads, shard: str) -> str:
        """Digest of one shard's rows of a whole table; all shards are digested in one pass and
        remembered."""
        memo_key = (manifest.table, f"{manifest.part}:{manifest.digest}", reads.columns)
        if memo_key not in self._rows_digests:
            columns = list(reads.columns) or list(TABLES[reads.table].schema)
            frame = self.tables.read(reads.table, _columns_with_shard(reads), [manifest.part])
            self._rows_digests[memo_key] = {
                str(name): logical_digest(column_digests(rows.select(columns)), rows.height)
                for (name,), rows in frame.partition_by("shard", as_dict=True).items()
            }
        return self._rows_digests[memo_key].get(shard, "no rows")

    @cached_property
    def _rows_digests(self) -> dict[tuple[str, str, tuple[str, ...]], dict[str, str]]:
        return {}


def _is_by_rows(reads: Reads) -> bool:
    return reads.per in (Per.ROWS, Per.ENCODING_ROWS)


def _columns_with_shard(reads: Reads) -> tuple[str, ...]:
    if not reads.columns or not _is_by_rows(reads) or "shard" in reads.columns:
        return reads.columns
    return (*reads.columns, "shard")
