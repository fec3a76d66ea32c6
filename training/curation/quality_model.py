"""The workspace's quality model: fitted from its own judgements, or the supplied one while there
are too few."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from training.config.workspace import QualityConfig
from training.curation.quality_scores import cut_points, percentiles, scores
from training.errors import ModelError

if TYPE_CHECKING:
    from training.annotators.quality_head import QualityModel

SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedQuality:
    """Heads, where they come from, and how good they are."""

    origin: str
    """`fitted` or `supplied`."""
    num_pairs: int
    cut_points: tuple[float, ...]
    report: dict[str, Any]
    save: Callable[[Path], None]
    """Writes the heads as one safetensors file."""


def fit(
    pairs: pl.DataFrame, embeddings: pl.DataFrame, config: QualityConfig, *, supplied: Path
) -> FittedQuality:
    """Fit utility and junk heads on judgements, or take the supplied ones where there are fewer
    than `min_pairs`.

    Args:
        pairs: pair_id, a, b, outcome; judgements on images that are gone are left out.
        embeddings: image_id and vector, one row per image: also the pool that the cut points are
            frozen on.
        config: From how many judgements on, and the shares of scores 1-9.
        supplied: Folder of the heads to fall back on.

    Raises:
        ModelError: the supplied heads read embeddings of another width.
    """
    from training.annotators.quality_head import QualityModel, fit_junk, fit_utility

    rows = {image_id: row for row, image_id in enumerate(embeddings["image_id"])}
    vectors = _matrix(embeddings)
    known = pairs.filter(pl.col("a").is_in(list(rows)) & pl.col("b").is_in(list(rows))).sort(
        "pair_id"
    )
    judged = known.filter(pl.col("outcome").is_in(["a", "b", "tie"]))
    junk = known.filter(pl.col("outcome") == "both_junk")
    report: dict[str, Any] = {}
    if judged.height < config.min_pairs:
        model, origin = QualityModel.load(supplied, "cpu"), "supplied"
    else:
        ids_a, ids_b = judged["a"].to_list(), judged["b"].to_list()
        target = (
            judged["outcome"]
            .replace_strict({"a": 1.0, "b": 0.0, "tie": 0.5}, return_dtype=pl.Float64)
            .to_numpy()
        )
        utility, utility_report = fit_utility(
            vectors[[rows[i] for i in ids_a]], vectors[[rows[i] for i in ids_b]], target,
            ids_a=ids_a, ids_b=ids_b, seed=SEED,
        )  # fmt: skip
        junk_ids = sorted({*junk["a"], *junk["b"]})
        good_ids = sorted({*ids_a, *ids_b} - set(junk_ids))
        report, junk_head = dict(utility_report), None
        if junk_ids:
            ids = [*junk_ids, *good_ids]
            is_junk = np.array([True] * len(junk_ids) + [False] * len(good_ids))
            junk_head, junk_report = fit_junk(
                vectors[[rows[i] for i in ids]], is_junk, ids=ids, seed=SEED
            )
            report = {**report, **{f"junk_{name}": value for name, value in junk_report.items()}}
        model, origin = QualityModel(utility, junk_head, (), "cpu"), "fitted"
    pool = np.array([row.utility for row in model(vectors)]) if len(vectors) else np.zeros(0)
    cuts = cut_points(pool, config.shares) if origin == "fitted" else model.cuts
    return FittedQuality(
        origin=origin,
        num_pairs=judged.height,
        cut_points=tuple(cuts),
        report=report,
        save=model.write_heads,
    )


def load(path: Path, cuts: Sequence[float]) -> "QualityModel":
    """The heads that `FittedQuality.save` wrote."""
    from training.annotators.quality_head import QualityModel

    return QualityModel.read_heads(path, cuts)


def judge(model: "QualityModel", embeddings: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Utility and junk probability `(N,)` of the rows of `embeddings`; without a junk head, nothing
    is junk."""
    rows = model(_matrix(embeddings)) if embeddings.height else []
    utility = np.array([row.utility for row in rows], dtype=np.float32)
    junk = np.array([row.junk_probability or 0.0 for row in rows], dtype=np.float32)
    return utility, junk


def score_table(
    raw: pl.DataFrame,
    utility: np.ndarray,
    junk: np.ndarray,
    aesthetic: Sequence[float],
    cuts: Sequence[float],
    config: QualityConfig,
) -> pl.DataFrame:
    """Rows of `quality_scores`.

    Args:
        raw: image_id, height, width, bytes and low-level measures, in the order of the other
            arguments.
        utility: `(N,)`.
        junk: Junk probability `(N,)`.
        aesthetic: LAION aesthetic score per image.
        cuts: Frozen cut points of scores 1-9.
        config: Junk threshold and the shares that the cut points stand for.
    """
    return raw.select(
        "image_id",
        pl.Series("utility", utility, dtype=pl.Float32),
        pl.Series("percentile", percentiles(utility, cuts, config.shares), dtype=pl.Float32),
        pl.Series("score", scores(utility, junk, cuts, config.junk_threshold), dtype=pl.Int8),
        pl.Series("junk_prob", junk, dtype=pl.Float32),
        pl.Series("aesthetic", np.asarray(aesthetic), dtype=pl.Float32),
        "brightness",
        "contrast",
        "sharpness",
        (pl.col("bytes") / (pl.col("height").cast(pl.Float64) * pl.col("width")))
        .cast(pl.Float32)
        .alias("bytes_per_pixel"),
    )


def _matrix(embeddings: pl.DataFrame) -> np.ndarray:
    """Vectors `(N, width)` fp32."""
    lengths = embeddings["vector"].list.len().unique()
    if len(lengths) > 1:
        raise ModelError(
            f"embeddings have widths {sorted(lengths)}: they are of different encoders"
        )
    width = int(lengths[0]) if len(lengths) else 0
    return (
        embeddings["vector"]
        .explode()
        .to_numpy()
        .astype(np.float32)
        .reshape(embeddings.height, width)
    )
