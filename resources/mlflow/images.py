"""A checkpoint's images in MLflow: in the image grid with its slider of steps, and in a table of
prompts that MLflow shows beside those of other runs. All names follow from what is shown, so that
sending again repeats nothing.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
from PIL import Image, ImageOps

from resources.mlflow import calls
from resources.mlflow.views import IMAGES_TAG, Images

if TYPE_CHECKING:
    from mlflow.entities import Run

DUE_TAG = "mlflow.foundry.checkpoints_due"
"""Tag of a run: the interval of its checkpoints and its length, samples. MLflow's pages leave out
tags of its own."""
_GROUP = "samples"
"""Section of MLflow's page that the image grid is in."""
_SHOWN_TAG, _TABLES_TAG = "mlflow.loggedImages", "mlflow.loggedArtifacts"
"""By these MLflow knows that a run has images and tables."""
_THUMBNAIL_PX = 256
_CELL_PX = 512
"""Side of the square that MLflow fits into a column of its evaluation view, whose rows show the
upper half of it."""
_MAX_STEPS = 200
"""Checkpoints that a run's tag names; MLflow's tags hold 8,000 characters."""
_PROMPT_CHARACTERS = 200


class Shown(NamedTuple):
    """One image in the grid."""

    name: str
    """Its prompt, in characters for keys and files."""
    prompt: str
    """What it shows, for people."""
    path: str
    """Its artifact."""
    picture: Image.Image


def put(
    run: "Run", step: int, chosen: pl.DataFrame, folder: Path, write: Callable[[str, bytes], None]
) -> dict[str, str]:
    """Write images and, for the newest checkpoint of its run, the table of prompts.

    Args:
        run: The checkpoint's run.
        step: The checkpoint's samples_seen.
        chosen: Rows of table `sample_images`; an image that was not drawn or cannot be read is
            left out.
        folder: Where their files are.
        write: Writes one artifact; the same name again replaces it.

    Returns:
        Tags that the run needs.
    """
    shown = [
        item
        for row in chosen.iter_rows(named=True)
        if (item := _put(run, step, row, folder, write)) is not None
    ]
    if not shown:
        return {}
    prompt_set = _digest(chosen)
    before = Images.read(run.data.tags)
    steps = set(before.steps) if before is not None and before.prompt_set == prompt_set else set()
    keys = tuple(f"{_GROUP}/{item.name}" for item in shown)
    now = Images(prompt_set, keys, tuple(sorted(steps | {step}))[-_MAX_STEPS:])
    table = f"prompts-{prompt_set}.json"
    if step == now.steps[-1]:
        cells = [[item.prompt, _put_cell(item, f"prompts/{prompt_set}", write)] for item in shown]
        write(table, json.dumps({"columns": ["prompt", "newest"], "data": cells}).encode())
    tables = json.loads(run.data.tags.get(_TABLES_TAG, "[]"))
    entry = {"path": table, "type": "table"}
    listed = tables if entry in tables else [*tables, entry]
    return {_SHOWN_TAG: "True", _TABLES_TAG: json.dumps(listed), IMAGES_TAG: now.tag()}


def _put(
    run: "Run", step: int, row: dict[str, Any], folder: Path, write: Callable[[str, bytes], None]
) -> Shown | None:
    """One image of the grid and its thumbnail."""
    if row["file"] is None:
        return None
    try:
        with Image.open(folder / row["file"], formats=("PNG",)) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None  # counted by its checkpoint's scores
    name = calls.slug(row["prompt_id"])
    unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{run.info.run_id}/{step}/{row['prompt_id']}")
    # The form of `MlflowClient.log_image`, whose own names differ each time: drawing again would
    # add, not replace.
    stem = f"images/{_GROUP}~{name}+step+{step}+timestamp+{run.info.start_time}+{unique}"
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    write(f"{stem}.png", (folder / row["file"]).read_bytes())
    write(f"{stem}+compressed.webp", _webp(small))
    return Shown(
        name, f"{row['prompt_id']}: {row['text']}"[:_PROMPT_CHARACTERS], f"{stem}.png", picture
    )


def _put_cell(item: Shown, folder: str, write: Callable[[str, bytes], None]) -> dict[str, str]:
    """An image in a table, in the form of `MlflowClient.log_table`: made so that MLflow's cell
    shows all of it."""
    cell = Image.new("RGBA", (_CELL_PX, _CELL_PX))
    small = ImageOps.contain(item.picture, (_CELL_PX, _CELL_PX // 2))
    cell.paste(small, ((_CELL_PX - small.width) // 2, 0))
    path = f"{folder}/{item.name}.webp"
    write(path, _webp(cell))
    return {"type": "image", "filepath": item.path, "compressed_filepath": path}


def _webp(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP")
    return content.getvalue()


def _digest(chosen: pl.DataFrame) -> str:
    """What makes images comparable beside the model: the prompts, and the size and noise of each
    image."""
    prompts = chosen.select("prompt_id", "text", "negative", "seed", "height", "width").rows()
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:6]


def choose_images(samples: pl.DataFrame, count: int) -> pl.DataFrame:
    """The first images of each group in turn, `count` in all: the same prompts for every
    checkpoint."""
    turn = pl.int_range(pl.len()).over("group").alias("turn")
    return (
        samples.sort("prompt_id").with_columns(turn).sort("turn", "group").head(count).drop("turn")
    )


def due_step(tags: Mapping[str, str], step: int) -> int:
    """Where the grid of images shows a checkpoint: at the multiple of the interval, or the end,
    at which it was due.

    Training saves with the first step at or behind that, which depends on the batch size: runs with
    the same interval would have no step in common, and the slider shows one step.

    Args:
        tags: The run's.
        step: samples_seen of the checkpoint.
    """
    try:
        every, end = (int(number) for number in json.loads(tags[DUE_TAG]))
        batch = int(tags["foundry.global_batch_size"])
    except (KeyError, TypeError, ValueError):
        return step
    marks = [mark for mark in (step // every * every, end) if 0 < mark <= step < mark + batch]
    return max(marks, default=step)
