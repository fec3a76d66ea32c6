"""What the UNet is told beside the noised latents: the text, and SDXL's six numbers of size and crop."""

from collections.abc import Sequence

import torch

from training.models.text_encoders import encode_sd1, encode_sdxl
from training.models.unet import PipelineParts


def make_time_ids(original_size: torch.Tensor, crop_top_left: torch.Tensor, target_size: torch.Tensor) -> torch.Tensor:
    """SDXL's size and crop conditioning, `(B, 6)` fp32, height before width.

    Args:
        original_size: `(B, 2)` upright source size, pixels.
        crop_top_left: `(B, 2)` rows and columns cut off, pixels of the resized image.
        target_size: `(B, 2)` the bucket, pixels.

    Source: SDXL report, arXiv:2307.01952, section 2.2. Never rounded to 16 bits: 1,023 is no bfloat16.
    """
    assert original_size.shape == crop_top_left.shape == target_size.shape, "one row of each per sample"
    return torch.cat([original_size, crop_top_left, target_size], dim=1).to(torch.float32)  # (B, 6)


def predict(
    parts: PipelineParts,
    noised: torch.Tensor,
    timesteps: torch.Tensor,
    ids: Sequence[torch.Tensor],
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """The UNet's prediction `(B, 4, h, w)` for noised latents; gradients flow where parameters ask for them.

    Args:
        parts: The model.
        noised: `(B, 4, h, w)`.
        timesteps: `(B,)` int64.
        ids: Token ids `(B, n, 77)` per text encoder.
        time_ids: `(B, 6)`; SD 1.x, which has no such input, ignores them.
    """
    if parts.family == "sd1":
        text = encode_sd1(parts.text_encoders[0], ids[0])
        added = None
    else:
        text = encode_sdxl(*parts.text_encoders, *ids)
        added = {"text_embeds": text.pooled, "time_ids": time_ids}
    return parts.unet(noised, timesteps, encoder_hidden_states=text.hidden_states, added_cond_kwargs=added).sample


def trained_parameters(
    parts: PipelineParts, *, text_encoder: bool, text_encoder_2: bool
) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run trains, by name, with `requires_grad` set on them and on no others.

    SDXL reads text encoder 1 before its last layer, so that layer and the final norm never get a gradient and are
    left out; every parameter returned here gets one in every step.
    """
    modules: dict[str, torch.nn.Module] = {"unet": parts.unet}
    if text_encoder:
        modules["text_encoder"] = parts.text_encoders[0]
    if text_encoder_2 and parts.family == "sdxl":
        modules["text_encoder_2"] = parts.text_encoders[1]
    unused: set[int] = set()
    if parts.family == "sdxl":
        first = parts.text_encoders[0]
        for module in (first.encoder.layers[-1], first.final_layer_norm):
            unused |= {id(parameter) for parameter in module.parameters()}
    trained = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if id(parameter) not in unused
    }
    for module in (parts.unet, *parts.text_encoders):
        module.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
