"""One pass over pictures: each is decoded once and shown to every annotator that is wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from training.config.workspace import AnnotateConfig, DecodeConfig
from training.images.decode_pool import DecodePool, Rejection
from training.tables.schemas import SCORED_BOX, SCORED_TAG, Reason

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """Images, and the networks that look at them."""

    models: Mapping[str, Path]
    """Folder per wanted name of ANNOTATORS."""
    images: Sequence[tuple[str, Path]]
    """`(image_id, path)`."""

    def __str__(self) -> str:
        return f"{len(self.images)} images from {self.images[0][0][:12]} on"


class Annotator:
    """Annotates batches of images; networks stay loaded as long as batches want the same ones."""

    def __init__(self, annotate: AnnotateConfig, decode: DecodeConfig, device: str) -> None:
        """Load nothing yet.

        Args:
            annotate: The detector's question.
            decode: Limits of decoding.
            device: Where the networks run.
        """
        self.annotate, self.device = annotate, device
        self.networks: dict[str, Any] = {}
        self.loaded: dict[str, Path] = {}
        self.pool = DecodePool(decode)
        self.pool.__enter__()

    def close(self) -> None:
        """Drop the networks, and end the processes that decode."""
        self.networks, self.loaded = {}, {}
        self.pool.__exit__(None, None, None)

    def __call__(self, batch: ImageBatch) -> pl.DataFrame:
        """Annotate images; one row each, in order, in the schema ROWS.

        Images are preprocessed as they are decoded, so that only small tensors of a batch are held
        at a time.

        Raises:
            ModelError: a folder is incomplete or of another architecture.
        """
        import torch

        if self.loaded != batch.models:
            self._load(batch.models)
        prepared: dict[str, list[torch.Tensor]] = {name: [] for name in self.networks}
        sizes: list[tuple[int, int]] = []
        rows: list[dict[str, Any]] = []
        good: list[dict[str, Any]] = []
        decoded = self.pool.pixels(
            [path for _, path in batch.images], [image_id for image_id, _ in batch.images]
        )
        for (image_id, _), pixels in zip(batch.images, decoded, strict=True):
            rows.append({"image_id": image_id})
            if isinstance(pixels, Rejection):
                rows[-1]["failure"] = f"{pixels.reason}: {pixels.detail or pixels.value}"
                continue
            good.append(rows[-1])
            sizes.append(pixels.shape[:2])
            for name, network in self.networks.items():
                prepared[name].append(network.preprocess(pixels))
        if good:
            self._fill(good, {name: torch.stack(items) for name, items in prepared.items()}, sizes)
        return pl.DataFrame(rows, schema=ROWS)

    def _load(self, models: Mapping[str, Path]) -> None:
        """Have exactly the networks of `models`: the others are dropped first."""
        from training.annotators.clip import Clip
        from training.annotators.detector import Detector
        from training.annotators.tagger import Tagger

        kept = {name for name, folder in models.items() if self.loaded.get(name) == folder}
        self.networks = {name: self.networks[name] for name in kept}
        self.loaded = {}
        for name in [name for name in ANNOTATORS if name in models and name not in kept]:
            if name == "clip":
                self.networks[name] = Clip.load(models[name], self.device)
            elif name == "tagger":
                self.networks[name] = Tagger.load(models[name], self.device)
            else:
                self.networks[name] = Detector.load(
                    models[name], self.device, self.annotate.watermark_query
                )
        self.loaded = dict(models)

    def _fill(
        self, rows: list[dict[str, Any]], prepared: Mapping[str, Any], sizes: list[tuple[int, int]]
    ) -> None:
        """Run the networks over the prepared tensors and put what they say into the rows."""
        if clip := self.networks.get("clip"):
            for row, seen in zip(
                rows, clip.postprocess(*clip.forward(prepared["clip"])), strict=True
            ):
                row["vector"], row["projection"] = seen.cls.tolist(), seen.embedding.tolist()
        if tagger := self.networks.get("tagger"):
            said = tagger.postprocess(tagger.forward(prepared["tagger"]))
            for row, tags in zip(rows, said, strict=True):
                row["tags"] = [{"name": name, "probability": value} for name, value in sorted(tags)]
        if detector := self.networks.get("detector"):
            found = detector.postprocess(*detector.forward(prepared["detector"]), sizes)
            for row, boxes in zip(rows, found, strict=True):
                row["boxes"] = [asdict(box) for box in boxes]


def failures(rows: pl.DataFrame) -> list[dict[str, object]]:
    """Rejections for the pictures that could no longer be decoded."""
    failed = rows.filter(pl.col("failure").is_not_null())
    return [
        {"image_id": image_id, "reason": Reason.ANNOTATION_FAILED, "detail": detail}
        for image_id, detail in failed.select("image_id", "failure").iter_rows()
    ]
