"""What a checkpoint's images are compared with as a whole: the base's images of the same
prompts, the images that it was trained on, and the validation images of that set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from training.evaluation import copies, distances, overbaked
from training.evaluation.copies import Block, Nearest
from training.evaluation.overbaked import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImages:
    """The base model's images of the prompts that count, as far as they could be scored."""

    embeddings: np.ndarray
    """`(N, d)` of length 1."""
    levels: Levels
    """Measures of `overbaked`, `(N,)` each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingImages:
    """The set that a checkpoint was trained on."""

    images: pl.DataFrame
    """image_id, shard, split (train, validation); one row per image of the set."""
    embeddings_of: Callable[[pl.DataFrame], Iterator[Block]]
    """Reads the embeddings of rows of `images`, a shard at a time; images without one are left
    out."""
    levels: Levels
    """Measures of `overbaked` of at most 256 training images, see `sample`; may be of none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What the comparison found."""

    summary: dict[str, float]
    """Rows of the summary."""
    nearest: Nearest | None
    """The nearest training image of each image; None where there is no training image to compare
    with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What is there to compare with; a base model has neither."""

    base: BaseImages | None = None
    training: TrainingImages | None = None

    def compare(self, embeddings: np.ndarray, levels: Levels, counts: np.ndarray) -> Compared:
        """Compare images with the references.

        Args:
            embeddings: `(N, d)` of length 1.
            levels: Their measures, `(N,)` each.
            counts: `(N,)` bool: which images the summary is over.

        Returns:
            The summaries of `overbaked`, `copies` and `distances`, as far as there is something to
            compare with, and the nearest training image of every image.
        """
        base = self.base if self.base is not None and len(self.base.embeddings) else None
        measured = self.training.levels if self.training is not None else None
        own = {name: values[counts] for name, values in levels.items()}
        summary = overbaked.summarise(own, base.levels if base else None, measured)
        if self.training is None:
            return Compared(summary=summary, nearest=None)
        width = embeddings.shape[1]
        train = self.training.images.filter(pl.col("split") == "train")
        validation = self._gather(
            self.training.images.filter(pl.col("split") == "validation"), width
        )
        real = self._gather(sample(train, int(counts.sum())), width)
        clouds = {"": embeddings[counts], "_floor": real} | (
            {"_base": base.embeddings} if base else {}
        )
        for suffix, cloud in clouds.items():
            if min(len(cloud), len(validation)) >= distances.MIN_IMAGES:
                summary |= {f"cmmd{suffix}": distances.cmmd(cloud, validation)}
                summary |= {f"kid{suffix}": distances.kid(cloud, validation)}
        summary |= {
            "num_validation_images": float(len(validation)),
            "num_floor_images": float(len(real)),
        }
        queries = [embeddings, validation, *([base.embeddings] if base else [])]
        found = copies.nearest(np.concatenate(queries), self.training.embeddings_of(train))
        if found is None:
            return Compared(summary=summary, nearest=None)
        parts = np.split(found.similarity, np.cumsum([len(part) for part in queries])[:-1])
        baselines = {
            name: part
            for name, part in zip(("validation", "base"), parts[1:], strict=False)
            if len(part)
        }
        summary |= copies.summarise(parts[0][counts], baselines)
        return Compared(
            summary=summary,
            nearest=Nearest(similarity=parts[0], image_ids=found.image_ids[: len(embeddings)]),
        )

    def _gather(self, images: pl.DataFrame, width: int) -> np.ndarray:
        """Embeddings `(N, width)` of a few images."""
        assert self.training is not None
        blocks = [
            np.asarray(vectors, dtype=np.float32)
            for _, vectors in self.training.embeddings_of(images)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, width), dtype=np.float32)


def sample(images: pl.DataFrame, count: int) -> pl.DataFrame:
    """The `count` images with the smallest ids: SHA-256s, so an even draw that moves little when
    the set grows."""
    return images.sort("image_id").head(count)
