"""A whole Stable Diffusion model: loaded from a folder or file and checked as one, saved as one in
diffusers layout.

The family, `sdxl` or `sd1`, is read from the configs, and the parts are checked to fit together
before anything is computed with them: a folder mixed from two models would train without an error
and never draw an image.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.errors import ModelError
from training.models import base_model, single_file, weights
from training.models.noise_schedules import change_schedule
from training.models.text_encoders import load_tokenizer
from training.models.tokens import CHUNK_LENGTH

Family = Literal["sdxl", "sd1"]

PIPELINES: dict[Family, str] = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd1": "StableDiffusionPipeline",
}
_PREDICTION_TYPES = ("epsilon", "v_prediction")
_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
# transformers >= 5.6 dropped this prefix from CLIPTextModel's names; older readers and other UIs
# still expect it.
TEXT_PREFIX = "text_model."
# Six numbers of SDXL's conditioning: original size, crop, target size, two each.
_NUM_TIME_IDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineParts:
    """The parts of one model; modules are fp32, frozen and in evaluation mode when loaded."""

    family: Family
    """What decides conditioning and text encoding."""
    unet: UNet2DConditionModel
    """The denoiser."""
    vae: AutoencoderKL
    """The latents' codec."""
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    """Two for SDXL, one for SD 1.x, in the order in which their widths are joined."""
    tokenizers: tuple[CLIPTokenizer, ...]
    """One per text encoder."""
    noise_scheduler_config: Mapping[str, Any]
    """`scheduler_config.json` as it is: betas, prediction type, spacing."""
    force_zeros_for_empty_prompt: bool
    """SDXL pipelines without a negative prompt use zeros where True, the empty prompt's encoding
    where False; a model that was trained on empty prompts wants the latter. Always False for SD
    1.x, which has no such switch."""


def load_pipeline_parts(model: Path, device: str | torch.device) -> PipelineParts:
    """Load a model and check that its parts belong together.

    Args:
        model: A diffusers folder, which has `model_index.json` and a folder per part, all weights
            as safetensors; or a single .safetensors file, see `base_model`.
        device: Where the modules go.

    Raises:
        ModelError: Files are missing, the family is unknown, or shapes do not fit together.
    """
    parts = (
        _load_single_file(model, device)
        if model.suffix == base_model.SUFFIX
        else _load_folder(model, device)
    )
    check_parts(parts, str(model))
    return parts


def named_modules(parts: PipelineParts) -> dict[str, UNet2DConditionModel | CLIPTextModel]:
    """UNet and text encoders by the names of their folders, which open the names of their
    parameters."""
    return {"unet": parts.unet} | dict(
        zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False)
    )


def with_schedule(
    parts: PipelineParts,
    prediction_type: Literal["base", "epsilon", "v_prediction"],
    *,
    zero_terminal_snr: bool,
) -> PipelineParts:
    """The model with another prediction type or noise schedule, which pipelines read from what is
    saved of it.

    Args:
        parts: The model; it is left as it is.
        prediction_type: See `rules.change_schedule`.
        zero_terminal_snr: See `rules.change_schedule`.

    Raises:
        ConfigError: the last step holds no signal and the noise is to be predicted.
    """
    config = change_schedule(
        parts.noise_scheduler_config, prediction_type, zero_terminal_snr=zero_terminal_snr
    )
    if zero_terminal_snr:
        scheduler = getattr(diffusers, config["_class_name"], None)
        if (
            scheduler is None
            or "rescale_betas_zero_snr" not in inspect.signature(scheduler.__init__).parameters
        ):
            config["_class_name"] = (
                "DDIMScheduler"  # PNDM, the sampler that SD 1.x names, does not know the option
            )
    return replace(parts, noise_scheduler_config=config)


def with_vae(parts: PipelineParts, vae: AutoencoderKL, origin: str) -> PipelineParts:
    """The model with another VAE of its family, as that which its latents were encoded with.

    Args:
        parts: The model; it is left as it is.
        vae: In fp32.
        origin: Names the VAE in messages.

    Raises:
        ModelError: it has another scaling factor or number of channels than the model's own, which
            the UNet reads.
    """
    own, other = parts.vae.config.scaling_factor, vae.config.scaling_factor
    if own != other:
        raise ModelError(
            f"VAE {origin} scales latents by {other}, the model's own by {own}: encode with a VAE of the model's family"
        )
    changed = replace(parts, vae=vae)
    check_parts(changed, origin)
    return changed


