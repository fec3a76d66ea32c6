"""`warehouse.duckdb`: one view per table over the committed files, rebuilt in a moment, never the
only copy.

DuckDB is imported inside functions: where torch and Dagster's definitions are loaded too, a module
that holds it outlives the interpreter, and DuckDB's binding then prints fifty lines about leaks
after every command's last one.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from resources.workspace import generations
from resources.workspace.store import Store
from training.commit import DUCKDB_BESIDE, temporary
from training.errors import ConfigError
from training.tables.schemas import PART_COLUMNS, TABLES, part_values

if TYPE_CHECKING:
    import duckdb

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
    import duckdb

    path = store.home / "warehouse.duckdb"
    with temporary(path, beside=DUCKDB_BESIDE) as fresh:
        with duckdb.connect(str(fresh)) as connection:
            _create(connection, store)
        os.replace(fresh, path)
    return path


def _create(connection: "duckdb.DuckDBPyConnection", store: Store) -> None:
    """Make the views in an empty database."""
    for name in TABLES:
        connection.execute(f'create view "{name}" as {_select(store, name, connection)}')
    connection.execute(VERDICTS)
    connection.register("encoded", generations.table(store).to_arrow())
    connection.execute("create table latent_generations as from encoded")
    connection.unregister("encoded")


def _select(store: Store, table: str, connection: "duckdb.DuckDBPyConnection") -> str:
    """The rows of all parts; where keys recur from part to part, with the columns that tell a row's
    part."""
    parts = store.tables.parts(table)
    told = PART_COLUMNS.get(table, ())
    if not parts:
        types = dict.fromkeys(told, pl.String()) | dict(TABLES[table].schema)
        columns = ", ".join(
            f'null::{_duckdb_type(dtype)} as "{name}"' for name, dtype in types.items()
        )
        return f"select {columns} where false"
    files = [store.tables.file(table, part) for part in parts]
    listed = ", ".join(map(_exactly, files))
    if not told:
        return f"select * from read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"
    keys = f"{table}_parts"
    values = [
        {"filename": str(file), **part_values(table, part)}
        for file, part in zip(files, parts, strict=True)
    ]
    connection.register(
        "keys",
        pl.DataFrame(values, schema=dict.fromkeys(("filename", *told), pl.String())).to_arrow(),
    )
    connection.execute(f'create table "{keys}" as from keys')
    connection.unregister("keys")
    columns = ", ".join(f'"{name}"' for name in told)
    return (
        f"select {columns}, rows.* exclude (filename) from read_parquet([{listed}], union_by_name = true, "
        f'filename = true, hive_partitioning = false) rows join "{keys}" using (filename)'
    )


def _exactly(file: Path) -> str:
    """The SQL literal of the pattern that matches this file and no other: DuckDB takes every path
    for a pattern."""
    pattern = re.sub(r"[*?[]", r"[\g<0>]", str(file))
    return "'" + pattern.replace("'", "''") + "'"


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


def _check_reads(statements: "list[duckdb.Statement]") -> None:
    """Refuse statements that would change a table.

    Raises:
        ConfigError: names the kind of statement.
    """
    import duckdb

    kinds = duckdb.StatementType
    changing = (kinds.CREATE, kinds.INSERT, kinds.UPDATE, kinds.DELETE, kinds.DROP, kinds.ALTER)
    for statement in statements:
        if statement.type in changing:
            raise ConfigError(
                f"sql: {statement.type.name} would change tables, which only stages write"
            )


def query(store: Store, sql: str) -> pl.DataFrame:
    """Run one statement that reads over the committed tables; nothing is written for it, not in the
    workspace either.

    Raises:
        ConfigError: DuckDB refuses the statement, with its own first line, or it would change a
            table.
    """
    import duckdb

    # What does not fit into memory goes to the system's folder for that, not to `.tmp` where the
    # command is given.
    spilled = Path(tempfile.gettempdir(), f"foundry-sql-{os.getpid()}")
    with duckdb.connect(config={"temp_directory": str(spilled)}) as connection:
        _create(connection, store)
        try:
            _check_reads(connection.extract_statements(sql))
            relation = connection.sql(sql)
            return pl.DataFrame() if relation is None else relation.pl()
        except duckdb.Error as error:
            raise ConfigError(f"sql: {str(error).splitlines()[0]}") from None
