"""What a run trains and how it is saved: asked by all that would otherwise assume the whole model.

Loop, checkpoints, averages, estimates, bundle, release and sampling know nothing of their own about
it. `full_model.py` has the whole model; `trainables.py` decides which one a run has.
docs/extending.md shows how another is added.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from training.models.unet_layers import Layer

if TYPE_CHECKING:
    import torch

    from training.models.unet import PipelineParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained at one layer of the UNet."""

    own: bool = False
    """Whether the layer's own weight and bias are."""
    added: tuple[tuple[int, ...], ...] = ()
    """Shapes of the trained parameters that are put beside them."""
    products: tuple[int, ...] = ()
    """Multiply-adds per position of what is added to the layer's result, one product after the
    other."""

    def __bool__(self) -> bool:
        """Whether anything is."""
        return self.own or bool(self.added)


class Trainable(Protocol):
    """What is trained; made from a run's config by `trainable_of`. Free of torch until a model is
    there."""

    needs_base: bool
    """Whether a checkpoint holds only what was trained, to be put into the base model again; else
    it is a whole model, which needs no other file."""
    about_files: str
    """What the files of a checkpoint are, for the table of a release."""

    @property
    def about(self) -> str:
        """What is trained, for people: `UNet and text encoder 1`."""

    @property
    def text_encoders(self) -> tuple[bool, bool]:
        """Whether text encoders 1 and 2 are trained."""

    def at(self, layer: Layer) -> Trained:
        """What is trained at a layer of the UNet: all that estimates need."""

    def inject(self, parts: "PipelineParts") -> "dict[str, torch.nn.Parameter]":
        """Put what is trained into a model, and set `requires_grad` on it and on nothing else.

        Called by every rank with equal models, and must leave equal ones.

        Returns:
            The trained parameters, by their names in `named_modules`: `unet.conv_in.weight`. Every
            one of them gets a gradient in every step; those of the UNet and of the text encoders
            have learning rates of their own.
        """

    def save(
        self,
        folder: Path,
        parts: "PipelineParts",
        weights: "Mapping[str, torch.Tensor]",
        base_digest: str,
    ) -> None:
        """Write a checkpoint's weights, or their averages, as safetensors.

        Args:
            folder: Where to; created where missing.
            parts: The model, of which only what is not trained may be read.
            weights: The trained ones in fp32, by name; and, unless `needs_base`, what the precision
                rounded of the others.
            base_digest: Of the base model, which goes with what `needs_base`.
        """

    def load(self, folder: Path, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """Those of some trained weights, by name, that are in a folder that `save` wrote; on the
        CPU.

        Raises:
            ModelError: the folder holds no such files.
        """
