"""The tables' documentation is made from their schemas, and their closed list of reasons is
closed."""

from pathlib import Path

import pytest

from training.errors import DataError
from training.tables.schemas import TABLES, markdown, rejections
from training.tables.table import Reason

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tables.md"


def test_the_page_is_what_the_schemas_say():
    assert PAGE.read_text("utf-8") == markdown(), (
        "write it anew: python -m training.tables.schemas > docs/tables.md"
    )


def test_every_column_says_what_it_is():
    for table in TABLES.values():
        assert all(column.about for column in table.columns.values()), table.name
        assert set(table.key) <= set(table.columns)


def test_a_reason_outside_of_the_list_is_refused():
    assert rejections("x", [{"reason": Reason.GONE, "value": 3}])["value"].to_list() == ["3"]
    with pytest.raises(DataError, match="'too ugly' is not in the closed list"):
        rejections("x", [{"reason": "too ugly"}])
