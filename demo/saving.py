"""Writes the demo's weights: fp16 safetensors that load as fp32, because the demo runs on a CPU."""

import copy
import json
from pathlib import Path
from typing import Any

from demo.corpus import CLIP_MEAN, CLIP_STD


def save_half(model: Any, folder: Path) -> None:
    """`save_pretrained` of an fp16 copy; the config asks for fp32 arithmetic."""
    copy.deepcopy(model).half().save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    if "dtype" in settings:
        settings["dtype"] = "float32"
        for part in ("text_config", "vision_config"):
            if part in settings:
                settings[part]["dtype"] = "float32"
    write_json(path, settings)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def clip_preprocessor(side: int) -> dict[str, Any]:
    """`preprocessor_config.json` of a CLIP whose images are `side` pixels wide."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
