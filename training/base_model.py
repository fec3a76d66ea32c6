"""What a model folder is, read from its headers: no weights are loaded."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from training.errors import ModelError

_TRAINED = ("unet", "text_encoder", "text_encoder_2")


def inspect(folder: Path) -> dict[str, Any]:
    """Family, prediction type and number of parameters (UNet and text encoders) of a diffusers folder.

    Raises:
        ModelError: it is no diffusers folder of Stable Diffusion 1.x or SDXL with safetensors weights.
    """
    index = _json(folder / "model_index.json")
    parts = [part for part in _TRAINED if (folder / part).is_dir()]
    family = "sdxl" if "text_encoder_2" in parts else "sd1"
    if "unet" not in index or "unet" not in parts:
        raise ModelError(f"{folder}/model_index.json names no unet: not a Stable Diffusion 1.x or SDXL folder")
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    return {
        "family": family,
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "num_parameters": sum(_count(folder / part) for part in parts),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: not a diffusers folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None


def _count(folder: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers; variants such as fp16 are counted once."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if ".fp16." not in file.name] or files
    if not whole:
        raise ModelError(f"{folder} holds no .safetensors file")
    total = 0
    for file in whole:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total
