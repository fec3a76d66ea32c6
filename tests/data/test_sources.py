"""Listing real folders with odd names, and merging listings without ever losing a candidate or its shard."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import SourceConfig
from training.data import sources
from training.data.tables import TABLES
from training.errors import DataError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
SOURCE = SourceConfig(name="photos", path="photos", tags=("Photo (medium)",))


def listing(root, source=SOURCE):
    return sources.list_folder(source, root)


def write(root: Path, names, content=b"x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_candidates_are_what_claims_to_be_an_image_in_the_order_of_their_bytes(tmp_path):
    write(tmp_path, ["b/a.JPG", "b.png", "a.webp", "LICENCES.md", "notes.txt", "t.csv", "B.gif", "z.heic", "noname"])
    frame, problems = listing(tmp_path)
    assert frame["source_id"].to_list() == ["B.gif", "a.webp", "b.png", "b/a.JPG", "z.heic"]
    assert frame["locator"].to_list() == frame["source_id"].to_list()
    assert frame["bytes"].to_list() == [1] * 5
    assert frame["tags"].to_list() == [[{"name": "photo_(medium)", "category": "general"}]] * 5
    assert problems == []


def test_odd_names_are_listed_once_and_found_again(tmp_path):
    names = [
        b"plain name.jpg", b"100%.jpg", b"a%20b.jpg", b"a b.jpg", b"caf\xc3\xa9.jpg", b"cafe\xcc\x81.jpg",
        b"\xff\xfe.jpg", b"new\nline.jpg", b"-rf.jpg", b"$(touch x).jpg", b"<img src=x>.jpg", b"\xe2\x80\xaertl.jpg",
        b"l" * 251 + b".jpg", b"%FF%FE.jpg", b"%.jpg", b"%%41.jpg",
    ]  # fmt: skip
    for number, name in enumerate(names):
        (tmp_path / os.fsdecode(name)).write_bytes(bytes([number]))
    frame, problems = listing(tmp_path)
    assert problems == []
    assert frame.height == len(names) == frame["source_id"].n_unique()
    assert all(text.isprintable() for text in frame["source_id"])
    contents = {sources.locate(tmp_path, locator).read_bytes()[0] for locator in frame["locator"]}
    assert contents == set(range(len(names)))
    assert "100%.jpg" in frame["source_id"].to_list()


@given(st.binary(min_size=1, max_size=40).filter(lambda n: b"\0" not in n))
def test_encoding_a_name_is_reversible_and_printable(name):
    text = sources.encode_name(name)
    assert text.isprintable()
    if not any(part in (b"", b".", b"..") for part in name.split(b"/")):
        assert os.fsencode(sources.locate(Path("/root"), text)) == b"/root/" + name


@pytest.mark.parametrize("locator", ["", "/etc/passwd", "../a.jpg", "a/%2E%2E/b.jpg", "a//b.jpg", "a%00.jpg"])
def test_a_locator_never_leads_out_of_its_folder(locator):
    with pytest.raises(DataError, match="inside its folder"):
        sources.locate(Path("/root"), locator)


def test_links_are_not_followed_and_no_file_is_opened_that_is_none(tmp_path):
    outside = tmp_path / "outside"
    write(outside, ["secret.jpg"])
    root = tmp_path / "root"
    write(root, ["real.jpg", "folder.jpg/inside.png"])
    (root / "link.jpg").symlink_to(outside / "secret.jpg")
    (root / "elsewhere").symlink_to(outside)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "real.txt")
    frame, problems = listing(root)
    assert frame["source_id"].to_list() == ["folder.jpg/inside.png", "link.jpg", "pipe.jpg", "real.jpg"]
    assert [p.source_id for p in problems] == ["real.jpg"]
    assert "not a regular file" in problems[0].what


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"source 'photos': folder .*nowhere is missing"):
        listing(tmp_path / "nowhere")


def test_an_empty_folder_has_no_candidates_and_the_right_columns(tmp_path):
    frame, _ = listing(tmp_path)
    merged = sources.merge_listing(TABLES["source_listing"].empty(), frame, shard_size=3, now=NOW)
    assert merged.height == 0


def test_the_scan_digest_changes_with_whatever_a_listing_reads(tmp_path):
    write(tmp_path, ["a.jpg", "a.txt", "unrelated.txt"])
    seen = [sources.scan_digest(SOURCE, tmp_path)]
    (tmp_path / "unrelated.txt").write_text("longer than before")
    assert sources.scan_digest(SOURCE, tmp_path) == seen[0]

    def changed():
        seen.append(sources.scan_digest(SOURCE, tmp_path))
        return len(set(seen)) == len(seen)

    (tmp_path / "a.txt").write_text("another text")
    assert changed()
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert changed()
    (tmp_path / "a.json").write_text("{}")
    assert changed()
    write(tmp_path, ["b.jpg"])
    assert changed()
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    assert changed()
    assert sources.scan_digest(SourceConfig(name="photos", path="x", tags=("other",)), tmp_path) not in seen


def found(*keys):
    schema = {n: t for n, t in TABLES["source_listing"].schema.items() if n not in ("shard", "gone_at")}
    rows = [
        {"source": source, "source_id": name, "locator": name, "bytes": 1, "modified_ns": 1, "tags": []}
        for source, name in keys
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


names = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([f"{i}.jpg" for i in range(12)])), unique=True)


@settings(max_examples=60, deadline=None)
@given(listings=st.lists(names, min_size=1, max_size=4), shard_size=st.integers(1, 5))
def test_a_listing_only_grows_and_a_candidate_keeps_its_shard(listings, shard_size):
    table = TABLES["source_listing"].empty()
    for step, keys in enumerate(listings):
        before, moment = table, NOW + timedelta(days=step)
        table = sources.merge_listing(before, found(*keys), shard_size=shard_size, now=moment)
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
    first = sources.merge_listing(empty, found(*[("a", f"{i}") for i in range(3)], ("b", "0")), shard_size=2, now=NOW)
    assert first["shard"].to_list() == ["s000000", "s000000", "s000001", "s000002"]
    keys = [*[("a", f"{i}") for i in range(5)], ("b", "0"), ("b", "1"), ("b", "2")]
    second = sources.merge_listing(first, found(*keys), shard_size=2, now=NOW)
    assert second["shard"].to_list() == [
        "s000000", "s000000", "s000001", "s000001", "s000003", "s000002", "s000002", "s000004",
    ]  # fmt: skip


def test_what_a_candidate_says_of_itself_is_taken_anew():
    one = found(("a", "x.jpg"))
    table = sources.merge_listing(TABLES["source_listing"].empty(), one, shard_size=2, now=NOW)
    table = sources.merge_listing(table, one.with_columns(caption=pl.lit("new")), shard_size=2, now=NOW)
    assert table["caption"].to_list() == ["new"]
    table = sources.merge_listing(table, one.clear(), shard_size=2, now=NOW)
    assert table["caption"].to_list() == ["new"]