def check_parts(parts: PipelineParts, origin: str) -> None:
    """Check that the parts fit together, so that a mixed folder fails here and not as a bad
    image.

    Args:
        parts: What is to be checked.
        origin: Names the model in the message.

    Raises:
        ModelError: One message with every rule that is broken and both values.
    """
    unet, vae = parts.unet.config, parts.vae.config
    widths = [encoder.config.hidden_size for encoder in parts.text_encoders]
    rules = [
        ("unet.in_channels", unet.in_channels, "vae.latent_channels", vae.latent_channels),
        ("unet.out_channels", unet.out_channels, "vae.latent_channels", vae.latent_channels),
        (
            "unet.cross_attention_dim",
            unet.cross_attention_dim,
            "text encoders' widths",
            sum(widths),
        ),
        (
            "number of tokenizers",
            len(parts.tokenizers),
            "of text encoders",
            len(parts.text_encoders),
        ),
    ]
    if parts.family == "sdxl":
        projection = parts.text_encoders[1].config.projection_dim
        wanted = _NUM_TIME_IDS * unet.addition_time_embed_dim + projection
        embedded = unet.projection_class_embeddings_input_dim
        rules.append(
            (
                "unet.projection_class_embeddings_input_dim",
                embedded,
                "time ids and pooled text",
                wanted,
            )
        )
    broken = [f"{left}={a} but {right}={b}" for left, a, right, b in rules if a != b]
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=False):
        if len(tokenizer) > encoder.config.vocab_size:
            broken.append(
                f"tokenizer has {len(tokenizer)} words but its encoder {encoder.config.vocab_size}"
            )
        if encoder.config.max_position_embeddings != CHUNK_LENGTH:
            broken.append(
                f"text encoder reads {encoder.config.max_position_embeddings} tokens, not {CHUNK_LENGTH}"
            )
    prediction = parts.noise_scheduler_config.get("prediction_type", "epsilon")
    if "_class_name" not in parts.noise_scheduler_config:
        broken.append("scheduler_config.json has no _class_name")
    if prediction not in _PREDICTION_TYPES:
        broken.append(f"prediction_type={prediction!r} is none of {', '.join(_PREDICTION_TYPES)}")
    if broken:
        raise ModelError(f"parts of model {origin} do not fit together: {'; '.join(broken)}")


