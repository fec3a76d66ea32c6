"""Looks after what is committed: verify and repair, digests, garbage, and forgetting."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from resources import torchrun
from resources.workspace.layouts import all_manifests, layout_of
from resources.workspace.named_files import find_damage
from resources.workspace.store import Store
from training.commit import (
    TEMPORARY_PREFIX,
    column_digests,
    lock,
    logical_digest,
    sync_folder,
    write_bytes,
    write_json,
)
from training.errors import ConfigError, DamageError
from training.latents.files import generations, read_generation, write_without
from training.manifests import (
    Manifest,
    check_entry,
    commit_manifest,
    parquet_columns,
    read_manifest,
    read_parquet,
    write_parquet,
)
from training.names import GenerationName
from training.progress import track
from training.runs.event_log import has_finished
from training.runs.run_folder import (
    EPOCHS,
    EVENTS,
    FETCHED,
    INPUTS,
    check_checkpoint,
    checked_training_set,
    checkpoints,
    forgotten_stem,
    read_inputs,
    read_ready,
    write_inputs,
)
from training.runs.training_set import blank
from training.tables.schemas import TABLES, rejections
from training.tables.table import Reason

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


def forget(store: Store, image_ids: list[str]) -> dict[str, list[str]]:
    """Remove every row and latent derived from the images, keep their ids so that they never
    return, list runs that saw them. Whatever ends it, the same call again completes it.

    Returns:
        `parts` rewritten, `generations` of latents rewritten, `sources` files of folder sources
        (read where they lie, so the user deletes them), `runs` whose training set held one, and
        those of them that are `unfinished`.

    Raises:
        ConfigError: an id is no SHA-256, or a run that trains on one of the images is being
            trained.
        LockedError: `foundry run` works on this workspace.
        DamageError: a table, a set or a manifest is damaged; after `foundry verify --repair` the
            same call completes.
    """
    for image_id in image_ids:
        if len(image_id) != 64 or set(image_id) - set("0123456789abcdef"):
            raise ConfigError(
                f"{image_id!r} is no image id (64 hexadecimal digits); find it with `foundry sql`"
            )
    with lock(
        store.home / "locks" / "foundry-run.lock", f"`foundry run` in {store.home}", wait_s=0.0
    ):
        return _forget(store, image_ids)


def _forget(store: Store, image_ids: list[str]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {"parts": [], "generations": [], "sources": []}
    result["runs"] = runs = _runs_that_saw(store, image_ids)
    result["unfinished"] = [
        run for run in runs if not has_finished(store.paths.run_folder(run) / EVENTS)
    ]
    if training := [
        run for run in result["unfinished"] if torchrun.is_running(store.paths.run_folder(run))
    ]:
        raise ConfigError(
            f"run {training[0]} is being trained on one of these images: stop it with `foundry train --run "
            f"{training[0]} --stop`, then forget them"
        )
    located = store.read("raw_images", ["source", "source_id", "image_id"]).filter(
        pl.col("image_id").is_in(image_ids)
    )
    result["sources"] = [f"{source}: {source_id}" for source, source_id, _ in located.iter_rows()]
    known = store.tables.forgotten()
    lines = sorted(known | set(image_ids))
    write_bytes(store.home / "forget.txt", ("\n".join(lines) + "\n").encode())
    _forget_in_frozen_sets(store, runs, image_ids)
    paths = [
        *all_manifests(store.home),
        *sorted(store.home.glob(f"runs/*/{FETCHED}/*/g[0-9]*.json")),
    ]
    for path in track(paths, "parts", len(paths)):
        manifest = read_manifest(path)
        assert manifest is not None
        if manifest.table == "latents":
            result["generations"] += _forget_latents(store, path, manifest, image_ids)
        elif manifest.table in TABLES:
            result["parts"] += _forget_rows(store, path, manifest, image_ids)
    _forget_leftovers(store, image_ids)
    return result


def _runs_that_saw(store: Store, image_ids: list[str]) -> list[str]:
    seen = []
    for path in sorted((store.home / "runs").glob(f"*/{INPUTS}")):
        if _holds(read_inputs(path.parent).training_set, image_ids):
            seen.append(path.parent.name)
    return seen


def _holds(file: Path, image_ids: list[str]) -> bool:
    """Whether a table names one of the images; not where its file is missing or has no such
    columns."""
    names = _id_columns(parquet_columns(file)) if file.is_file() else []
    frame = read_parquet(file, names) if names else pl.DataFrame()
    return any(bool(frame[name].is_in(image_ids).any()) for name in names)


def _id_columns(columns: Iterable[str]) -> list[str]:
    return [name for name in ("image_id", "a", "b") if name in columns]


def _forget_in_frozen_sets(store: Store, runs: list[str], image_ids: list[str]) -> None:
    """Leave no more than the ids of the images in the sets that runs were frozen with: new content
    is a new name, to which the runs are pointed; what nobody names any more goes with the
    leftovers."""
    for run in runs:
        folder = store.paths.run_folder(run)
        inputs = read_inputs(folder)
        old = checked_training_set(inputs)
        frame = read_parquet(old)
        blanked = blank(frame, image_ids)
        if blanked.equals(frame):
            continue
        entry = write_parquet(old.parent, forgotten_stem(old), blanked)
        new = replace(
            inputs, training_set=old.parent / entry.name, training_set_sha256=entry.sha256
        )
        write_inputs(folder, new)


def _forget_latents(
    store: Store, path: Path, manifest: Manifest, image_ids: list[str]
) -> list[str]:
    """Write a generation again without the images; runs that have pinned it read the new one.

    One that cannot be read is deleted as a whole: the next run encodes the shard again.
    """
    folder, number = path.parent, GenerationName.parse(path.stem).number
    try:
        generation = read_generation(folder, number)
        if not generation.table()["image_id"].is_in(image_ids).any():
            return []
        new = write_without(generation, image_ids)
    except DamageError:
        new = None
    if new is None or not new.rows:
        path.unlink()
        sync_folder(folder)
    else:
        for epoch in store.home.glob(f"runs/*/{EPOCHS}/*.json"):
            values = json.loads(epoch.read_bytes())
            pin = values["latents"].get(folder.name)
            if pin == {"generation": number, "digest": manifest.digest}:
                pin["digest"] = new.digest
                write_json(epoch, values)
        commit_manifest(path, new)
    kept = {
        entry.name
        for other in generations(folder)
        for entry in read_generation(folder, other).manifest.files
    }
    for entry in manifest.files:
        if entry.name not in kept:
            (folder / entry.name).unlink(missing_ok=True)
    return [f"{manifest.part} {path.stem}"]


def _forget_leftovers(store: Store, image_ids: list[str]) -> None:
    """Delete what no manifest names and still holds one of the images: unfinished batches, old
    content, quarantine."""
    named = {path.parent / name for path in all_manifests(store.home) for name in _names(path)}
    named |= training_sets_in_use(store)
    tops = [store.home / top for top in ("tables", "latents", QUARANTINE)]
    paths = [
        (top, path) for top in tops for path in sorted(top.rglob("*.parquet")) if path not in named
    ]
    for top, path in track(paths, "leftovers", len(paths)):
        if path.parent.name == "rejected_images":
            continue
        try:
            if not _holds(path, image_ids):
                continue
        except (pl.exceptions.PolarsError, OSError):
            pass  # nobody can tell, and nobody reads it
        latents = path.name.partition("-")[0] if re.match(r"g\d{4,}-", path.name) else ""
        for other in (
            path.parent.glob(f"{latents}*") if latents and top.name == QUARANTINE else [path]
        ):
            other.unlink()


def _names(manifest: Path) -> list[str]:
    found = read_manifest(manifest)
    return [] if found is None else [entry.name for entry in found.files]


def _forget_rows(store: Store, path: Path, manifest: Manifest, image_ids: list[str]) -> list[str]:
    """Write a part again without the rows that name one of the images, and delete the old
    content."""
    names = _id_columns(TABLES[manifest.table].columns)
    if manifest.table in ("verdicts", "rejected_images") or not names:
        return []
    check_entry(path.parent, manifest.files[0])
    old = path.parent / manifest.files[0].name
    frame = read_parquet(old)
    kept = frame.filter(
        ~pl.any_horizontal([pl.col(name).is_in(image_ids).fill_null(False) for name in names])
    )
    if kept.height == frame.height:
        return []
    if manifest.table == "raw_images":
        rejected = _reject_forgotten(
            store, manifest, frame.filter(pl.col("image_id").is_in(image_ids))
        )
        manifest = replace(manifest, rejected=rejected)
    digests_ = column_digests(kept)
    stem = old.name.rpartition("-")[0]
    entry = write_parquet(path.parent, stem, kept)
    fields = {name: getattr(manifest, name) for name in Manifest.__slots__}
    fields |= {
        "files": (entry, *manifest.files[1:]),
        "rows": kept.height,
        "columns": digests_,
        "digest": logical_digest(digests_, kept.height),
        "report": {**manifest.report, "pictures": {}},
    }
    commit_manifest(path, Manifest(**fields))
    old.unlink()
    return [f"{manifest.table} {manifest.part}"]


def _reject_forgotten(store: Store, manifest: Manifest, gone: pl.DataFrame) -> dict[str, Any]:
    """Move accepted candidates to `rejected_images`: every candidate stays accounted for. Returns
    what the stage's manifest says of it."""
    part = f"raw_images.{manifest.part}"
    known = store.read(
        "rejected_images", parts=[part] if part in store.tables.parts("rejected_images") else []
    )
    rows: list[dict[str, object]] = [
        {**row, "reason": Reason.FORGOTTEN}
        for row in gone.select("source", "source_id", "image_id").iter_rows(named=True)
    ]
    rejected = pl.concat([known, rejections("raw_images", rows)])
    return store.writer.commit_rejected(
        "raw_images",
        manifest.version,
        manifest.part,
        rejected,
        config=manifest.config,
        basis=manifest.basis,
    )
