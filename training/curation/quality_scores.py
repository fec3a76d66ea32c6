"""From people's judgements to scores 0-9: reading the pairs, cutting utilities into scores.

The heads between the two are in `training/annotators/quality_head`; scores never come from them
alone: 0 is a decision of its own (junk), and 1-9 are shares of a pool, frozen as cut points.
"""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from training.errors import DataError
from training.tables.schemas import TABLES

OUTCOMES = ("a", "b", "tie", "both_junk", "skip")
ORIGINS = ("human", "vlm", "synthetic", "scripted")

_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


class Problem(NamedTuple):
    """A line of a label file that is no judgement; the others count."""

    file: str
    line: int
    """From 1."""
    what: str


def read_pairs(folder: Path) -> tuple[pl.DataFrame, list[Problem]]:
    """Read all judgements of a folder of append-only files, `<rater>.jsonl`.

    A line is an object with pair_id, a, b, outcome, origin, created_at (ISO 8601) and optionally
    rater (default: the file's name). A last line without an end was torn by a kill: it is reported
    and left out. Where a pair_id repeats, its last line counts (files in order of name): so people
    correct themselves.

    Returns:
        `quality_pairs`, and what was left out.
    """
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _judgement(line, path.stem)
            except (ValueError, RecursionError) as error:
                torn = number == len(lines)
                problems.append(
                    Problem(
                        path.name, number, "torn last line" if torn else f"not a judgement: {error}"
                    )
                )
            else:
                rows[row["pair_id"]] = row
    table = TABLES["quality_pairs"]
    return table.conform(
        pl.DataFrame(list(rows.values()), schema=table.schema, orient="row")
    ), problems


def _judgement(line: bytes, rater: str) -> dict[str, Any]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("no object")
    row = {
        "rater": rater,
        **{name: content[name] for name in TABLES["quality_pairs"].columns if name in content},
    }
    wrong = [name for name in TABLES["quality_pairs"].columns if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"no text in {wrong}")
    if row["outcome"] not in OUTCOMES or row["origin"] not in ORIGINS:
        raise ValueError(
            f"outcome {row['outcome'][:20]!r} or origin {row['origin'][:20]!r} is unknown"
        )
    if not all(_IMAGE_ID.fullmatch(row[side]) for side in "ab") or row["a"] == row["b"]:
        raise ValueError("a and b must be two different image ids")
    for value in row.values():
        value.encode()  # Lone surrogates, which JSON can spell, cannot be stored.
    moment = datetime.fromisoformat(row["created_at"])
    return {**row, "created_at": moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment}


def cut_points(utilities: np.ndarray, shares: Sequence[float]) -> list[float]:
    """The utilities that part a pool by the given shares.

    Args:
        utilities: (N,) of the pool, junk left out.
        shares: Share of the pool that gets score 1, 2, ... k; they sum to 1.

    Returns:
        k - 1 ascending values.

    Raises:
        DataError: no finite utilities.
    """
    values = np.asarray(utilities, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise DataError(
            f"cut points need finite utilities, got {np.isfinite(values).sum()} of {values.size}"
        )
    return np.quantile(values, np.cumsum(shares)[:-1]).tolist()


def scores(
    utility: np.ndarray, junk_prob: np.ndarray, cuts: Sequence[float], junk_threshold: float
) -> np.ndarray:
    """Score of each image: 0 for junk, else 1 + the number of cut points at or below its utility.
    (N,) int8.

    Raises:
        DataError: a utility or probability that is not finite.
    """
    if not (np.isfinite(utility).all() and np.isfinite(junk_prob).all()):
        raise DataError("scores need finite utilities and junk probabilities")
    # In float64, so that float32 utilities meet the cut points as they were cut.
    rank = 1 + np.searchsorted(
        np.asarray(cuts, dtype=np.float64), np.asarray(utility, dtype=np.float64), "right"
    )
    return np.where(np.asarray(junk_prob) >= junk_threshold, 0, rank).astype(np.int8)


def percentiles(utility: np.ndarray, cuts: Sequence[float], shares: Sequence[float]) -> np.ndarray:
    """Share of the cut points' pool below each utility, 0-1, without the pool. (N,) float32.

    Exact at the cut points, linear between them; beyond the outermost ones the remaining share
    falls off exponentially over the mean width of a step between cut points.
    """
    points = np.asarray(cuts, dtype=np.float64)
    below = np.cumsum(shares)[:-1]
    values = np.asarray(utility, dtype=np.float64)
    width = max((points[-1] - points[0]) / max(len(points) - 1, 1), 1e-9)
    inside = np.interp(values, points, below)
    low = below[0] * np.exp(np.minimum(values - points[0], 0) / width)
    high = 1 - (1 - below[-1]) * np.exp(np.minimum(points[-1] - values, 0) / width)
    result = np.where(values < points[0], low, np.where(values > points[-1], high, inside))
    return result.astype(np.float32)