def read_weights(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some weights of a folder that `save_diffusers_folder` wrote.

    Args:
        folder: The model.
        names: By part and name, `unet.conv_in.weight`.

    Returns:
        Those that are there, on the CPU.

    Raises:
        ModelError: the folder has no weights of a part.
    """
    by_part = defaultdict[str, list[str]](list)
    for name in names:
        part, key = name.split(".", 1)
        by_part[part].append(key)
    found = {}
    for part, keys in by_part.items():
        files = list((folder / part).glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"{folder / part} has {len(files)} .safetensors files, must have one")
        with safe_open(files[0], framework="pt") as file:
            present = set(file.keys())
            for key in keys:
                saved = key if key in present else TEXT_PREFIX + key
                if saved in present:
                    found[f"{part}.{key}"] = file.get_tensor(saved)
    return found


def require_folder(folder: Path) -> Family:
    """The family of a diffusers folder that has all of its files, else a ModelError."""
    family = _detect_family(folder)
    suffixes = _suffixes(family)
    files = [f"{part}/config.json" for part in ("unet", "vae")]
    files += [f"{part}/{weights.DIFFUSERS_FILE}" for part in ("unet", "vae")]
    files += [
        f"text_encoder{suffix}/{name}"
        for suffix in suffixes
        for name in ("config.json", weights.TRANSFORMERS_FILE)
    ]
    files += [f"tokenizer{suffix}/tokenizer_config.json" for suffix in suffixes]
    _require(folder, ["model_index.json", "scheduler/scheduler_config.json", *files])
    return family


def _load_folder(folder: Path, device: str | torch.device) -> PipelineParts:
    family = require_folder(folder)
    suffixes = _suffixes(family)
    return PipelineParts(
        family=family,
        unet=weights.from_pretrained(UNet2DConditionModel, folder / "unet", device),
        vae=weights.from_pretrained(AutoencoderKL, folder / "vae", device),
        text_encoders=tuple(
            weights.from_pretrained(encoder_class, folder / f"text_encoder{suffix}", device)
            for encoder_class, suffix in zip(_ENCODERS, suffixes, strict=False)
        ),
        tokenizers=tuple(load_tokenizer(folder / f"tokenizer{suffix}") for suffix in suffixes),
        noise_scheduler_config=weights.read_config(folder / "scheduler" / "scheduler_config.json"),
        force_zeros_for_empty_prompt=_force_zeros(folder, family),
    )


def _load_single_file(path: Path, device: str | torch.device) -> PipelineParts:
    base_model.require_file(path)
    folder = base_model.config_folder(path)
    family, tensors = _detect_family(folder), weights.read_tensors(path)
    if (found := base_model.detect_family(tensors, path)) != family:
        raise ModelError(
            f"{path} is of family {found}, but the configurations in {folder} are of {family}"
        )
    suffixes = _suffixes(family)
    unet, vae = (
        weights.build(UNet2DConditionModel, folder / "unet"),
        weights.build(AutoencoderKL, folder / "vae"),
    )
    encoders = tuple(
        weights.build(encoder_class, folder / f"text_encoder{suffix}")
        for encoder_class, suffix in zip(_ENCODERS, suffixes, strict=False)
    )
    if family == "sdxl":  # first, while there is room: its translation copies what it cuts apart
        weights.load_state(
            encoders[1], single_file.open_clip_state(tensors, encoders[1]), path, device
        )
    weights.load_state(encoders[0], single_file.clip_state(tensors), path, device)
    weights.load_state(vae, single_file.vae_state(tensors, vae.config), path, device)
    weights.load_state(unet, single_file.unet_state(tensors, unet.config), path, device)
    for module in (unet, vae, *encoders):
        module.eval().requires_grad_(False)
    scheduler = weights.read_config(folder / "scheduler" / "scheduler_config.json")
    return PipelineParts(
        family=family,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tuple(load_tokenizer(folder / f"tokenizer{suffix}") for suffix in suffixes),
        noise_scheduler_config=scheduler | base_model.schedule_changes(tensors),
        force_zeros_for_empty_prompt=_force_zeros(folder, family),
    )


def _suffixes(family: Family) -> tuple[str, ...]:
    return ("", "_2") if family == "sdxl" else ("",)


def _force_zeros(folder: Path, family: Family) -> bool:
    # diffusers' own default, which published model_index.json files leave out or repeat.
    index = weights.read_config(folder / "model_index.json")
    return family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True))


def _detect_family(folder: Path) -> Family:
    """The family that `unet/config.json` describes and `model_index.json` does not contradict."""
    _require(folder, ["model_index.json", "unet/config.json"])
    index = weights.read_config(folder / "model_index.json")
    unet = weights.read_config(folder / "unet" / "config.json")
    conditioning = unet.get("addition_embed_type")
    has_second_encoder = bool(index.get("text_encoder_2"))
    if conditioning == "text_time" and has_second_encoder:
        return "sdxl"
    if conditioning is None and not has_second_encoder:
        return "sd1"
    raise ModelError(
        f"model in {folder} is neither SDXL (addition_embed_type='text_time' and two text encoders) nor SD 1.x "
        f"(neither of them): addition_embed_type={conditioning!r}, "
        f"{'two text encoders' if has_second_encoder else 'one text encoder'}"
    )


def _require(folder: Path, files: list[str]) -> None:
    repository = "stabilityai/stable-diffusion-xl-base-1.0"
    weights.require(
        folder,
        files,
        name="diffusers model",
        source=f"the base model's page, such as https://huggingface.co/{repository}",
        command=f"hf download {repository} --exclude '*.fp16.*' '*.bin' '*.ckpt' '*.onnx*' --local-dir {folder}",
    )
