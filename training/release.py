"""Puts a run's last checkpoint into a folder that stands alone: the model, its card, its report, its configuration."""

import os
import shutil
from pathlib import Path

import polars as pl

from training.commit import atomic_folder, sha256_file
from training.data.tables import TABLES

ABOUT = {
    "README.md": "model card",
    "report.html": "before and after, without network",
    "config.toml": "the resolved run",
}


def assemble(
    folder: Path, *, model: Path, model_files: list[str], texts: dict[str, str], copies: dict[str, Path]
) -> None:
    """Fill a new release folder and rename it into place; an older one with the same name is replaced.

    Args:
        folder: `release/<run>`.
        model: Checkpoint in diffusers layout.
        model_files: Files of it that belong to the model (not its optimizer state).
        texts: Further files by name.
        copies: Further files to take along, by name.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with atomic_folder(fresh) as temporary:
        for name in model_files:
            _take(model / name, temporary / "model" / name)
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        for name, path in copies.items():
            _take(path, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)


def _take(source: Path, target: Path) -> None:
    """Link a committed file, which never changes; copy it where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def table(folder: Path) -> pl.DataFrame:
    """Rows of the table `release`: every file with size and digest."""
    rows = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        about = ABOUT.get(name, "model in diffusers layout")
        rows.append({"file": name, "about": about, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
    return pl.DataFrame(rows, schema=TABLES["release"].schema)
