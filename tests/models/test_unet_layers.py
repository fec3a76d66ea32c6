"""The walk over a UNet's config, against the modules of diffusers' own class on torch's meta
device."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from sdxl_shapes import SDXL

from training.errors import ModelError
from training.models.unet_layers import unet_layers

ROOT = Path(__file__).resolve().parents[2]
# stable-diffusion-v1-5's config.json, which leaves the rest to defaults.
SD1 = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
REFINER = SDXL | {
    "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24], "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
# A distilled SDXL: other depths on the way up than down, and nothing but a residual block between.
DISTILLED = SDXL | {
    "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 2, 4],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}  # fmt: skip
KINDS = {
    torch.nn.Conv2d: "conv", torch.nn.Linear: "linear", torch.nn.GroupNorm: "group_norm",
    torch.nn.LayerNorm: "layer_norm",
}  # fmt: skip


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def described(module):
    """What a walk has to say of a module of the library."""
    shape = list(module.weight.shape)
    inputs, outputs = (shape[0], shape[0]) if len(shape) == 1 else (shape[1], shape[0])
    kernel, stride = (shape[2], module.stride[0]) if isinstance(module, torch.nn.Conv2d) else (1, 1)
    return KINDS[type(module)], inputs, outputs, kernel, stride, module.bias is not None


def assert_equal(config):
    unet = on_meta(config)
    theirs = {
        name: described(module) for name, module in unet.named_modules() if type(module) in KINDS
    }
    ours = {
        layer.name: (
            layer.kind,
            layer.inputs,
            layer.outputs,
            layer.kernel,
            layer.stride,
            layer.has_bias,
        )
        for layer in unet_layers(config)
    }
    assert ours == theirs
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert sum(layer.num_parameters for layer in unet_layers(config)) == num_parameters


@pytest.mark.parametrize(
    "config", [SDXL, SD1, {}, REFINER, DISTILLED], ids=["sdxl", "sd1", "none", "refiner", "small"]
)
def test_full_size_models_have_the_librarys_layers(config):
    assert_equal(config)


def test_the_demos_model_has_the_librarys_layers():
    assert_equal(
        json.loads((ROOT / "demo" / "models" / "base" / "unet" / "config.json").read_text())
    )


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_model_of_these_blocks_has_the_librarys_layers(data):
    levels = data.draw(st.integers(1, 4))

    def per_level(values):
        return data.draw(st.lists(values, min_size=levels, max_size=levels))

    crossed = per_level(st.booleans())
    config = {
        "block_out_channels": [8 * width for width in per_level(st.integers(1, 3))], "norm_num_groups": 4,
        "down_block_types": [("CrossAttn" if cross else "") + "DownBlock2D" for cross in crossed],
        "up_block_types": [("CrossAttn" if cross else "") + "UpBlock2D" for cross in crossed[::-1]],
        "layers_per_block": per_level(st.integers(1, 3)), "transformer_layers_per_block": per_level(st.integers(1, 3)),
        "attention_head_dim": per_level(st.sampled_from([1, 2, 3])),
        "cross_attention_dim": data.draw(st.integers(4, 9)),
        "use_linear_projection": data.draw(st.booleans()), "in_channels": data.draw(st.sampled_from([4, 9])),
        "mid_block_type": data.draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
    }  # fmt: skip
    assert_equal(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"down_block_types": ["DownBlock2D", "KDownBlock2D", "DownBlock2D"]},
            r"down_block_types='KDownBlock2D'",
        ),
        ({"class_embed_type": "timestep"}, r"class_embed_type='timestep'.*known: None"),
        (
            {"addition_embed_type": "image"},
            r"addition_embed_type='image'.*known: None, 'text_time'",
        ),
    ],
)
def test_other_architectures_are_refused_by_key_and_value(change, said):
    with pytest.raises(ModelError, match=said):
        list(unet_layers(SDXL | change))
