"""One pass over images: each is decoded once and shown to every annotator that is wanted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from training.annotators.annotator import Annotator
from training.config.workspace import AnnotateConfig, DecodeConfig
from training.images.decode_pool import DecodePool, ImageFile, Rejection
from training.tables.schemas import TABLES
from training.tables.table import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """Images, and the annotators that look at them."""

    annotators: Mapping[type[Annotator], Path]
    """Each with the folder of its weights."""
    images: Sequence[tuple[str, ImageFile]]
    """`(image_id, file)`."""

    def __str__(self) -> str:
        return f"{len(self.images)} images from {self.images[0][0][:12]} on"


class AnnotatorPass:
    """Annotates batches of images; annotators stay loaded as long as batches want the same ones."""

    def __init__(self, annotate: AnnotateConfig, decode: DecodeConfig, device: str) -> None:
        """Load nothing yet.

        Args:
            annotate: Settings of the annotators.
            decode: Limits of decoding.
            device: Where the networks run.
        """
        self._annotate, self._device = annotate, device
        self._loaded: dict[tuple[type[Annotator], Path], Annotator] = {}
        self._pool = DecodePool(decode)
        self._pool.__enter__()

    def __call__(self, batch: ImageBatch) -> pl.DataFrame:
        """Annotate images; one row each, in order, in the schema that `schema` gives.

        Images are preprocessed as they are decoded, so that only small tensors of a batch are held
        at a time.

        Raises:
            ModelError: a folder is incomplete or of another architecture.
        """
        import torch

        annotators = self._load(batch.annotators)
        prepared: dict[str, list[torch.Tensor]] = {name: [] for name in annotators}
        sizes: list[tuple[int, int]] = []
        rows: list[dict[str, Any]] = []
        decoded = self._pool.pixels(
            [file for _, file in batch.images], [image_id for image_id, _ in batch.images]
        )
        for (image_id, _), pixels in zip(batch.images, decoded, strict=True):
            rows.append({"image_id": image_id})
            if isinstance(pixels, Rejection):
                rows[-1]["failure"] = f"{pixels.reason}: {pixels.detail or pixels.value}"
                continue
            sizes.append(pixels.shape[:2])
            for name, annotator in annotators.items():
                prepared[name].append(annotator.preprocess(pixels))
        good = [row for row in rows if "failure" not in row]
        for name, annotator in annotators.items() if good else ():
            outputs = annotator.forward(torch.stack(prepared.pop(name)))
            for row, found in zip(good, annotator.rows(outputs, sizes), strict=True):
                row |= {_column(name, column): found[column] for column in annotator.columns}
        return pl.DataFrame(rows, schema=schema(batch.annotators))

    def close(self) -> None:
        """Drop the networks, and end the processes that decode."""
        self._loaded.clear()
        self._pool.__exit__(None, None, None)

    def _load(self, wanted: Mapping[type[Annotator], Path]) -> dict[str, Annotator]:
        """Have exactly the wanted annotators, by the names of their stages; the others are dropped
        first."""
        for key in [key for key in self._loaded if key not in wanted.items()]:
            del self._loaded[key]
        for kind, folder in wanted.items():
            if (kind, folder) not in self._loaded:
                self._loaded[kind, folder] = kind(folder, self._device, self._annotate)
        return {kind.stage_name(): self._loaded[kind, folder] for kind, folder in wanted.items()}


def schema(annotators: Iterable[type[Annotator]]) -> pl.Schema:
    """What a batch returns: `image_id`, `failure`, and `<stage>.<column>` of each annotator."""
    columns: dict[str, Any] = {"image_id": pl.String(), "failure": pl.String()}
    for kind in annotators:
        types = TABLES[kind.table].schema
        columns |= {_column(kind.stage_name(), name): types[name] for name in kind.columns}
    return pl.Schema(columns)


def rows_of(annotator: type[Annotator], rows: pl.DataFrame) -> pl.DataFrame:
    """What one annotator says of the images that could be decoded: rows of its table."""
    filled = [
        pl.col(_column(annotator.stage_name(), name)).alias(name) for name in annotator.columns
    ]
    good = rows.filter(pl.col("failure").is_null())
    return good.select("image_id", pl.lit(annotator.model).alias("model"), *filled)


def failures(rows: pl.DataFrame) -> list[dict[str, object]]:
    """Rejections for the images that could no longer be decoded."""
    failed = rows.filter(pl.col("failure").is_not_null())
    return [
        {"image_id": image_id, "reason": Reason.ANNOTATION_FAILED, "detail": detail}
        for image_id, detail in failed.select("image_id", "failure").iter_rows()
    ]


def _column(stage: str, name: str) -> str:
    return f"{stage}.{name}"
