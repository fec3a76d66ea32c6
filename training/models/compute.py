"""How a model is laid out on its device: what is computed again in the backward pass, memory format, compilation."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.checkpoint import checkpoint

from training.errors import ConfigError
from training.models.unet import PipelineParts
from training.run_config import ComputeConfig

_TEXT_ENCODERS = "text_encoders"


def apply_compute(parts: PipelineParts, config: ComputeConfig) -> None:
    """Lay the model out as asked; what it computes stays the same but for rounding.

    Attention always runs in `scaled_dot_product_attention`, whose kernel torch chooses for the device.

    Args:
        parts: The model, on its device; changed in place, names of parameters stay.
        config: Blocks to recompute, memory format, compilation.

    Raises:
        ConfigError: no block has such a name.
    """
    parts.unet.set_attn_processor(AttnProcessor2_0())
    for encoder in parts.text_encoders:
        encoder.set_attn_implementation("sdpa")
    _recompute(parts, config.gradient_checkpointing)
    if config.channels_last:
        parts.unet.to(memory_format=torch.channels_last)
    if config.compile:
        # One graph for all buckets and lengths of text, instead of one for each.
        parts.unet.compile(dynamic=True)


def _recompute(parts: PipelineParts, names: Sequence[str]) -> None:
    blocks = _blocks(parts)
    for name in names:
        if name not in blocks:
            raise ConfigError(f"compute.gradient_checkpointing: no block {name!r}; there are {', '.join(blocks)}")
        for block in blocks[name]:
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = _checkpoint
                    # transformers asks for training mode; of the layer alone, so that nothing in it drops out.
                    module.training = True


def _blocks(parts: PipelineParts) -> dict[str, list[Any]]:
    """Modules by the names that a recipe may use."""
    unet = parts.unet
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    texts = (getattr(encoder, "text_model", encoder) for encoder in parts.text_encoders)
    layers = [layer for text in texts for layer in text.encoder.layers]
    blocks: dict[str, list[Any]] = {"down_blocks": down}
    blocks |= {f"down_blocks.{number}": [block] for number, block in enumerate(down)}
    blocks |= {"mid_block": [unet.mid_block], "up_blocks": up}
    blocks |= {f"up_blocks.{number}": [block] for number, block in enumerate(up)}
    return blocks | {_TEXT_ENCODERS: layers, "all": [*down, unet.mid_block, *up, *layers]}


def _checkpoint(function: torch.nn.Module, *inputs: object) -> object:
    return checkpoint(function, *inputs, use_reentrant=False)
