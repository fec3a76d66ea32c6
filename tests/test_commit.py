"""Commits: nothing committed is ever lost, nothing half-written is ever seen, equal content has equal digests."""

import errno
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import commit
from training.errors import DamageError, LockedError, WorkspaceError

TOY = Path(__file__).with_name("toy_writer.py")


def write_toy(folder, generation, fatal=0, style="committed"):
    """Run the toy writer; returns the signal that ended it, or 0."""
    done = subprocess.run([sys.executable, TOY, folder, str(generation), str(fatal), style], check=False)
    return -done.returncode


def committed_version(folder):
    """The committed version, checked in full; None when nothing is committed."""
    manifest = commit.read_manifest(folder / "t.json")
    if manifest is None:
        return None
    for entry in manifest.files:
        commit.check_entry(folder, entry)
    frame = pl.read_parquet(folder / manifest.files[0].name)
    assert commit.logical_digest(commit.column_digests(frame), frame.height) == manifest.digest
    assert frame["x"][0] == manifest.version
    return manifest.version


def test_a_writer_killed_at_every_file_system_call_loses_nothing(tmp_path):
    assert write_toy(tmp_path, 1) == 0
    killed = 0
    for fatal in range(1, 60):
        ended = write_toy(tmp_path, 2, fatal)
        assert committed_version(tmp_path) in (1, 2), f"killed at call {fatal}"
        if ended == 0:
            break
        assert ended == signal.SIGKILL
        killed += 1
        assert write_toy(tmp_path, 1) == 0  # back to the old content, over whatever the kill left behind
    assert killed >= 8, "the writer was killed at no more than a few calls: the hook does not see them"
    assert committed_version(tmp_path) == 2


def test_an_in_place_writer_is_caught(tmp_path):
    """The negative control of the test above."""
    assert write_toy(tmp_path, 1, style="in place") == 0
    broken = 0
    for fatal in range(1, 12):
        write_toy(tmp_path, 2, fatal, "in place")
        try:
            committed_version(tmp_path)
        except (DamageError, AssertionError, pl.exceptions.PolarsError):
            broken += 1
        write_toy(tmp_path, 1, style="in place")
    assert broken


def test_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    commit.write_bytes(tmp_path / "a", b"old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WorkspaceError, match=r"no space left on device while writing .*/a; free some space"):
        commit.write_bytes(tmp_path / "a", b"new")
    with pytest.raises(WorkspaceError, match="no space left"):
        commit.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1]}))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damage_is_named(tmp_path, damage):
    entry = commit.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1, 2, 3]}))
    commit.check_entry(tmp_path, entry)
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
        commit.check_entry(tmp_path, entry)


def test_other_content_gets_another_name(tmp_path):
    first = commit.write_parquet(tmp_path, "t", pl.DataFrame({"x": [1]}))
    second = commit.write_parquet(tmp_path, "t", pl.DataFrame({"x": [2]}))
    assert first.name != second.name
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from training.commit import lock\n"
        "with lock(Path(sys.argv[1]), 'it'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as holder:
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
        "t": st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)).map(lambda t: t.replace(tzinfo=UTC)),
        "l": st.none()
        | st.lists(st.fixed_dictionaries({"name": st.sampled_from(["a", "b"]), "p": st.floats(0, 1)}), max_size=2),
        "r": st.none() | st.fixed_dictionaries({"y": st.none() | st.floats(0, 1)}),
    }
)


def digest(rows, splits=1):
    size = -(-len(rows) // splits) or 1
    frames = [pl.DataFrame(rows[start : start + size], schema=NESTED) for start in range(0, len(rows), size)]
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
    assert commit.column_digests(pl.read_parquet(tmp_path / "t.parquet")) == commit.column_digests(frame)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "damaged"), ('{"format": 99}', "format 99, this version reads format 1"), ("[]", "format")],
)
def test_a_manifest_that_is_none_is_named(tmp_path, text, words):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DamageError, match=words):
        commit.read_manifest(tmp_path / "t.json")
