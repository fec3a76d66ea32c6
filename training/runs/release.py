"""Puts a run's last checkpoint into a folder that stands alone: model, card, report, licence,
images."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from training.commit import atomic_folder, sha256_file
from training.config.run import RunConfig
from training.models.base_model import config_folder, inspect
from training.models.trainables import trainable_of
from training.tables.schemas import TABLES

CARD, REPORT, CONFIG, TAGS = "README.md", "report.html", "config.toml", "tags.csv"
IMAGES = "pictures"
NO_LICENCE = "LICENSE_MISSING.txt"
ABOUT = {
    CARD: "model card",
    REPORT: "before and after, without network",
    CONFIG: "the resolved run",
    TAGS: "every tag with its images and aliases",
    NO_LICENCE: "the base model came without the text of its licence",
}
_LICENCES = ("license", "licence", "copying", "notice")


def licence_files(base: Path) -> dict[str, Path]:
    """The texts of a base model's licence, by name, sorted: they go with everything that is made
    from it.

    Args:
        base: A diffusers folder, or a single file with the folder of its configurations beside it.
    """
    folder = config_folder(base)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        path.name: path
        for path in found
        if path.is_file() and path.name.lower().startswith(_LICENCES)
    }


def missing_licence(base: str, licence: str) -> str:
    """What stands in the licence's place where the base model came without its text."""
    return (
        f"The base model {base} is under the licence {licence}, and so is this model.\n"
        "No file with the text of that licence was found beside the base model. Put it there as LICENSE, make the "
        "release again, and do not pass the model on without it.\n"
    )


def assemble(
    folder: Path,
    *,
    model: Path,
    model_files: Sequence[str],
    texts: Mapping[str, str],
    copies: Mapping[str, Path],
) -> None:
    """Fill a new release folder and rename it into place; an older one with the same name is
    replaced.

    Args:
        folder: `release/<run>`.
        model: Checkpoint in diffusers layout.
        model_files: Files of it that belong to the model (not its optimizer state).
        texts: Further files by name.
        copies: Further files to take along, by name.
    """
    with atomic_folder(folder, replace=True) as temporary:
        for name in model_files:
            _take(model / name, temporary / "model" / name)
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        for name, path in copies.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / name)


def _take(source: Path, target: Path) -> None:
    """Link a checkpoint's file, which never changes; copy it where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def inspect_model(checkpoint: Path, base: Path, config: RunConfig) -> dict[str, Any]:
    """What the model of a checkpoint is, as `base_model.inspect` has it; one that needs its base
    model is of that one's kind.

    Args:
        checkpoint: Of a run.
        base: The model that the run began from.
        config: Of the run.
    """
    if not trainable_of(config).needs_base:
        return inspect(checkpoint)
    own = {} if config.prediction_type == "base" else {"prediction_type": config.prediction_type}
    return {**inspect(base), **own}


def table(folder: Path, config: RunConfig) -> pl.DataFrame:
    """Rows of the table `release`: every file with size and digest.

    Args:
        folder: The release.
        config: Of the run, whose weights some files are.
    """
    about_files = trainable_of(config).about_files
    rows = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        rows.append(
            {
                "file": name,
                "about": _about(name) or about_files,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        )
    return pl.DataFrame(rows, schema=TABLES["release"].schema)


def _about(name: str) -> str:
    """What a file is; empty where it is the model's."""
    if name in ABOUT:
        return ABOUT[name]
    if name.startswith(f"{IMAGES}/"):
        return "sample image of the card"
    if name.lower().startswith(_LICENCES):
        return "licence of the base model, which holds for this one"
    return ""
