"""One pass over pictures: each is decoded once and shown to every annotator that is wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from training.config.workspace import AnnotateConfig, DecodeConfig
from training.images.decode_pool import DecodePool, ImageFile, Rejection
from training.tables.table import SCORED_BOX, SCORED_TAG, Reason

ANNOTATORS = ("clip", "tagger", "detector")
"""Names under [models]; each fills its own table."""

ROWS = pl.Schema(
    {
        "image_id": pl.String(),
        "failure": pl.String(),
        "vector": pl.List(pl.Float32),
        "projection": pl.List(pl.Float32),
        "tags": pl.List(SCORED_TAG),
        "boxes": pl.List(SCORED_BOX),
    }
)
"""What a batch returns; columns of annotators that were not asked are null."""


class Annotator:
    """Loads the wanted networks once and annotates batches of pictures."""

    def __init__(
        self,
        models: Mapping[str, Path],
        annotate: AnnotateConfig,
        decode: DecodeConfig,
        device: str,
    ) -> None:
        """Load networks.

        Args:
            models: Folder per wanted name of ANNOTATORS.
            annotate: The detector's question.
            decode: Limits of decoding.
            device: Where the networks run.

        Raises:
            ModelError: a folder is incomplete or of another architecture.
        """
        from training.annotators.clip import Clip
        from training.annotators.detector import Detector
        from training.annotators.tagger import Tagger

        self.clip = Clip.load(models["clip"], device) if "clip" in models else None
        self.tagger = Tagger.load(models["tagger"], device) if "tagger" in models else None
        self.detector = (
            Detector.load(models["detector"], device, annotate.watermark_query)
            if "detector" in models
            else None
        )
        self.pool = DecodePool(decode)
        self.pool.__enter__()

    def __call__(self, batch: Sequence[tuple[str, ImageFile]]) -> pl.DataFrame:
        """Annotate (image_id, file) pairs; one row each, in order, in the schema ROWS.

        Pictures are preprocessed as they are decoded, so that only small tensors of a batch are
        held at a time.
        """
        import torch

        prepared: dict[str, list[torch.Tensor]] = {name: [] for name in ANNOTATORS}
        sizes: list[tuple[int, int]] = []
        rows: list[dict[str, Any]] = []
        good: list[dict[str, Any]] = []
        decoded = self.pool.pixels([file for _, file in batch], [image_id for image_id, _ in batch])
        for (image_id, _), pixels in zip(batch, decoded, strict=True):
            rows.append({"image_id": image_id})
            if isinstance(pixels, Rejection):
                rows[-1]["failure"] = f"{pixels.reason}: {pixels.detail or pixels.value}"
                continue
            good.append(rows[-1])
            sizes.append(pixels.shape[:2])
            for name in ANNOTATORS:
                if (network := getattr(self, name)) is not None:
                    prepared[name].append(network.preprocess(pixels))
        if good:
            self._fill(
                good, {name: torch.stack(items) for name, items in prepared.items() if items}, sizes
            )
        return pl.DataFrame(rows, schema=ROWS)

    def _fill(
        self, rows: list[dict[str, Any]], prepared: Mapping[str, Any], sizes: list[tuple[int, int]]
    ) -> None:
        """Run the networks over the prepared tensors and put what they say into the rows."""
        if self.clip is not None:
            for row, seen in zip(
                rows, self.clip.postprocess(*self.clip.forward(prepared["clip"])), strict=True
            ):
                row["vector"], row["projection"] = seen.cls.tolist(), seen.embedding.tolist()
        if self.tagger is not None:
            said = self.tagger.postprocess(self.tagger.forward(prepared["tagger"]))
            for row, tags in zip(rows, said, strict=True):
                row["tags"] = [{"name": name, "probability": value} for name, value in sorted(tags)]
        if self.detector is not None:
            found = self.detector.postprocess(*self.detector.forward(prepared["detector"]), sizes)
            for row, boxes in zip(rows, found, strict=True):
                row["boxes"] = [asdict(box) for box in boxes]


def failures(rows: pl.DataFrame) -> list[dict[str, object]]:
    """Rejections for the pictures that could no longer be decoded."""
    failed = rows.filter(pl.col("failure").is_not_null())
    return [
        {"image_id": image_id, "reason": Reason.ANNOTATION_FAILED, "detail": detail}
        for image_id, detail in failed.select("image_id", "failure").iter_rows()
    ]
