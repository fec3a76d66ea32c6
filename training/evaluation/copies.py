"""Does a model repeat its training images? The nearest training image of each image, by CLIP's
embedding.

These are CLIP neighbours: CLIP sees what an image shows, so that two photographs of one scene are
neighbours without being copies. What tells is the comparison with images that cannot be copies:
the validation images, which were never trained on, and the base model's images of the same
prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 16_384
"""Training images compared at a time."""
_QUERY_ROWS = 1_024
QUANTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}
Block = tuple[Sequence[str], np.ndarray]
"""Ids of images, and their embeddings `(M, d)` of length 1 in any float type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The nearest image of each query, in the order of the queries."""

    similarity: np.ndarray
    """`(N,)` fp32 cosines."""
    image_ids: np.ndarray
    """`(N,)` strings. Of equally near images the first in the order of the blocks."""


def nearest(queries: np.ndarray, blocks: Iterable[Block]) -> Nearest | None:
    """Find the image with the largest cosine for each query.

    Works off one block after the other, at most 16,384 images by 1,024 queries at a time (about 130
    MB at width 768), so that memory does not grow with the number of images or queries.

    Args:
        queries: `(N, d)` of length 1.
        blocks: Images in blocks; all their embeddings are finite.

    Returns:
        One row per query; None where there is no image.
    """
    vectors = np.ascontiguousarray(queries, dtype=np.float32)
    best = np.full(len(vectors), -np.inf, dtype=np.float32)
    image_ids = np.full(len(vectors), "", dtype=object)
    for ids, embeddings in blocks:
        for start in range(0, len(embeddings), BLOCK_ROWS):
            rows = np.asarray(embeddings[start : start + BLOCK_ROWS], dtype=np.float32)  # (m, d)
            for first in range(0, len(vectors), _QUERY_ROWS):
                part = slice(first, first + _QUERY_ROWS)
                products = vectors[part] @ rows.T  # (n, m)
                places = products.argmax(axis=1)
                values = products[np.arange(len(products)), places]
                better = np.flatnonzero(values > best[part])
                best[first + better] = values[better]
                image_ids[first + better] = [ids[start + int(place)] for place in places[better]]
    return Nearest(similarity=best, image_ids=image_ids) if image_ids.all() else None


def summarise(samples: np.ndarray, baselines: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How near a checkpoint's images are to its training images, beside images that cannot be
    copies.

    Args:
        samples: `(N,)` cosines with the nearest training image.
        baselines: The same of `validation` images and of the `base` model's images; those that
            are there.

    Returns:
        `train_similarity_p50`, `_p95`, `_max`; the same of each baseline under
        `train_similarity_<baseline>_…`; and where there are validation images the share of images
        above their p95 (about 5 % without copying) and above their maximum.
    """
    found = {f"train_similarity_{name}": value for name, value in _quantiles(samples).items()}
    for baseline, values in baselines.items():
        found |= {
            f"train_similarity_{baseline}_{name}": value
            for name, value in _quantiles(values).items()
        }
    if "validation" in baselines:
        for name in ("p95", "max"):
            limit = found[f"train_similarity_validation_{name}"]
            found[f"train_similarity_above_{name}"] = float((samples > limit).mean())
    return found


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {
        name: float(np.quantile(values.astype(np.float64), share))
        for name, share in QUANTILES.items()
    }
