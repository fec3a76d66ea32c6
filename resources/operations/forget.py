"""Forgets images: their rows, latents and leftovers go, their ids stay so that they never return."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from resources import torchrun
from resources.operations.maintenance import QUARANTINE, training_sets_in_use
from resources.workspace.layouts import all_manifests
from resources.workspace.store import Store
from training.commit import (
    column_digests,
    lock,
    logical_digest,
    sync_folder,
    write_bytes,
    write_json,
)
from training.errors import ConfigError, DamageError
from training.latents.generations import generations, read_generation, write_without
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
    checked_training_set,
    forgotten_stem,
    read_inputs,
    write_inputs,
)
from training.runs.training_set import blank
from training.tables.schemas import TABLES, rejections
from training.tables.table import Reason


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
    is a new name, to which the runs are pointed; what no one names any more goes with the
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
            pass  # no one can tell, and no one reads it
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
