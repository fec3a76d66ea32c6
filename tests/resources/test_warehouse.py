"""The views have their columns and types whether a table has rows or not."""

import duckdb
import polars as pl
import pytest
from judged_world import World

from resources.warehouse import query, rebuild
from training.tables.schemas import PART_COLUMNS, TABLES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workspace in which most tables have no part."""
    return World(tmp_path_factory.mktemp("world") / "home")


@pytest.fixture(scope="module")
def database(world):
    with duckdb.connect(str(rebuild(world.store)), read_only=True) as connection:
        yield connection


@pytest.mark.parametrize("table", TABLES)
def test_a_table_without_rows_has_the_columns_that_its_files_would_have(table, database, tmp_path):
    TABLES[table].empty().write_parquet(tmp_path / "a.parquet")
    files = duckdb.sql(f"describe from read_parquet('{tmp_path / 'a.parquet'}')").fetchall()
    own = [(name, "VARCHAR") for name in PART_COLUMNS.get(table, ())]
    found = database.sql(f'describe "{table}"').fetchall()
    assert [row[:2] for row in found] == own + [row[:2] for row in files]


def test_a_query_over_tables_without_rows_finds_none(world, database):
    assert world.store.tables.parts("tags") == []
    assert query(world.store, "select * from tags join captions using (image_id)").height == 0
    assert query(world.store, "select * from ingest_verdicts").height == 0
    schema = query(world.store, "select * from quality_scores").schema
    told = dict.fromkeys(PART_COLUMNS.get("quality_scores", ()), pl.String())
    assert dict(schema) == told | dict(TABLES["quality_scores"].schema)
