"""`warehouse.duckdb`: one view per table over the committed files, rebuilt in a moment, never the
only copy.

DuckDB is imported inside functions: where torch and Dagster's definitions are loaded too, a module
that holds it outlives the interpreter, and DuckDB's binding then prints fifty lines about leaks
after every command's last one.
"""

import os
import re
import tempfile
from collections.abc import Sequence
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
    """Make the views in an empty database; a table without parts has no files, so it is an empty
    table."""
    for name in TABLES:
        if parts := store.tables.parts(name):
            view = _select(store, name, parts, connection)
            connection.execute(f'create view "{name}" as {view}')
        else:
            told = dict.fromkeys(PART_COLUMNS.get(name, ()), pl.String())
            _table(connection, name, pl.DataFrame(schema=told | dict(TABLES[name].schema)))
    connection.execute(VERDICTS)
    _table(connection, "latent_generations", generations.table(store))


def _table(connection: "duckdb.DuckDBPyConnection", name: str, rows: pl.DataFrame) -> None:
    """Copy a frame into the database."""
    connection.register("rows", rows.to_arrow())
    connection.execute(f'create table "{name}" as from rows')
    connection.unregister("rows")


def _select(
    store: Store, table: str, parts: Sequence[str], connection: "duckdb.DuckDBPyConnection"
) -> str:
    """The rows of all parts; where keys recur from part to part, with the columns that tell a row's
    part."""
    told = PART_COLUMNS.get(table, ())
    files = [store.tables.file(table, part) for part in parts]
    listed = ", ".join(map(_exactly, files))
    if not told:
        return f"select * from read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"
    keys = f"{table}_parts"
    values = [
        {"filename": str(file), **part_values(table, part)}
        for file, part in zip(files, parts, strict=True)
    ]
    schema = dict.fromkeys(("filename", *told), pl.String())
    _table(connection, keys, pl.DataFrame(values, schema=schema))
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
