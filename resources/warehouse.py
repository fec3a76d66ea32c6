"""`warehouse.duckdb`: one view per table over the committed files, rebuilt in a moment, never the only copy."""

import os
from pathlib import Path

import duckdb
import polars as pl

from resources import generations
from resources.store import Store
from training.commit import TEMPORARY_PREFIX
from training.data.tables import TABLES
from training.errors import ConfigError

VERDICTS = """
create view ingest_verdicts as
select l.source, l.source_id, l.locator,
       case when r.image_id is not null then 'accepted' when x.reason is not null then 'rejected' end as status,
       x.reason, coalesce(r.image_id, x.image_id) as image_id, r.height, r.width
from source_listing l
left join raw_images r using (source, source_id)
left join (select * from rejected_images where stage = 'raw_images') x using (source, source_id)
"""


def rebuild(store: Store) -> Path:
    """Write the views anew and swap the file in: readers that hold the old one go on unharmed."""
    path = store.home / "warehouse.duckdb"
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        with duckdb.connect(str(temporary)) as connection:
            for name in TABLES:
                connection.execute(f'create view "{name}" as {_select(store, name)}')
            connection.execute(VERDICTS)
            connection.register("encoded", generations.table(store).to_arrow())
            connection.execute("create table latent_generations as from encoded")
            connection.unregister("encoded")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _select(store: Store, table: str) -> str:
    files = [store.table_file(table, part) for part in store.parts(table)]
    if not files:
        types = TABLES[table].schema.items()
        columns = ", ".join(f'null::{_duckdb_type(dtype)} as "{name}"' for name, dtype in types)
        return f"select {columns} where false"
    listed = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    return f"select * from read_parquet([{listed}], union_by_name = true)"


def _duckdb_type(dtype: pl.DataType) -> str:
    """DuckDB's name of a schema's type."""
    if isinstance(dtype, pl.List):
        return f"{_duckdb_type(dtype.inner)}[]"  # type: ignore[arg-type]
    if isinstance(dtype, pl.Struct):
        inner = ", ".join(f'"{item.name}" {_duckdb_type(item.dtype)}' for item in dtype.fields)  # type: ignore[arg-type]
        return f"struct({inner})"
    names = {
        pl.String: "varchar",
        pl.Int8: "tinyint",
        pl.Int32: "integer",
        pl.Int64: "bigint",
        pl.UInt64: "ubigint",
        pl.Float32: "float",
        pl.Float64: "double",
        pl.Boolean: "boolean",
    }
    return next((name for kind, name in names.items() if dtype == kind), "timestamptz")


def query(store: Store, sql: str) -> pl.DataFrame:
    """Run one read-only statement over the committed tables.

    Raises:
        ConfigError: DuckDB refuses the statement; the message is its own first line.
    """
    path = rebuild(store)
    with duckdb.connect(str(path), read_only=True) as connection:
        try:
            relation = connection.sql(sql)
            return pl.DataFrame() if relation is None else relation.pl()
        except duckdb.Error as error:
            raise ConfigError(f"sql: {str(error).splitlines()[0]}") from None
