"""What an annotator is: one network that looks at images and fills columns of one table."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl

from training.config.workspace import AnnotateConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is shown of a shard's rows."""

    numbers: Mapping[str, object] = field(default_factory=dict)
    """By label."""
    tables: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    """Rows by label."""
    plots: Mapping[str, str] = field(default_factory=dict)
    """Markdown by label."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ids of images to show, by label."""


class Annotator(ABC):
    """Base of all annotators. The first line of a subclass's docstring says in the UI what a row of
    its stage holds.

    A module that defines one imports neither torch nor transformers at its top: Dagster reads the
    class to draw the graph. They belong into `__init__` and the methods.
    """

    model: ClassVar[str]
    """Key under [models]: the folder of its weights; also the value of the column `model`."""
    table: ClassVar[str]
    """Table that its rows go to. Several annotators may write to one, each its own parts."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of the table that its rows fill, beside `image_id` and `model`."""
    stage: ClassVar[str] = ""
    """Name of its stage, where that is not the table's."""
    version: ClassVar[int] = 1
    """Raised by hand when its rows change for equal images and weights."""
    settings: ClassVar[tuple[str, ...]] = ("batch_size",)
    """Keys of [annotate] that its rows follow from."""
    kinds: ClassVar[tuple[str, ...]] = ("pytorch",)
    """Labels in the UI."""

    @abstractmethod
    def __init__(self, folder: Path, device: str, config: AnnotateConfig) -> None:
        """Load the network.

        Raises:
            ModelError: `folder` is incomplete, or of another architecture.
        """

    @abstractmethod
    def preprocess(self, image: np.ndarray) -> "torch.Tensor":
        """`(H, W, 3)` uint8, upright sRGB, to what `forward` takes, of one size for all images."""

    @abstractmethod
    def forward(self, pixels: "torch.Tensor") -> Any:
        """What the network says of preprocessed images `(B, ...)`, which are on the CPU."""

    @abstractmethod
    def rows(
        self, outputs: Any, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Mapping[str, object]]:
        """One row per image: a value for each of `columns`.

        Args:
            outputs: What `forward` returned.
            sizes: (height, width) of each source image, pixels.
        """

    @classmethod
    def report(cls, frame: pl.DataFrame) -> Report:
        """What is shown of a shard's rows, of which there is at least one."""
        return Report()

    @classmethod
    def stage_name(cls) -> str:
        """Name of its stage."""
        return cls.stage or cls.table

    @classmethod
    def about(cls) -> str:
        """What a row of its stage holds, one sentence or two."""
        return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
