"""Looks after what is committed: verify and repair, digests, garbage."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from resources.workspace.layouts import all_manifests, layout_of
from resources.workspace.named_files import find_damage
from resources.workspace.store import Store
from training.commit import TEMPORARY_PREFIX, column_digests, sync_folder
from training.errors import ConfigError, DamageError
from training.manifests import (
    Manifest,
    check_entry,
    read_manifest,
)
from training.progress import track
from training.runs.run_folder import (
    INPUTS,
    check_checkpoint,
    checkpoints,
    read_inputs,
    read_ready,
)
from training.tables.schemas import TABLES

DAY_S = 86_400
QUARANTINE = "quarantine"
_MEND = "run `foundry verify --repair`"
_NOT_OURS = ("dagster", "images", "models", QUARANTINE)
"""Folders of a workspace in which nothing is written under a temporary name of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that `verify` found."""

    kind: str
    """`damage` (rebuilt by --repair and the next run) or `orphan` (no manifest names it; gc removes
    it)."""
    path: Path
    detail: str
    files: tuple[Path, ...] = ()
    """Damaged files that are named by rows of the part and not by its manifest."""


def verify(store: Store) -> list[Problem]:
    """Compare every committed file with its manifest in full, each manifest with its own digest and
    with what it names elsewhere, and images and releases with the rows that name them; find files
    that no manifest names, and what killed writers left behind."""
    problems: list[Problem] = []
    paths = list(all_manifests(store.home))
    for path in track(paths, "parts", len(paths)):
        try:
            manifest = read_manifest(path)
        except DamageError as error:
            problems.append(Problem(kind="damage", path=path, detail=str(error)))
            continue
        assert manifest is not None
        try:
            _check_place(path, manifest)
            for entry in manifest.files:
                check_entry(path.parent, entry)
            _check_rejected(store, path, manifest)
        except DamageError as error:
            problems.append(Problem(kind="damage", path=path, detail=str(error)))
            continue
        if damage := find_damage(store, manifest):
            problems.append(
                Problem(kind="damage", path=path, detail=damage.detail, files=damage.files)
            )
    saved = sorted((store.home / "runs").glob("*/checkpoints/samples_*"))
    for folder in track(saved, "checkpoints", len(saved)):
        try:
            check_checkpoint(folder)
        except DamageError as error:
            problems.append(Problem(kind="damage", path=folder, detail=str(error)))
    problems.extend(
        Problem(kind="orphan", path=path, detail=f"{path} {_why_orphan(path)}")
        for path in orphans(store)
    )
    return problems


def _check_place(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest that lies under another part's name.

    Raises:
        DamageError: names both parts.
    """
    here = layout_of(manifest.table).part_at(path)
    if here != (manifest.table, manifest.part):
        raise DamageError(
            f"manifest {path} is that of {manifest.table} {manifest.part}, and not of {' '.join(here)}; {_MEND}"
        )


def _check_rejected(store: Store, path: Path, manifest: Manifest) -> None:
    """Compare what a stage rejected with what its manifest says of it.

    A kill between the two commits leaves the rejections of a newer attempt, which say so by what
    they follow from.

    Raises:
        DamageError: the rejections are missing or not those that the manifest names.
    """
    if not manifest.rejected:
        return
    part, digest = manifest.rejected["part"], manifest.rejected["digest"]
    rejected = store.manifest("rejected_images", part)
    if rejected is None:
        raise DamageError(
            f"{path} names rejected_images {part}, whose manifest is missing; {_MEND}"
        )
    for entry in rejected.files:
        check_entry(store.tables.folder("rejected_images", part), entry)
    if rejected.digest != digest and rejected.basis == manifest.basis:
        raise DamageError(
            f"{path} names rejected_images {part} with digest {digest[:16]}, it has {rejected.digest[:16]}; {_MEND}"
        )


def _why_orphan(path: Path) -> str:
    left = path.name.startswith(TEMPORARY_PREFIX)
    return "was left behind by a writer that was killed" if left else "is named by no manifest"


def repair(store: Store, problems: list[Problem]) -> list[Path]:
    """Move what is damaged to quarantine/, so that the next run rebuilds just that; return where it
    went."""
    moved = []
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for problem in problems:
        if problem.kind != "damage":
            continue
        folder = store.home / QUARANTINE / stamp
        # The manifest goes last: until then the part is damaged, afterwards it is missing; never
        # half of it.
        for path in (*problem.files, *_content(problem.path), problem.path):
            if path.exists():
                target = folder / path.relative_to(store.home)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
        sync_folder(problem.path.parent)
        moved.append(target)
    return moved


def _content(manifest_path: Path) -> list[Path]:
    """Content files of a manifest that can still be read."""
    if manifest_path.is_dir():
        return []
    try:
        manifest = read_manifest(manifest_path)
    except DamageError:
        return []
    return (
        [] if manifest is None else [manifest_path.parent / entry.name for entry in manifest.files]
    )


