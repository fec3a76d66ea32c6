"""Files that a table's rows name, beside those of its manifest: images of checkpoints and files
of releases; and scores that want an image's file. What `verify` looks at besides manifests.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import polars as pl

from resources.workspace.store import Store
from training.errors import DamageError
from training.manifests import Entry, Manifest, check_entry
from training.sampling.image_files import FAILED, can_be_drawn_again, read_or_explain

_MEND = "run `foundry verify --repair`"


class Damage(NamedTuple):
    """What is wrong with a part whose own files are whole."""

    detail: str
    files: tuple[Path, ...] = ()
    """Files that are gone or not what was written."""


def find_damage(store: Store, manifest: Manifest) -> Damage | None:
    """What is wrong with the files that a committed part names; None for nothing."""
    match manifest.table:
        case "sample_images":
            return _in_images(store, manifest.part)
        case "eval_metrics":
            return _in_scores(store, manifest.part)
        case "release":
            return _in_release(store, manifest.part)
    return None


def _in_images(store: Store, part: str) -> Damage | None:
    """Images that are not as they were drawn."""
    folder = store.paths.sample_folder(part)
    rows = store.read("sample_images", ["file", "sha256"], [part]).drop_nulls()
    found = {}
    for file, sha256 in rows.iter_rows():
        image = read_or_explain(folder, file)
        if isinstance(image, str):
            found[folder / file] = image
        elif hashlib.sha256(image.tobytes()).hexdigest() != sha256:
            found[folder / file] = f"{file} is not the image that was drawn"
    if not found:
        return None
    first = next(iter(found.values()))
    return Damage(
        f"{len(found)} of {rows.height} images in {folder}, such as: {first}; {_MEND}",
        tuple(found),
    )


def _in_scores(store: Store, part: str) -> Damage | None:
    """Scores that are missing for want of an image: drawn again it is equal, so that nothing else
    would tell."""
    rows = store.read("eval_metrics", ["prompt_id", "metric", "reason"], [part]).filter(
        pl.col("metric") == FAILED
    )
    reasons = [reason for reason in rows["reason"] if can_be_drawn_again(reason)]
    if not reasons:
        return None
    return Damage(f"scores of {part} lack {len(reasons)} images, such as: {reasons[0]}; {_MEND}")


def _in_release(store: Store, part: str) -> Damage | None:
    """Files of a release that are not as they were made."""
    folder, found = store.home / "release" / part, {}
    for file, num_bytes, sha256 in store.read(
        "release", ["file", "bytes", "sha256"], [part]
    ).iter_rows():
        try:
            check_entry(folder, Entry(name=file, bytes=num_bytes, sha256=sha256))
        except DamageError as error:
            found[folder / file] = str(error)
    return Damage(next(iter(found.values())), tuple(found)) if found else None
