"""Which checkpoint of a run a resume begins from. Needs no torch."""

import dataclasses
import json
from pathlib import Path

from training.errors import DamageError, TrainingError
from training.models.trainables import trainable_of
from training.runs import run_folder
from training.runs.run_folder import STATE, Ready


def find_resumable(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, state included, by the digests of all its files.

    Returns:
        Its folder, or None to begin from the base model; and a line for each newer one that is
        torn.

    Raises:
        TrainingError: a newer one is whole, but another version wrote it or its state was freed: to
            go on from an older one would write over it.
    """
    torn = []
    for path in reversed(run_folder.checkpoint_folders(folder)):
        check_version(path)
        try:
            run_folder.check_checkpoint(path)
        except DamageError as error:
            torn.append(f"ignored an incomplete checkpoint: {error}")
            continue
        if not (path / STATE).exists():
            other = f'begin another run with [models] base = "{path}" in foundry.toml'
            if trainable_of(run_folder.read_config(folder)).needs_base:
                other = "begin another run"
            raise TrainingError(
                f"{path} is the newest whole checkpoint, but has no {STATE}/ to resume from: move it elsewhere to go "
                f"on from before it, or {other}"
            )
        return path, torn
    return None, torn


def check_version(path: Path) -> None:
    """Refuse a checkpoint whose READY.json is whole, but not of this version; a torn one is left to
    others.

    Raises:
        TrainingError: names its format and keys.
    """
    file, fields = path / run_folder.READY, dataclasses.fields(Ready)
    names = {"format", *(field.name for field in fields)}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return
    if isinstance(values, dict) and (
        values.get("format") != run_folder.FORMAT or not needed <= set(values) <= names
    ):
        raise TrainingError(
            f"{file} was written by another version of this code: format {values.get('format')!r} with keys "
            f"{sorted(values)}, this one reads format {run_folder.FORMAT} with {sorted(names)}; go on with the version "
            f"that wrote it, or move {path} elsewhere"
        )
