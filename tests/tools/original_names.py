"""Writes a model as one file under the names of the original code, by hand: the other direction of
what we read."""

import re

import torch
from safetensors.torch import save_file

# The tiny UNet of tiny_runs.py: two levels, one layer each; longest first, so that no entry hides
# another.
UNET_BLOCKS = {
    "conv_in.": "input_blocks.0.0.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "down_blocks.1.attentions.0.": "input_blocks.3.1.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.attentions.0.": "output_blocks.0.1.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.attentions.1.": "output_blocks.1.1.",
    "up_blocks.0.upsamplers.0.": "output_blocks.1.2.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
UNET_RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
VAE_NAMES = [
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"encoder.down.\1.downsample.conv."),
    (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample.conv."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."), (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."), (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."), (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
]  # fmt: skip
OPEN_CLIP_NAMES = [
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."), (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."), (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."), (r"\.self_attn\.", ".attn."),
]  # fmt: skip


def _renamed(name, patterns):
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _unet_name(key):
    block, name = next(item for item in UNET_BLOCKS.items() if key.startswith(item[0]))
    rest = key.removeprefix(block)
    if "resnets" in block:
        inner = next(item for item in UNET_RESNET.items() if rest.startswith(item[0]))
        rest = inner[1] + rest.removeprefix(inner[0])
    return name + rest


def _open_clip(state):
    tensors = {}
    for key, value in state.items():
        name = _renamed(key, OPEN_CLIP_NAMES)
        if fused := re.match(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)$", name):
            tensors.setdefault(f"{fused[1]}.in_proj_{fused[3]}", {})[fused[2]] = value
        else:
            tensors[name] = value.T if name == "text_projection" else value
    return {
        name: torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value
        for name, value in tensors.items()
    } | {"logit_scale": torch.tensor(4.6)}


def original_tensors(parts):
    """All weights of a model of tiny_runs.py's shape, under the names of the original code."""
    tensors = {
        f"model.diffusion_model.{_unet_name(key)}": value
        for key, value in parts.unet.state_dict().items()
    }
    for key, value in parts.vae.state_dict().items():
        name = _renamed(key, VAE_NAMES)
        is_convolution = "attn_1" in name and name.endswith("weight") and ".norm." not in name
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_convolution else value
    first = "conditioner.embedders.0" if parts.family == "sdxl" else "cond_stage_model"
    for key, value in parts.text_encoders[0].state_dict().items():
        tensors[f"{first}.transformer.text_model.{key}"] = value
    if parts.family == "sdxl":
        second = _open_clip(parts.text_encoders[1].state_dict())
        tensors |= {
            f"conditioner.embedders.1.model.{name}": value for name, value in second.items()
        }
    else:
        # Files of 2022 also have these.
        tensors[f"{first}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["alphas_cumprod"] = torch.ones(1000)
    return tensors


def write_single_file(parts, path, **extra):
    save_file(
        {name: value.contiguous() for name, value in (original_tensors(parts) | extra).items()},
        path,
    )
