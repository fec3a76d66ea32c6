"""Merging listings without ever losing a candidate or its shard."""

from datetime import UTC, datetime, timedelta

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sources import source_listing
from training.tables.schemas import TABLES

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def found(*keys):
    schema = {
        n: t for n, t in TABLES["source_listing"].schema.items() if n not in ("shard", "gone_at")
    }
    rows = [
        {
            "source": source,
            "source_id": name,
            "locator": name,
            "bytes": 1,
            "modified_ns": 1,
            "tags": [],
        }
        for source, name in keys
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


names = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([f"{i}.jpg" for i in range(12)])), unique=True
)


@settings(max_examples=60, deadline=None)
@given(listings=st.lists(names, min_size=1, max_size=4), shard_size=st.integers(1, 5))
def test_a_listing_only_grows_and_a_candidate_keeps_its_shard(listings, shard_size):
    table = TABLES["source_listing"].empty()
    for step, keys in enumerate(listings):
        before, moment = table, NOW + timedelta(days=step)
        table = source_listing.merge_listing(
            before, found(*keys), shard_size=shard_size, now=moment
        )
        rows = {(r["source"], r["source_id"]): r for r in table.iter_rows(named=True)}
        assert set(rows) >= set(keys)
        for row in before.iter_rows(named=True):
            kept = rows[row["source"], row["source_id"]]
            assert kept["shard"] == row["shard"]
            if (row["source"], row["source_id"]) not in keys:
                assert kept["gone_at"] == (row["gone_at"] or moment)
        assert {key for key, row in rows.items() if row["gone_at"] is None} == set(keys)
        shards = table.group_by("shard").agg(pl.len(), pl.col("source").n_unique())
        assert (shards["len"] <= shard_size).all()
        assert (shards["source"] == 1).all()


def test_new_candidates_fill_the_last_shard_of_their_source():
    empty = TABLES["source_listing"].empty()
    first = source_listing.merge_listing(
        empty, found(*[("a", f"{i}") for i in range(3)], ("b", "0")), shard_size=2, now=NOW
    )
    assert first["shard"].to_list() == ["s000000", "s000000", "s000001", "s000002"]
    keys = [*[("a", f"{i}") for i in range(5)], ("b", "0"), ("b", "1"), ("b", "2")]
    second = source_listing.merge_listing(first, found(*keys), shard_size=2, now=NOW)
    assert second["shard"].to_list() == [
        "s000000", "s000000", "s000001", "s000001", "s000003", "s000002", "s000002", "s000004",
    ]  # fmt: skip


def test_what_a_candidate_says_of_itself_is_taken_anew():
    one = found(("a", "x.jpg"))
    table = source_listing.merge_listing(
        TABLES["source_listing"].empty(), one, shard_size=2, now=NOW
    )
    table = source_listing.merge_listing(
        table, one.with_columns(caption=pl.lit("new")), shard_size=2, now=NOW
    )
    assert table["caption"].to_list() == ["new"]
    table = source_listing.merge_listing(table, one.clear(), shard_size=2, now=NOW)
    assert table["caption"].to_list() == ["new"]
