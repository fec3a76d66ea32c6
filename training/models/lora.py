"""Adds LoRA files to a loaded model's weights: kohya's, diffusers' and PEFT's names, for UNet and
text encoders.

The product of a layer's two matrices is added to its weight, once: sampling costs what it did.
diffusers' own loaders would do it through peft, which is not among our libraries; they keep the
layers apart, for switching, which no one asks for here.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from training.errors import ModelError
from training.models import weights
from training.models.unet import PipelineParts, named_modules

_PREFIXES = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
}  # fmt: skip
_PEFT_PREFIX = "base_model.model."
_ENDINGS = (
    re.compile(
        r"(?P<layer>.+)\.lora_(?P<kind>down|up|A|B)(\.[^.]+)?\.weight"
    ),  # kohya; PEFT, with an adapter's name
    re.compile(
        r"(?P<layer>.+)[._]lora(_linear_layer)?\.(?P<kind>down|up)\.weight"
    ),  # diffusers before PEFT
    re.compile(r"(?P<layer>.+)\.(?P<kind>alpha)"),
)
_KINDS = {"A": "down", "B": "up"}
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNMATCHED_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """What a file holds for one weight."""

    down: torch.Tensor
    """`(r, in)` or `(r, in, kernel, kernel)`."""
    up: torch.Tensor
    """`(out, r)` or `(out, r, 1, 1)`."""
    alpha: float
    """What the product is multiplied with, times the rank r."""

    def delta(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """`up @ down * alpha / r` fp32 in the shape of the weight.

        Source: LoRA, arXiv:2106.09685, section 4.1.
        """
        up, down = (matrix.to(device, torch.float32).flatten(1) for matrix in (self.up, self.down))
        return (up @ down * (self.alpha / self.down.shape[0])).view(shape)


def add_loras(parts: PipelineParts, loras: Sequence[tuple[Path, float]]) -> None:
    """Add LoRAs to the weights of a model, in place.

    Args:
        parts: The model.
        loras: Files and the factors of what they add; 0 changes nothing, 1 adds what was trained.

    Raises:
        ModelError: a file is missing, is no LoRA, or has keys or shapes that fit no layer of this
            model; the model is then as the files before left it.
    """
    modules = {
        f"{part}.{name}": module
        for part, whole in named_modules(parts).items()
        for name, module in whole.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    names = _known_names(parts, modules)
    for path, weight in loras:
        layers = read_lora(path, names)
        for name, layer in layers.items():
            rank, shape = layer.down.shape[0], modules[name].weight.shape
            outer = layer.up.shape[0], layer.down[0].numel()
            if outer != (shape[0], shape[1:].numel()) or layer.up.flatten(1).shape[1] != rank:
                raise ModelError(
                    f"{path}: LoRA of {name} is {list(layer.up.shape)} times {list(layer.down.shape)}, the weight of "
                    f"this model is {list(shape)}: it was trained on another model"
                )
        with torch.no_grad():
            for name, layer in layers.items():
                own = modules[name].weight
                own += weight * layer.delta(own.shape, own.device)


def read_lora(path: Path, names: Mapping[str, str]) -> dict[str, LoraLayer]:
    """The layers of a file by the names of a model's modules.

    Args:
        path: A .safetensors file.
        names: Module by part and flat name, from `_known_names`.

    Raises:
        ModelError: it cannot be read, or some of its keys fit no layer; the message counts them and
            names the first.
    """
    if not path.is_file():
        raise ModelError(f"LoRA {path} does not exist")
    tensors, alphas = weights.read_tensors(path), _read_alphas(path)
    found: dict[str, dict[str, torch.Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unknown = []
    for key, value in tensors.items():
        layer, kind, part = _parse(key)
        name = names.get(f"{part}.{layer}", "")
        if not name:
            unknown.append(key)
            continue
        found.setdefault(name, {})[kind] = value
        keys.setdefault(name, []).append(key)
    unknown += [
        key
        for name, pair in found.items()
        if not {"up", "down"} <= pair.keys()
        for key in keys[name]
    ]
    if unknown or not found:
        first = ", ".join(sorted(unknown)[:_UNMATCHED_SHOWN])
        raise ModelError(
            f"{path}: {len(unknown)} of {len(tensors)} keys fit no layer of this model ({first}); what can be added is "
            "LoRA with up and down matrices, of a model of the same family (no LoHa, LoKr or DoRA)"
        )
    layers = {}
    for name, pair in found.items():
        rank = float(pair["down"].shape[0])
        alpha = float(pair["alpha"]) if "alpha" in pair else alphas.get(name.split(".")[0], rank)
        layers[name] = LoraLayer(down=pair["down"], up=pair["up"], alpha=alpha)
    return layers


def _parse(key: str) -> tuple[str, str, str]:
    """Flat name of the layer, kind of tensor and part of the model that a key speaks of; empty
    where it does not."""
    match = next((match for ending in _ENDINGS if (match := ending.fullmatch(key))), None)
    if match is None:
        return "", "", ""
    layer, kind = (
        match["layer"].removeprefix(_PEFT_PREFIX),
        _KINDS.get(match["kind"], match["kind"]),
    )
    # PEFT's own files hold one adapted module and do not name it; such files are of UNets.
    prefix, part = next(
        ((prefix, part) for prefix, part in _PREFIXES.items() if layer.startswith(prefix)),
        ("", "unet"),
    )
    flat = (
        layer.removeprefix(prefix)
        .replace(".processor.", ".")
        .replace(".", "_")
        .removeprefix("text_model_")
    )
    if part == "unet":
        return re.sub("to_out$", "to_out_0", flat), kind, part
    for old, new in _TEXT_NAMES.items():
        flat = re.sub(f"_{old}$", f"_{new}", flat)
    return flat, kind, part


def _known_names(parts: PipelineParts, modules: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Modules by part and flat name; those of the UNet also by the name that the original code has
    for them."""
    names = {}
    for name in modules:
        part, _, own = name.partition(".")
        names[f"{part}.{own.removeprefix('text_model.').replace('.', '_')}"] = name
        if part == "unet":
            names[f"{part}.{original_name(own, parts.unet.config).replace('.', '_')}"] = name
    return names


