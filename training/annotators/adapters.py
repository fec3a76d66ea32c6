"""The annotators of this package: CLIP's embeddings, JoyTag's tags, OWLv2's watermark boxes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from training.annotators.annotator import Annotator, Report
from training.config.workspace import AnnotateConfig
from training.images import figures

if TYPE_CHECKING:
    import torch

SHOWN_PROBABILITY = 0.4
SHOWN_CONFIDENCE = 0.3
_NUM_TAGS_SHOWN = 15
_NUM_MARKED_SHOWN = 12


class ClipEmbeddings(Annotator):
    """One row per image: what CLIP's vision tower sees, before and after its projection."""

    model = "clip"
    table = "embeddings"
    columns = ("vector", "projection")
    kinds = ("pytorch", "huggingface")

    def __init__(self, folder: Path, device: str, config: AnnotateConfig) -> None:
        from training.annotators.clip import Clip

        self._clip = Clip.load(folder, device)

    def preprocess(self, image: np.ndarray) -> "torch.Tensor":
        return self._clip.preprocess(image)

    def forward(self, pixels: "torch.Tensor") -> Any:
        return self._clip.forward(pixels)

    def rows(
        self, outputs: Any, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Mapping[str, object]]:
        for row in self._clip.postprocess(*outputs):
            yield {"vector": row.cls.tolist(), "projection": row.embedding.tolist()}

    @classmethod
    def report(cls, frame: pl.DataFrame) -> Report:
        norms = frame["vector"].list.eval(pl.element() ** 2).list.sum().sqrt().to_list()
        return Report(
            numbers={
                "dimensions": len(frame["vector"][0]),
                "projected dimensions": len(frame["projection"][0]),
            },
            plots={"norm of the vectors": figures.histogram(norms)},
        )


class JoyTags(Annotator):
    """One row per image: the tagger's names above a low floor. Thresholds come later."""

    model = "tagger"
    table = "tags"
    columns = ("tags",)

    def __init__(self, folder: Path, device: str, config: AnnotateConfig) -> None:
        from training.annotators.tagger import Tagger

        self._tagger = Tagger.load(folder, device)

    def preprocess(self, image: np.ndarray) -> "torch.Tensor":
        return self._tagger.preprocess(image)

    def forward(self, pixels: "torch.Tensor") -> Any:
        return self._tagger.forward(pixels)

    def rows(
        self, outputs: Any, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Mapping[str, object]]:
        for tags in self._tagger.postprocess(outputs):
            yield {"tags": [{"name": name, "probability": value} for name, value in sorted(tags)]}

    @classmethod
    def report(cls, frame: pl.DataFrame) -> Report:
        said = frame["tags"].explode().drop_nulls().struct.unnest()
        names = said.filter(pl.col("probability") >= SHOWN_PROBABILITY)["name"]
        top = names.value_counts(sort=True, name="n").head(_NUM_TAGS_SHOWN)
        rows = [{"tag": tag, "images": count} for tag, count in top.iter_rows()]
        return Report(tables={f"tags at {SHOWN_PROBABILITY}": rows})


class OwlWatermarks(Annotator):
    """One row per image: boxes of `a watermark` by OWLv2; an empty list means none found."""

    model = "detector"
    table = "watermark_boxes"
    columns = ("boxes",)
    settings = ("batch_size", "watermark_query")
    kinds = ("pytorch", "huggingface")

    def __init__(self, folder: Path, device: str, config: AnnotateConfig) -> None:
        from training.annotators.detector import Detector

        self._detector = Detector.load(folder, device, config.watermark_query)

    def preprocess(self, image: np.ndarray) -> "torch.Tensor":
        return self._detector.preprocess(image)

    def forward(self, pixels: "torch.Tensor") -> Any:
        return self._detector.forward(pixels)

    def rows(
        self, outputs: Any, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Mapping[str, object]]:
        confidences, boxes_of_square = outputs
        for boxes in self._detector.postprocess(confidences, boxes_of_square, sizes):
            yield {"boxes": [asdict(box) for box in boxes]}

    @classmethod
    def report(cls, frame: pl.DataFrame) -> Report:
        confidences = pl.element().struct.field("confidence")
        sure = frame.filter(pl.col("boxes").list.eval(confidences >= SHOWN_CONFIDENCE).list.any())
        examples = sure["image_id"].head(_NUM_MARKED_SHOWN).to_list()
        return Report(
            numbers={f"with a box at {SHOWN_CONFIDENCE}": sure.height},
            examples={"watermarked": examples} if examples else {},
        )
