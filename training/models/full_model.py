"""Full fine-tuning: which of a model's own parameters a run trains."""

import torch

from training.errors import ConfigError
from training.models.unet import PipelineParts, named_modules


def trained_parameters(
    parts: PipelineParts,
    *,
    text_encoder: bool,
    text_encoder_2: bool,
    freeze_embeddings: bool = False,
    clip_skip: int = 1,
) -> dict[str, torch.nn.Parameter]:
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
