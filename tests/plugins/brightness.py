"""An annotator from outside the package: how bright an image is, as the probability of the tag
`bright`. Its weights are one number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.annotators.annotator import Annotator
from training.config.workspace import AnnotateConfig
from training.errors import ModelError

if TYPE_CHECKING:
    import torch


class Brightness(Annotator):
    """One row per image: whether it is bright."""

    model = "brightness"
    table, columns = "tags", ("tags",)
    stage = "brightness_tags"

    def __init__(self, folder: Path, device: str, config: AnnotateConfig) -> None:
        if not (path := folder / "config.json").is_file():
            raise ModelError(f"brightness: {path} is missing")
        self._scale = float(json.loads(path.read_text())["scale"])
        self._device = device

    def preprocess(self, image: np.ndarray) -> "torch.Tensor":
        import torch

        return torch.from_numpy(image.mean(axis=(0, 1))).float()  # (3,)

    def forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
        return pixels.to(self._device).mean(dim=1) * self._scale  # (B,)

    def rows(
        self, outputs: "torch.Tensor", sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Mapping[str, object]]:
        for probability in outputs.cpu().tolist():
            yield {"tags": [{"name": "bright", "probability": probability}]}
