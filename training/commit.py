"""The one writer: everything that is kept is written here, so that a kill at any point loses
nothing committed.

A file is written under a temporary name, flushed, synced, renamed, and its folder synced.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from training.errors import LockedError, PipelineError, WorkspaceError

TEMPORARY_PREFIX = ".tmp-"
"""Begins the names of all that is being written, and of what a kill leaves of it."""
_TEMPORARY_SUFFIX = ".tmp"
"""Ends them, so that no reader that looks for an ending takes one for a file of its own."""
SQLITE_BESIDE = ("-journal", "-wal", "-shm")
DUCKDB_BESIDE = (".wal", ".wal.checkpoint", ".tmp")
"""What these write beside a database."""
_DISK_TROUBLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "mount it for writing, or work on a copy",
    errno.EACCES: "give yourself the right to use it",
    errno.EPERM: "give yourself the right to use it",
}
"""What a user can mend about a place that cannot be written to."""
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "attempt to write a readonly database": errno.EROFS,
}
"""How libraries say it, among them SQLite, that keep nothing of the system's error but its words."""
_SQLITE_TROUBLE = "disk i/o error"
"""What SQLite says, among other reasons, where the memory that its readers share cannot grow."""
_FULL_BYTES = 65_536
"""A disk with less is full: SQLite asks for 32 KiB at a time."""


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary(
    path: Path, *, folder: Path | None = None, beside: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield the name under which what becomes `path` is written; whatever is left there in the end
    is removed.

    Args:
        path: Where it will lie.
        folder: Where it lies until then, on the same file system; beside `path` by default.
        beside: Endings of what a database writes beside its file.

    Raises:
        WorkspaceError: the place is full or cannot be written to; the message names `path` and what
            to do.
    """
    folder = path.parent if folder is None else folder
    short = os.fsdecode(os.fsencode(path.name)[:200])
    name = folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{short}{_TEMPORARY_SUFFIX}"
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [name, *(name.with_name(name.name + end) for end in beside)]
        _remove(names)
        try:
            yield name
        finally:
            _remove(names)


def _remove(names: Sequence[Path]) -> None:
    """Remove files and folders, where they are there."""
    for path in names:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, *, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is synced and renamed to `path`, else removed.

    Args:
        path: What is written or replaced.
        folder: Where the temporary file lies; beside `path` by default.

    Raises:
        WorkspaceError: the place is full or cannot be written to. What was there before stays.
    """
    with temporary(path, folder=folder) as name:
        yield name
        with name.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success all of it is synced and renamed to `path`.

    Args:
        path: The folder to make.
        replace: An older folder of that name makes way at the last moment, and is then removed.

    Raises:
        WorkspaceError: `path` exists already, or the place is full or cannot be written to.
    """
    if path.exists() and not replace:
        raise WorkspaceError(f"{path} exists already and is never overwritten")
    with temporary(path) as name:
        name.mkdir()
        yield name
        for inner, _, names in os.walk(name):
            for file_name in names:
                with open(os.path.join(inner, file_name), "rb+") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(inner))
        with temporary(path.with_name(f"{path.name}.old")) as older:
            if replace and path.exists():
                os.rename(path, older)
            os.rename(name, path)
            sync_folder(path.parent)


def disk_trouble(error: BaseException, path: object) -> str | None:
    """One line on where nothing could be written, why, and what to do; None for errors that have
    other reasons.

    The reason may be wrapped in other errors.

    Args:
        error: What was raised.
        path: What was being written, as far as the error does not know better.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        number = link.errno if isinstance(link, OSError) else None
        if number is None:
            text = str(link).lower()
            number = next((number for words, number in _WORDS.items() if words in text), None)
            if number is None and _SQLITE_TROUBLE in text and full_disk(path):
                number = errno.ENOSPC
        if number in (
            errno.EACCES,
            errno.EPERM,
        ):  # perhaps of what is read, and not of what is written
            where = f": {getattr(link, 'filename', None) or path}"
        else:
            where = f" while writing {path}"
        if number in _DISK_TROUBLE:
            return _what_to_do(number, where)
        link = link.__cause__ or link.__context__
    return None


def _what_to_do(number: int, where: str) -> str:
    return (
        f"{os.strerror(number).lower()}{where}; {_DISK_TROUBLE[number]} and run the same command again: "
        "everything committed so far is kept"
    )


def full_disk(path: object) -> str | None:
    """The line of `disk_trouble` where the disk of `path` has no space left; None where it has, or is not known.

    For errors that do not say what they come from: SQLite's, and those of a process that could not even write its last
    words.
    """
    try:
        free = shutil.disk_usage(str(path)).free
    except OSError:
        return None
    return _what_to_do(errno.ENOSPC, f" while writing {path}") if free < _FULL_BYTES else None


@contextlib.contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" and its like into one line that names the path and what to do."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        message = disk_trouble(error, path)
        if message is None:
            raise
        raise WorkspaceError(message) from error


def write_bytes(path: Path, data: bytes, *, folder: Path | None = None) -> None:
    """Write `data` to `path` atomically and durably; `folder` as for `atomic_file`."""
    with atomic_file(path, folder=folder) as name:
        name.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, keys sorted, atomically and durably."""
    write_bytes(path, json_text(value))


def json_text(value: Any) -> bytes:
    """How a JSON value is written: keys sorted, one a line."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def column_digests(frame: pl.DataFrame) -> dict[str, str]:
    """One SHA-256 per column over its type, nulls and values, in row order.

    The physical layout (chunks, compression, what lies under a null) does not matter.
    """
    return {name: _series_digest(frame[name]) for name in frame.columns}


def logical_digest(digests: Mapping[str, str], rows: int) -> str:
    """The digest of a table, or of some of its columns: their names and digests, and the number of
    rows."""
    return json_digest([rows, [[name, digests[name]] for name in sorted(digests)]])


def _series_digest(series: pl.Series) -> str:
    hasher = hashlib.sha256()
    _feed(hasher, series.rechunk())
    return hasher.hexdigest()


def _feed(hasher: Any, series: pl.Series) -> None:
    """Hash one column; lists as lengths and then their flat content, structs field by field."""
    dtype = series.dtype
    hasher.update(f"{dtype}:{len(series)};".encode())
    hasher.update(np.packbits(series.is_null().to_numpy()).tobytes())
    if isinstance(dtype, pl.Struct):
        for item in series.struct.fields:
            _feed(hasher, series.struct.field(item))
    elif isinstance(dtype, pl.List):
        hasher.update(series.list.len().fill_null(0).to_numpy().astype("<u4").tobytes())
        _feed(hasher, series.drop_nulls().explode(empty_as_null=False, keep_nulls=False))
    elif dtype == pl.String:
        filled = series.fill_null("")
        hasher.update(filled.str.len_bytes().to_numpy().astype("<u4").tobytes())
        hasher.update("".join(filled.to_list()).encode())
    elif dtype == pl.Boolean:
        hasher.update(np.packbits(series.fill_null(False).to_numpy()).tobytes())
    elif isinstance(dtype, pl.Datetime):
        hasher.update(series.dt.epoch("us").fill_null(0).to_numpy().astype("<i8").tobytes())
    else:
        values = series.fill_null(0).to_numpy()
        if values.dtype.kind == "f":
            values = values + 0.0  # -0.0 and 0.0 are equal content
        hasher.update(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes())


@contextlib.contextmanager
def lock(path: Path, what: str, *, wait_s: float = 10.0) -> Iterator[None]:
    """Hold `path` by flock, which the kernel frees when the holder ends however it ends.

    Args:
        path: Lock file; its content names the holder.
        what: What is locked, for the message of whoever finds it held.
        wait_s: How long to wait for another holder.

    Raises:
        LockedError: still held after `wait_s`; names the holder's pid, host and start.
    """
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    with opened as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"{what} is held by {_holder(path)}; wait for it or stop it"
                    ) from None
                time.sleep(0.1)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {started}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    return path.read_text().strip() or "another process"