def orphans(store: Store) -> list[Path]:
    """Files under tables/ and latents/ that no manifest and no run names, and everywhere what
    killed writers left."""
    named: set[Path] = set()
    paths = list(all_manifests(store.home))
    for path in track(paths, "manifests", len(paths)):
        named.add(path)
        named.update(_content(path))
    named.update(training_sets_in_use(store))
    found: list[Path] = []
    for top in ("tables", "latents"):
        for folder, folders, names in os.walk(store.home / top):
            folders[:] = sorted(name for name in folders if not name.endswith(".partial"))
            found.extend(
                Path(folder) / name for name in sorted(names) if Path(folder) / name not in named
            )
    return list(dict.fromkeys([*found, *leftovers(store)]))


def leftovers(store: Store) -> Iterator[Path]:
    """Files and folders of the workspace that were being written when their writer was killed, or
    are at this moment.

    What lies in the folders of the sources is the user's, whatever its name.
    """
    sources = {store.paths.source_path(source) for source in store.config.sources}
    for top, folders, names in os.walk(store.home):
        folder = Path(top)
        left = sorted(name for name in (*folders, *names) if name.startswith(TEMPORARY_PREFIX))
        yield from (folder / name for name in left)
        skipped = _NOT_OURS if folder == store.home else ()
        folders[:] = [
            name
            for name in sorted(folders)
            if name not in left and name not in skipped and (folder / name).resolve() not in sources
        ]


def training_sets_in_use(store: Store) -> set[Path]:
    """Frozen sets that a run names: kept for as long as the run is."""
    used = set()
    for path in (store.home / "runs").glob(f"*/{INPUTS}"):
        used.add(read_inputs(path.parent).training_set)
    return used


def collect_garbage(store: Store, *, min_age_s: float = DAY_S) -> tuple[list[Path], int]:
    """Delete orphans and partial batches older than a day; return them and their bytes."""
    removed, total = [], 0
    candidates = orphans(store) + sorted((store.home / "tables").glob("*/*.partial"))
    for path in track(candidates, "files", len(candidates)):
        if not path.exists() or time.time() - path.stat().st_mtime < min_age_s:
            continue
        files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
        total += sum(item.stat().st_size for item in files)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed, total


def digests(store: Store, table: str | None = None) -> dict[str, str]:
    """Logical digest of every committed part, by `table part`.

    Raises:
        ConfigError: there is no such table.
    """
    if table is not None and table not in TABLES:
        raise ConfigError(f"--table {table!r}: there are {', '.join(sorted(TABLES))}")
    parts = [
        (name, part)
        for name in ([table] if table else sorted(TABLES))
        for part in store.tables.parts(name)
    ]
    found = {}
    for name, part in track(parts, "parts", len(parts)):
        manifest = store.manifest(name, part)
        assert manifest is not None
        found[f"{name} {part}"] = manifest.digest
    return found


def run_digests(store: Store, run: str) -> dict[str, str]:
    """Digest of the weights of every checkpoint of a run, by name.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    found = [read_ready(folder) for folder in checkpoints(store.paths.run_folder(run))]
    if not found:
        raise ConfigError(f"run {run!r} has no checkpoint under {store.paths.run_folder(run)}")
    return {ready.checkpoint: ready.digest for ready in found}


def differences(store: Store, other: Store, table: str | None = None) -> list[str]:
    """Where two workspaces disagree beyond the tolerance of each column, one line each."""
    mine, theirs = digests(store, table), digests(other, table)
    lines = [f"{name}: only in {store.home}" for name in sorted(mine.keys() - theirs.keys())]
    lines += [f"{name}: only in {other.home}" for name in sorted(theirs.keys() - mine.keys())]
    both = sorted(mine.keys() & theirs.keys())
    for name in track(both, "parts compared", len(both)):
        if mine[name] != theirs[name]:
            owner, _, part = name.partition(" ")
            lines.extend(
                f"{name}: {line}" for line in _frame_differences(store, other, owner, part)
            )
    return lines


def _frame_differences(store: Store, other: Store, table: str, part: str) -> list[str]:
    """Columns of one part that differ by more than their tolerance."""
    schema = TABLES[table]
    a, b = (item.read(table, parts=[part]) for item in (store, other))
    if a.height != b.height:
        return [f"{a.height} rows here, {b.height} there"]
    lines = []
    for name, column in schema.columns.items():
        if column_digests(a.select(name)) == column_digests(b.select(name)):
            continue
        if column.tolerance is None:
            lines.append(f"column {name} differs")
        elif (gap := _largest_gap(a[name], b[name])) > column.tolerance:
            lines.append(f"column {name} differs by {gap:.3g}, tolerance {column.tolerance:g}")
    return lines


def _largest_gap(a: pl.Series, b: pl.Series) -> float:
    """Largest absolute difference of two columns; infinite where their shapes or non-numbers
    differ."""
    if isinstance(a.dtype, pl.List):
        if not a.list.len().equals(b.list.len()):
            return float("inf")
        return _largest_gap(a.explode().drop_nulls(), b.explode().drop_nulls())
    if isinstance(a.dtype, pl.Struct):
        return max(
            _largest_gap(a.struct.field(item.name), b.struct.field(item.name))
            for item in a.dtype.fields
        )
    if not a.dtype.is_numeric():
        return 0.0 if a.equals(b) else float("inf")
    if not a.is_null().equals(b.is_null()):
        return float("inf")
    gap = (a.cast(pl.Float64) - b.cast(pl.Float64)).abs().max()
    return 0.0 if gap is None else float(gap)  # type: ignore[arg-type]
