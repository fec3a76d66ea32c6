"""Full fine-tuning: the UNet and text encoders of a model are trained themselves.

Imports torch only where there is a model: estimates ask what is trained without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.config.run import RunConfig
from training.errors import ConfigError
from training.models.trainable import Trained
from training.models.unet_layers import Layer

if TYPE_CHECKING:
    import torch

    from training.models.unet import PipelineParts


@dataclass(frozen=True, slots=True)
class FullModel:
    """The whole UNet, and the text encoders that the run's config names: a checkpoint is a diffusers
    folder."""

    config: RunConfig
    needs_base = False
    about_files = "model in diffusers layout"

    @property
    def about(self) -> str:
        """See `Trainable`."""
        numbers = [str(number) for number, on in enumerate(self.text_encoders, 1) if on]
        return "UNet" + (f" and text encoder {' and '.join(numbers)}" if numbers else "")

    @property
    def text_encoders(self) -> tuple[bool, bool]:
        """See `Trainable`."""
        return self.config.trained_text_encoders

    def at(self, layer: Layer) -> Trained:
        """See `Trainable`."""
        return Trained(own=True)

    def inject(self, parts: "PipelineParts") -> "dict[str, torch.nn.Parameter]":
        """See `Trainable`.

        Raises:
            ConfigError: the text encoder has fewer layers than `clip_skip`.
        """
        first, second = self.text_encoders
        return trained_parameters(
            parts,
            text_encoder=first,
            text_encoder_2=second,
            freeze_embeddings=self.config.freeze_embeddings,
            clip_skip=self.config.clip_skip,
        )

    def save(
        self,
        folder: Path,
        parts: "PipelineParts",
        weights: "Mapping[str, torch.Tensor]",
        base_digest: str,
    ) -> None:
        """See `Trainable`; the base model is not needed again."""
        import torch

        from training.models.saving import save_diffusers_folder

        save_diffusers_folder(parts, folder, torch.float32, weights)

    def load(self, folder: Path, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """See `Trainable`."""
        from training.models.unet import read_weights

        return read_weights(folder, names)


def trained_parameters(
    parts: "PipelineParts",
    *,
    text_encoder: bool,
    text_encoder_2: bool,
    freeze_embeddings: bool = False,
    clip_skip: int = 1,
) -> "dict[str, torch.nn.Parameter]":
    """The parameters that a run trains, by name, with `requires_grad` set on them and on no others.

    Layers of text encoder 1 behind the one that is read never get a gradient and are left out, for
    SDXL the final norm with them; every parameter returned here gets one in every step.

    Args:
        parts: The model.
        text_encoder: Train text encoder 1.
        text_encoder_2: Train text encoder 2, where there is one.
        freeze_embeddings: Leave token and position embeddings of the text encoders out.
        clip_skip: Layer of SD 1.x's text encoder that is read, from the end.

    Raises:
        ConfigError: the text encoder has fewer layers than `clip_skip`.
    """
    import torch

    from training.models.unet import named_modules

    first = parts.text_encoders[0]
    layers = list(first.encoder.layers)
    if clip_skip > len(layers):
        raise ConfigError(f"clip_skip={clip_skip}: the text encoder has {len(layers)} layers")
    idle: list[torch.nn.Module] = layers[len(layers) - clip_skip + 1 :]
    if parts.family == "sdxl":
        idle = [layers[-1], first.final_layer_norm]
    if freeze_embeddings:
        idle += [
            module
            for encoder in parts.text_encoders
            for module in encoder.modules()
            if isinstance(module, torch.nn.Embedding)
        ]
    left_out = {id(parameter) for module in idle for parameter in module.parameters()}
    wanted = {"unet": True, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    modules = named_modules(parts)
    for module in modules.values():
        module.requires_grad_(False)
    trained = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if wanted[name] and id(parameter) not in left_out
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
