"""CLIP score and aesthetic score of each picture, from one pass of CLIP; the embeddings are kept, so that scoring anew
never means sampling anew. Always fp32: in 16 bits a score moves by more than most checkpoints differ.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from training.data.tables import TABLES
from training.errors import EvaluationError
from training.evaluation import summary
from training.models.aesthetic import Aesthetic
from training.models.clip import Clip

DTYPE = "float32"
"""Of all scores; part of the protocol that verdicts compare."""
_ROW_SCHEMA = ("prompt_id", "group", "metric", "value", "embedding")


def score(samples: pl.DataFrame, folder: Path, clip: Clip, aesthetic: Aesthetic, *, batch_size: int) -> pl.DataFrame:
    """Score a checkpoint's pictures.

    Args:
        samples: Rows of table `sample_images`.
        folder: Where their files are.
        clip: Encodes each picture and each distinct prompt once.
        aesthetic: Reads CLIP's embeddings.
        batch_size: Pictures at a time.

    Returns:
        Rows of table `eval_metrics`: per picture `clip_score` (cosine of picture and prompt, not scaled, not clamped),
        `aesthetic` and `embedding`; and the summary's columns as rows without a prompt.

    Raises:
        EvaluationError: there is no picture, a file is missing or unreadable, or a score is not finite.
    """
    if samples.is_empty():
        raise EvaluationError(f"{folder} holds no sample images to score")
    samples = samples.sort("prompt_id")
    embeddings = _embed(folder, samples["file"].to_list(), clip, batch_size)  # (N, d)
    texts = list(dict.fromkeys(samples["text"].to_list()))
    vectors = np.concatenate([clip.encode_text(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)])
    own = vectors[[texts.index(text) for text in samples["text"]]]  # (N, d)
    scores = {
        # The sum in fp64: equal for equal embeddings, whatever the order of a dot product.
        "clip_score": (embeddings.astype(np.float64) * own).sum(axis=1),
        "aesthetic": np.array(aesthetic(embeddings), dtype=np.float64),
    }
    for metric, values in scores.items():
        broken = [samples["prompt_id"][int(row)] for row in np.flatnonzero(~np.isfinite(values))]
        if broken:
            raise EvaluationError(f"{metric} is not finite for {len(broken)} pictures, such as prompt {broken[0]!r}")
    return _rows(samples, scores, embeddings)


def _embed(folder: Path, files: Sequence[str], clip: Clip, batch_size: int) -> np.ndarray:
    """Projected embeddings `(N, d)` fp32 of length 1."""
    found = []
    for start in range(0, len(files), batch_size):
        batch = [read_picture(folder / file) for file in files[start : start + batch_size]]
        found += [row.embedding for row in clip(batch)]
    return np.stack(found)


def read_picture(path: Path) -> np.ndarray:
    """A picture of ours as `(H, W, 3)` uint8.

    Raises:
        EvaluationError: the file is missing or unreadable.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise EvaluationError(f"sample image {path} cannot be read ({error}): sample the checkpoint again") from error


def _rows(samples: pl.DataFrame, scores: dict[str, np.ndarray], embeddings: np.ndarray) -> pl.DataFrame:
    schema = TABLES["eval_metrics"].schema
    keys = samples.select("prompt_id", "group")
    frames = [
        keys.with_columns(
            pl.lit(metric).alias("metric"),
            pl.Series("value", values, dtype=pl.Float64),
            pl.lit(None, dtype=schema["embedding"]).alias("embedding"),
        )
        for metric, values in scores.items()
    ]
    frames.append(
        keys.with_columns(
            pl.lit("embedding").alias("metric"),
            pl.lit(None, dtype=pl.Float64).alias("value"),
            pl.Series("embedding", embeddings.astype(np.float32).tolist(), dtype=schema["embedding"]),
        )
    )
    summed = summary.summarise(scores["clip_score"], scores["aesthetic"])
    frames.append(
        pl.DataFrame(
            [{"metric": name, "value": value} for name, value in summed.items()],
            schema={"metric": pl.String, "value": pl.Float64},
        ).with_columns(*(pl.lit(None, dtype=schema[name]).alias(name) for name in ("prompt_id", "group", "embedding")))
    )
    return TABLES["eval_metrics"].conform(pl.concat([frame.select(_ROW_SCHEMA) for frame in frames]))
