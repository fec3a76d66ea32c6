"""A checkpoint's images as files: reading them, and what is said of those that cannot be read or
scored."""

from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from training.errors import EvaluationError

DTYPE = "float32"
"""In which they are scored; part of the protocol that verdicts compare."""
FAILED = "failed"
"""Metric of the row that an image gets which could not be scored."""
NOT_DRAWN = "was not drawn, its pixels are not finite"
_MISSING, _DAMAGED = "is missing", "is damaged"
_MAX_NAMED = 5


def read_image(path: Path) -> np.ndarray:
    """An image of ours as `(H, W, 3)` uint8.

    Raises:
        EvaluationError: the file is missing or unreadable.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise EvaluationError(
            f"sample image {path} cannot be read ({error}): run `foundry verify --repair`"
        ) from error


def read_or_explain(folder: Path, file: str | None) -> np.ndarray | str:
    """An image of ours as `(H, W, 3)` uint8, or in words that are equal on every machine why there
    is none."""
    if file is None:
        return NOT_DRAWN
    try:
        return read_image(folder / file)
    except EvaluationError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return (
            f"{file} {_MISSING}"
            if missing
            else f"{file} {_DAMAGED} ({type(error.__cause__).__name__})"
        )


def read_if_there(folder: Path, file: str | None) -> np.ndarray | None:
    """An image of ours as `(H, W, 3)` uint8; None where there is none that can be read."""
    found = read_or_explain(folder, file)
    return None if isinstance(found, str) else found


def refusal(checkpoint: str, metrics: pl.DataFrame) -> str:
    """Why no verdict can be given on a checkpoint, and what to do; empty where all of its images
    have scores.

    Args:
        checkpoint: Its name.
        metrics: Its rows of table `eval_metrics`.
    """
    failed = metrics.filter(pl.col("metric") == FAILED).sort("prompt_id")
    if failed.is_empty():
        return ""
    total = metrics["prompt_id"].drop_nulls().n_unique()
    first = failed.select("prompt_id", "reason").head(_MAX_NAMED)
    named = ", ".join(f"{prompt_id!r} ({reason})" for prompt_id, reason in first.iter_rows())
    more = f" and {failed.height - _MAX_NAMED} more" if failed.height > _MAX_NAMED else ""
    advice = (
        "run `foundry verify --repair`, then `foundry run` draws and scores them again"
        if any(can_be_drawn_again(reason) for reason in failed["reason"])
        else "the checkpoint is broken"
    )
    return (
        f"{failed.height} of {total} images of {checkpoint} have no scores: {named}{more}; {advice}"
    )


def can_be_drawn_again(reason: str) -> bool:
    """Whether an image had no scores for want of its file."""
    return reason.endswith(_MISSING) or f" {_DAMAGED} (" in reason