_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_name(name: str, config: Any) -> str:
    """The original code's name of a UNet's module, which kohya's files for SDXL use.

    Args:
        name: diffusers' name.
        config: The UNet's.
    """
    if name in _OUTER:
        return _OUTER[name]
    if match := _MID.fullmatch(name):
        kind, number, rest = match.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_RESNET.get(rest, rest)}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    side, block, kind, number, rest = match.groups()
    per_block = (
        config.layers_per_block + 1
    )  # in the original, the sampler of a down block is a layer of its own
    first = int(block) * per_block + int(number)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * per_block}.0.op"
        place = 0 if kind == "resnets" else 1
        return f"input_blocks.{first + 1}.{place}.{_RESNET.get(rest, rest)}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config.up_block_types[int(block)] else 1
        return f"output_blocks.{(int(block) + 1) * per_block - 1}.{place}.conv"
    return f"output_blocks.{first}.{0 if kind == 'resnets' else 1}.{_RESNET.get(rest, rest)}"


def _read_alphas(path: Path) -> dict[str, float]:
    """Alphas by part that a file's metadata, or PEFT's config beside it, states for all of its
    layers.

    Raises:
        ModelError: they state a way of scaling that is not applied here.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    stated: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    config = adapter_config(path)
    if config is not None:
        stated |= {f"unet.{name}": value for name, value in weights.read_config(config).items()}
    for name in ("use_rslora", "use_dora", "alpha_pattern"):
        odd = [key for key, value in stated.items() if key.endswith(f".{name}") and value]
        if odd:
            raise ModelError(
                f"{path}: {odd[0]}={stated[odd[0]]!r} is not applied here, and would be needed"
            )
    return dict(_stated_alphas(stated))


def adapter_config(path: Path) -> Path | None:
    """PEFT's config, which states the alpha of an `adapter_model.safetensors`; None where there is
    none."""
    config = path.with_name("adapter_config.json")
    return config if path.name == "adapter_model.safetensors" and config.is_file() else None


def _stated_alphas(stated: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in stated.items():
        part, _, name = key.partition(".")
        if name == "lora_alpha":
            yield part, float(value)
