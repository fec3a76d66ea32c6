"""Commits: nothing committed is ever lost, nothing half-written is ever seen, equal content has
equal digests."""

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime

import polars as pl
import pytest
import toy_writer
from graph_tools import WARM
from hypothesis import given, settings
from hypothesis import strategies as st

from training import commit, manifests
from training.errors import DamageError, LockedError, WorkspaceError


def write_toy(folder, generation, style="committed", journal=None):
    """Run the toy writer in a process of its own; returns the signal that ended it, or 0."""
    process = WARM.Process(target=toy_writer.write, args=(folder, generation, style, journal))
    process.start()
    process.join()
    return -process.exitcode


def committed_version(folder):
    """The committed version, checked in full; None when nothing is committed."""
    manifest = manifests.read_manifest(folder / "t.json")
    if manifest is None:
        return None
    for entry in manifest.files:
        manifests.check_entry(folder, entry)
    frame = pl.read_parquet(folder / manifest.files[0].name)
    assert commit.logical_digest(commit.column_digests(frame), frame.height) == manifest.digest
    assert frame["x"][0] == manifest.version
    return manifest.version


def test_a_writer_killed_at_every_change_loses_nothing(tmp_path):
    folder, journal = tmp_path / "toy", tmp_path / "points"
    folder.mkdir()
    assert write_toy(folder, 1) == 0
    while ended := write_toy(folder, 2, journal=journal):
        assert ended == signal.SIGKILL
        point = journal.read_text().splitlines()[-1]
        assert committed_version(folder) in (1, 2), point
        assert {path.name for path in folder.glob("*.json")} == {"t.json"}, (
            f"a reader's glob after {point}"
        )
        assert (
            write_toy(folder, 1) == 0
        )  # back to the old content, over whatever the kill left behind
    assert len(journal.read_text().splitlines()) >= 3, "the hook does not see the changes"
    assert committed_version(folder) == 2


def test_an_in_place_writer_is_caught(tmp_path):
    """The negative control of the test above."""
    folder, journal, broken = tmp_path / "toy", tmp_path / "points", 0
    folder.mkdir()
    assert write_toy(folder, 1, "in place") == 0
    while write_toy(folder, 2, "in place", journal):
        try:
            committed_version(folder)
        except (DamageError, AssertionError, pl.exceptions.PolarsError):
            broken += 1
        write_toy(folder, 1, "in place")
    assert broken


@pytest.mark.parametrize(
    "name", ["s000000.json", "a-0.parquet", "g0001-8x8.safetensors", "1.png", "x.jsonl", "é" * 127]
)
def test_no_reader_takes_a_temporary_file_for_its_own(tmp_path, name):
    with commit.temporary(tmp_path / name) as temporary:
        temporary.write_bytes(b"")
        assert temporary.name.startswith(commit.TEMPORARY_PREFIX)
        assert temporary.suffix == ".tmp"
        assert temporary.parent == tmp_path
        assert manifests.manifests(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_old_manifest_without_a_digest_of_its_own_is_read(tmp_path):
    entry = manifests.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1]}))
    manifest = manifests.Manifest(
        table="t", part="t", version=1, files=(entry,), rows=1, digest="d", report={10: 1, 9: 2}
    )
    manifests.commit_manifest(tmp_path / "t.json", manifest)
    new = manifests.read_manifest(tmp_path / "t.json")
    old = {
        key: value
        for key, value in json.loads((tmp_path / "t.json").read_bytes()).items()
        if "sha256" not in key
    }
    commit.write_json(tmp_path / "old.json", old | {"format": 1})
    assert manifests.read_manifest(tmp_path / "old.json") == new
    commit.write_json(tmp_path / "none.json", old)
    with pytest.raises(DamageError, match="does not match its own"):
        manifests.read_manifest(tmp_path / "none.json")


TROUBLE = {
    "full": (OSError(errno.ENOSPC, "full"), "no space left on device while writing"),
    "read-only": (OSError(errno.EROFS, "ro", "/x"), "read-only file system while writing"),
    "denied": (PermissionError(errno.EACCES, "no", "/elsewhere"), "permission denied: /elsewhere"),
    "polars": (
        pl.exceptions.ComputeError("No space left on device (os error 28)"),
        "no space left on device",
    ),
    "SQLite": (sqlite3.OperationalError("database or disk is full"), "no space left on device"),
    "read-only SQLite": (
        sqlite3.OperationalError("attempt to write a readonly database"),
        "read-only file system",
    ),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_place_that_cannot_be_written_to_is_one_line_with_what_to_do(tmp_path, kind):
    cause, words = TROUBLE[kind]

    def write(path):
        path.write_bytes(b"half")
        path.with_name(f"{path.name}-journal").write_bytes(b"half")
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("a library's own words") from error

    with (
        pytest.raises(WorkspaceError, match=rf"{words}.*; .* and run the same command again"),
        commit.temporary(tmp_path / "a.db", beside=commit.SQLITE_BESIDE) as temporary,
    ):
        write(temporary)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), commit.explain_disk(tmp_path):
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), commit.explain_disk(tmp_path):
        (tmp_path / "none").read_bytes()


