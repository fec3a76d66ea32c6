"""Renames the weights of an open_clip model to those of transformers' `CLIPModel`: both compute the
same."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from training.errors import ModelError

_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(state: Mapping[str, torch.Tensor], origin: Path) -> dict[str, torch.Tensor]:
    """The tensors of `state` under transformers' names; the joint matrix of queries, keys and
    values is parted.

    Args:
        state: Of an open_clip `CLIP` with vision transformer.
        origin: The file, for messages.

    Raises:
        ModelError: A name is none of open_clip's.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if name in _NAMES:
            found[_NAMES[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif stem in _NORMS:
            found[f"{_NORMS[stem]}.{kind}"] = value
        elif match := _BLOCK.fullmatch(name):
            tower = "vision_model" if match[1] else "text_model"
            found |= _inside(f"{tower}.encoder.layers.{match[2]}", match[3], value, name, origin)
        elif name != "attn_mask":
            raise _unknown(name, origin)
    return found


def _inside(
    layer: str, inner: str, value: torch.Tensor, name: str, origin: Path
) -> dict[str, torch.Tensor]:
    """One tensor of a block."""
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        parts = zip("qkv", value.chunk(3), strict=True)
        return {
            f"{layer}.self_attn.{letter}_proj.{kind}": part.contiguous() for letter, part in parts
        }
    stem, _, kind = inner.rpartition(".")
    if stem not in _INSIDE:
        raise _unknown(name, origin)
    return {f"{layer}.{_INSIDE[stem]}.{kind}": value}


def _unknown(name: str, origin: Path) -> ModelError:
    return ModelError(
        f"{origin} holds {name}, which is no weight of an open_clip model with a vision transformer"
    )
