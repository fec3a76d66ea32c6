"""What a model is, read from its headers and configurations: no weights are loaded, and torch is
not imported.

A model is a diffusers folder, or a single .safetensors file under the names of the original code.
Such a file has weights only. Its configurations and tokenizers, a few megabytes, lie in a folder in
diffusers layout of the same name beside it: `models/photo/` for `models/photo.safetensors`. No
library ships them, and nothing is fetched.
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from training.errors import ModelError

SUFFIX = ".safetensors"
UNET = "model.diffusion_model."
SD1_TEXT = "cond_stage_model.transformer."
SDXL_TEXT_1 = "conditioner.embedders.0.transformer."
SDXL_TEXT_2 = "conditioner.embedders.1.model."
# In the files beside the trained weights: a count of positions, and a temperature that only CLIP's
# own training reads.
NO_WEIGHTS = ("position_ids", "logit_scale")
_TRAINED = ("unet", "text_encoder", "text_encoder_2")


def inspect(model: Path) -> dict[str, Any]:
    """Family, prediction type and number of parameters (UNet and text encoders) of a diffusers
    folder or single file.

    Raises:
        ModelError: it is no Stable Diffusion 1.x or SDXL with safetensors weights, or a file whose
            folder of configurations is missing.
    """
    if model.suffix == SUFFIX:
        return _inspect_file(model)
    index = read_json(model / "model_index.json")
    parts = [part for part in _TRAINED if (model / part).is_dir()]
    family = "sdxl" if "text_encoder_2" in parts else "sd1"
    if "unet" not in index or "unet" not in parts:
        raise ModelError(
            f"{model}/model_index.json names no unet: not a Stable Diffusion 1.x or SDXL folder"
        )
    return {
        "family": family,
        "prediction_type": noise_schedule(model).get("prediction_type", "epsilon"),
        "num_parameters": sum(_count(model / part) for part in parts),
    }


def noise_schedule(model: Path) -> dict[str, Any]:
    """Config of a model's noise scheduler, with what the markers in a single file say of it.

    Raises:
        ModelError: the config or the file cannot be read.
    """
    scheduler = read_json(config_folder(model) / "scheduler" / "scheduler_config.json")
    return scheduler | (schedule_changes(read_header(model)) if model.suffix == SUFFIX else {})


def config_folder(model: Path) -> Path:
    """The folder with a model's configurations and tokenizers: the model itself, or the one beside
    a single file."""
    return model.with_suffix("") if model.suffix == SUFFIX else model


def require_file(path: Path) -> None:
    """Check that the file and its folder of configurations are there.

    Raises:
        ModelError: one of them is not, with the command that brings the folder.
    """
    folder = config_folder(path)
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist")
    if not (folder / "model_index.json").is_file():
        repository = "stabilityai/stable-diffusion-xl-base-1.0"
        raise ModelError(
            f"{path.name} holds weights only, and {folder} with its configurations and tokenizers is missing: run "
            f"`hf download {repository} --include '*.json' '*.txt' --local-dir {folder}`, or take another model of the "
            "same family"
        )


def read_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file's tensors, without reading them.

    Raises:
        ModelError: it is missing or no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, path.stat().st_size)))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A model's configuration.

    Raises:
        ModelError: the file is missing or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: not a diffusers folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{path} holds a {type(found).__name__}, but a model's configuration is a JSON object"
        )
    return found


def detect_family(names: Collection[str], path: Path) -> Literal["sdxl", "sd1"]:
    """The family that the names of a file's tensors stand for.

    Raises:
        ModelError: they are neither SDXL's nor SD 1.x's.
    """

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has(UNET) and has(SDXL_TEXT_1) and has(SDXL_TEXT_2):
        return "sdxl"
    if has(UNET) and has(SD1_TEXT):
        return "sd1"
    raise ModelError(
        f"{path} is no whole SDXL or SD 1.x model: wanted tensors {UNET}* and text encoders {SDXL_TEXT_1}* with "
        f"{SDXL_TEXT_2}*, or {SD1_TEXT}*; found {', '.join(sorted(names)[:3])} ..."
    )


def schedule_changes(names: Collection[str]) -> dict[str, Any]:
    """What the file's markers say of its noise schedule: empty tensors `v_pred` and `ztsnr`, as
    ComfyUI reads them."""
    changes: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    return changes | ({"rescale_betas_zero_snr": True} if "ztsnr" in names else {})


def _inspect_file(path: Path) -> dict[str, Any]:
    require_file(path)
    header = read_header(path)
    return {
        "family": detect_family(header, path),
        "prediction_type": noise_schedule(path).get("prediction_type", "epsilon"),
        "num_parameters": _count_numbers(header),
    }


def _count_numbers(header: Mapping[str, list[int]]) -> int:
    """Numbers in UNet and text encoders together."""
    return sum(
        math.prod(shape)
        for name, shape in header.items()
        if name.startswith((UNET, SD1_TEXT, SDXL_TEXT_1, SDXL_TEXT_2))
        and not name.endswith(NO_WEIGHTS)
    )


def _count(folder: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers; variants such as fp16 are
    counted once."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if ".fp16." not in file.name] or files
    if not whole:
        raise ModelError(f"{folder} holds no .safetensors file")
    return sum(math.prod(shape) for file in whole for shape in read_header(file).values())
