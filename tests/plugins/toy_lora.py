"""A trainable from outside the package: a change of low rank to the values that cross-attention
reads, in a UNet that stays as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training import seeds
from training.config.run import RunConfig
from training.errors import ModelError
from training.models.trainable import Trained
from training.models.trainables import TRAINABLES
from training.models.unet import PipelineParts
from training.models.unet_layers import Layer

RANK = 2
FILE = "toy_lora.safetensors"
_ADAPTED = ".attn2.to_v"


class LowRank(torch.nn.Module):
    """A linear layer with the product of two small ones beside it, which begins at zero."""

    def __init__(self, base: torch.nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        down = torch.randn(RANK, base.in_features, generator=generator) / base.in_features**0.5
        self.down = torch.nn.Parameter(down.to(base.weight.device))
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, RANK).to(base.weight.device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return self.base(hidden) + linear(linear(hidden, self.down), self.up)


def adapt(unet: torch.nn.Module, seed: int) -> None:
    """Freeze a UNet and put the products beside its weights."""
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if name.endswith(_ADAPTED):
            generator = seeds.torch_generator(seed, seeds.Purpose.INIT, name)
            unet.get_submodule(name.rpartition(".")[0]).to_v = LowRank(module, generator)


@dataclass(frozen=True)
class ToyLora:
    """See `training.models.trainable.Trainable`."""

    config: RunConfig
    needs_base = True
    about = "values of cross-attention, at rank 2"
    about_files = "weights of toy_lora, which belong to a base model"
    text_encoders = (False, False)

    def at(self, layer: Layer) -> Trained:
        if not layer.name.endswith(_ADAPTED):
            return Trained()
        shapes = (RANK, layer.inputs), (layer.outputs, RANK)
        return Trained(added=shapes, products=(RANK * layer.inputs, layer.outputs * RANK))

    def inject(self, parts: PipelineParts) -> dict[str, torch.nn.Parameter]:
        for encoder in parts.text_encoders:
            encoder.requires_grad_(False)
        adapt(parts.unet, self.config.seed)
        return {
            f"unet.{name}": parameter
            for name, parameter in parts.unet.named_parameters()
            if parameter.requires_grad
        }

    def save(
        self,
        folder: Path,
        parts: PipelineParts,
        weights: Mapping[str, torch.Tensor],
        base_digest: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), folder / FILE, metadata={"base_digest": base_digest})

    def load(self, folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
        if not (folder / FILE).is_file():
            raise ModelError(f"{folder} has no {FILE}")
        saved = load_file(folder / FILE)
        return {name: saved[name] for name in names if name in saved}


TRAINABLES["toy_lora"] = ToyLora
