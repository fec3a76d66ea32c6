"""Translates a model that came as one .safetensors file from the names of the original code to the
libraries' own.

The translation is diffusers'. It fills what it does not find with random numbers, so what comes out
is checked one to one by whoever loads it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextModelWithProjection

from training.models.base_model import NO_WEIGHTS, SD1_TEXT, SDXL_TEXT_1, SDXL_TEXT_2, UNET


def unet_state(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The UNet's weights under diffusers' names; weights averaged over training (`model_ema.`) are
    not read."""
    return dict(convert_ldm_unet_checkpoint(_under(tensors, UNET), config))


def vae_state(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The VAE's weights under diffusers' names, its attention's 1x1 convolutions as linear
    layers."""
    return dict(convert_ldm_vae_checkpoint(dict(tensors), config))


def clip_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Text encoder 1 under the names of `CLIPTextModel`, which transformers 5.6 shortened by
    `text_model.`"""
    state = convert_ldm_clip_checkpoint(
        {**_under(tensors, SD1_TEXT), **_under(tensors, SDXL_TEXT_1)}
    )
    return {
        name.removeprefix("text_model."): value
        for name, value in state.items()
        if not name.endswith(NO_WEIGHTS)
    }


def open_clip_state(
    tensors: Mapping[str, torch.Tensor], encoder: CLIPTextModelWithProjection
) -> dict[str, torch.Tensor]:
    """SDXL's text encoder 2: OpenCLIP's fused q, k, v cut apart, its projection transposed."""
    return dict(
        convert_open_clip_checkpoint(encoder, _under(tensors, SDXL_TEXT_2), prefix=SDXL_TEXT_2)
    )


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}