def test_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    commit.write_bytes(tmp_path / "a", b"old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        WorkspaceError, match=r"no space left on device while writing .*/a; free some space"
    ):
        commit.write_bytes(tmp_path / "a", b"new")
    with pytest.raises(WorkspaceError, match="no space left"):
        manifests.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1]}))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damage_is_named(tmp_path, damage):
    entry = manifests.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1, 2, 3]}))
    manifests.check_entry(tmp_path, entry)
    path = tmp_path / entry.name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamageError, match=entry.name):
        manifests.check_entry(tmp_path, entry)


def test_other_content_gets_another_name(tmp_path):
    first = manifests.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1]}))
    second = manifests.write_parquet(tmp_path, "t", pl.DataFrame({"x": [2]}))
    assert first.name != second.name
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from training.commit import lock\n"
        "with lock(Path(sys.argv[1]), 'it'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"toy is held by pid {holder.pid} on \S+ since 20"),
            commit.lock(path, "toy", wait_s=0.2),
        ):
            pass
        holder.kill()
        holder.wait()
    with commit.lock(path, "toy", wait_s=0.2):
        pass


NESTED = pl.Schema(
    {
        "s": pl.String,
        "i": pl.Int32,
        "f": pl.Float32,
        "b": pl.Boolean,
        "t": pl.Datetime("us", "UTC"),
        "l": pl.List(pl.Struct({"name": pl.String, "p": pl.Float64})),
        "r": pl.Struct({"y": pl.Float64}),
    }
)
ROWS = st.fixed_dictionaries(
    {
        "s": st.none() | st.text(st.characters(codec="utf-8"), max_size=4),
        "i": st.none() | st.integers(-5, 5),
        "f": st.none() | st.floats(-2, 2, width=32),
        "b": st.none() | st.booleans(),
        "t": st.none()
        | st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)).map(
            lambda t: t.replace(tzinfo=UTC)
        ),
        "l": st.none()
        | st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["a", "b"]), "p": st.floats(0, 1)}),
            max_size=2,
        ),
        "r": st.none() | st.fixed_dictionaries({"y": st.none() | st.floats(0, 1)}),
    }
)


def digest(rows, splits=1):
    size = -(-len(rows) // splits) or 1
    frames = [
        pl.DataFrame(rows[start : start + size], schema=NESTED)
        for start in range(0, len(rows), size)
    ]
    frame = pl.concat(frames, rechunk=False) if frames else pl.DataFrame(schema=NESTED)
    return commit.logical_digest(commit.column_digests(frame), frame.height)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, max_size=5), other=st.lists(ROWS, max_size=5))
def test_digests_follow_content_and_nothing_else(rows, other):
    assert digest(rows) == digest(rows, splits=3)
    plain = [pl.DataFrame(items, schema=NESTED).to_dicts() for items in (rows, other)]
    assert (digest(rows) == digest(other)) == (plain[0] == plain[1])


def test_digest_of_a_known_table_stays(tmp_path):
    """Manifests on users' disks rest on these bytes; a change here makes every workspace stale."""
    frame = pl.DataFrame({"name": ["a", None], "value": [1.5, -0.0]})
    assert commit.logical_digest(commit.column_digests(frame), 2) == commit.logical_digest(
        commit.column_digests(frame.with_columns(value=pl.col("value").abs())), 2
    )
    frame.write_parquet(tmp_path / "t.parquet", compression="gzip")
    assert commit.column_digests(pl.read_parquet(tmp_path / "t.parquet")) == commit.column_digests(
        frame
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ('{"format": 99}', "format 99, this version reads format 1 to 2"),
        ("[]", "format"),
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path, text, words):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DamageError, match=words):
        manifests.read_manifest(tmp_path / "t.json")


@pytest.mark.parametrize(("free", "said"), [(4096, True), (2**30, False)])
def test_what_sqlite_says_of_a_full_disk_is_told_from_other_faults(
    tmp_path, monkeypatch, free, said
):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = commit.disk_trouble(sqlite3.OperationalError("disk I/O error"), tmp_path)
    line = f"no space left on device while writing {tmp_path}; free some space and run the same command again"
    assert (message is not None and message.startswith(line)) is said
    assert commit.full_disk(tmp_path) == message
