"""Writes images with all that made them inside, in the form that A1111, its relatives and Civitai
write and read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training import commit
from training.buckets.geometry import Size
from training.config.evaluation import Enlarge, PromptWeights, SamplingConfig
from training.sampling.schedulers import LABELS, SCHEDULE_LABELS

_UPSCALERS: Mapping[Enlarge, str] = {
    "latent": "Latent", "latent_bicubic": "Latent (bicubic antialiased)", "pixels": "Lanczos",
}  # fmt: skip
_EMPHASIS: Mapping[PromptWeights, str] = {
    "off": "None",
    "plain": "No norm",
    "mean_restored": "Original",
}
_HASH_LENGTH = 12


def parameters(
    text: str, negative: str, *, seed: int, size: Size, model: str, config: SamplingConfig,
    clip_skip: int = 1, lora_hashes: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The generation parameters of an image.

    Args:
        text: Prompt.
        negative: Negative prompt; may be empty.
        seed: Of the image's own generator.
        size: Of the first pass, as these programs have it.
        model: Name of the checkpoint.
        config: All that holds for every image.
        clip_skip: Layer that was read; 1 is not mentioned.
        lora_hashes: `lora_hash` by name.

    Returns:
        Prompt, with its LoRAs, then a line of the negative prompt where there is one, then a line
        of settings.
    """
    loras = "".join(f" <lora:{lora.name}:{lora.weight:g}>" for lora in config.loras)
    prompts = f"{text}{loras}" + (f"\nNegative prompt: {negative}" if negative else "")
    settings: dict[str, object] = {"Steps": config.num_steps, "Sampler": LABELS[config.sampler]}
    if config.sampler != "ddim":  # which has no choice of schedule there either
        settings["Schedule type"] = SCHEDULE_LABELS[config.schedule]
    settings |= {
        "CFG scale": config.guidance_scale,
        "Seed": seed,
        "Size": f"{size.width}x{size.height}",
        "Model": model,
    }
    if clip_skip > 1:
        settings["Clip skip"] = clip_skip
    if (second := config.second_pass) is not None:
        settings |= {
            "Denoising strength": second.strength,
            "Hires upscale": second.scale,
            "Hires steps": second.num_steps,
            "Hires upscaler": _UPSCALERS[second.enlarge],
        }
    if config.pag_scale:
        settings["PAG scale"] = config.pag_scale
    settings["Emphasis"] = _EMPHASIS[config.prompt_weights]
    settings["Prompt syntax"] = config.prompt_syntax
    if config.prompt_times == "old":
        settings["Old prompt editing timelines"] = True
    if config.prompt_ends != "a1111":
        settings["Prompt ends"] = config.prompt_ends
    if config.schedule == "ays":
        settings["Align Your Steps"] = "ComfyUI"  # A1111 has the same name for other levels
    if config.sampler != "ddim":  # whose start A1111 always has so
        settings["SGM noise multiplier"] = True
    if lora_hashes:
        settings["Lora hashes"] = ", ".join(
            f"{name}: {digest}" for name, digest in lora_hashes.items()
        )
    settings |= {"Precision": config.precision, "RNG": "CPU"}
    return f"{prompts}\n" + ", ".join(
        f"{name}: {_quote(value)}" for name, value in settings.items()
    )


def lora_hash(path: Path) -> str:
    """The hash by which A1111 and Civitai know a LoRA: of the tensors' bytes, behind the header of
    the file."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_LENGTH]


def write_png(path: Path, image: np.ndarray, text: str) -> None:
    """Write `(H, W, 3)` uint8 as PNG with `text` under the keyword `parameters`, atomically."""
    info = PngInfo()
    # tEXt is Latin-1 by definition; anything else goes into iTXt, which the readers of these
    # images know too.
    if text.isascii():
        info.add_text("parameters", text)
    else:
        info.add_itxt("parameters", text)
    with commit.atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info, compress_level=4)


def _quote(value: object) -> str:
    """What holds a separator is written as JSON, as the readers expect."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
