"""Writes a whole Stable Diffusion model as a folder in diffusers layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from training.errors import ModelError
from training.models import weights
from training.models.unet import PIPELINES, TEXT_PREFIX, PipelineParts, check_parts


def save_diffusers_folder(
    parts: PipelineParts,
    folder: Path,
    dtype: torch.dtype,
    overrides: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Write a complete model folder that diffusers' pipelines of the family load.

    Args:
        parts: The model; it is left as it is, weights are cast on their way to the file.
        folder: Created where missing. Files are not synced: the caller commits the folder by
            renaming it.
        dtype: `torch.float32` or `torch.float16`; large models halve their size on disk with the
            latter.
        overrides: Weights to write in place of the modules' own, by part and name
            (`unet.conv_in.weight`).

    Raises:
        ModelError: The parts do not fit together, or a finite weight leaves the range of `dtype`.
    """
    check_parts(parts, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": PIPELINES[parts.family],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", parts.noise_scheduler_config["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if parts.family == "sdxl":
        index["force_zeros_for_empty_prompt"] = parts.force_zeros_for_empty_prompt
    else:
        index |= {
            key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")
        }
        index["requires_safety_checker"] = False
    for name, module in (("unet", parts.unet), ("vae", parts.vae)):
        module.save_config(folder / name)
        _save_weights(
            module, folder / name / weights.DIFFUSERS_FILE, dtype, overrides, part=name, prefix=""
        )
    for number, (encoder, tokenizer) in enumerate(
        zip(parts.text_encoders, parts.tokenizers, strict=True)
    ):
        suffix = f"_{number + 1}" if number else ""
        index[f"text_encoder{suffix}"] = ["transformers", type(encoder).__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        _save_text_encoder(encoder, folder / f"text_encoder{suffix}", dtype, overrides)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    _write_json(folder / "scheduler" / "scheduler_config.json", parts.noise_scheduler_config)
    _write_json(folder / "model_index.json", index)


def _save_text_encoder(
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    folder: Path,
    dtype: torch.dtype,
    overrides: Mapping[str, torch.Tensor],
) -> None:
    config = encoder.config.to_dict() | {
        "architectures": [type(encoder).__name__],
        "dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config)
    prefix = TEXT_PREFIX if isinstance(encoder, CLIPTextModel) else ""
    _save_weights(
        encoder,
        folder / weights.TRANSFORMERS_FILE,
        dtype,
        overrides,
        part=folder.name,
        prefix=prefix,
    )


def _save_weights(
    module: torch.nn.Module,
    path: Path,
    dtype: torch.dtype,
    overrides: Mapping[str, torch.Tensor],
    *,
    part: str,
    prefix: str,
) -> None:
    state = {}
    for key, own in module.state_dict().items():
        value = overrides.get(f"{part}.{key}", own)
        cast = (
            value.detach()
            .to("cpu", dtype if value.is_floating_point() else value.dtype)
            .contiguous()
        )
        if (
            value.is_floating_point()
            and not torch.isfinite(cast).all()
            and torch.isfinite(value).all()
        ):
            raise ModelError(
                f"weight {key} of {path} leaves the range of {dtype}: save it as torch.float32"
            )
        state[prefix + key] = cast
    save_file(state, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", "utf-8")
