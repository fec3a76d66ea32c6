"""Draws a checkpoint's pictures of a prompt set: one generator per picture, so that no picture
depends on the others.

Text is encoded as in training, in chunks of 75 tokens, so that long prompts mean what they meant
there; what the UNet attends to may change from call to call. Noise is drawn on the CPU, one seed
per picture, as ComfyUI does: equal on every device, and the same for every checkpoint. Latents,
scheduler and guidance are fp32 in every precision; only the models compute in less.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from training.buckets.geometry import Size
from training.config.evaluation import SamplingConfig
from training.errors import EvaluationError
from training.loop.conditioning import make_time_ids
from training.loop.loading import load_checkpoint
from training.models.lora import add_loras
from training.models.tokens import CHUNK_TOKENS, MAX_CHUNKS
from training.models.unet import PipelineParts
from training.models.vae import Vae, arithmetic, scale_of
from training.sampling.guidance import guide, num_readings, perturbed, repeat_prompts
from training.sampling.image_prompts import own_file_stem
from training.sampling.png_parameters import lora_hash, parameters, write_png
from training.sampling.prompt_encoding import PassText, PromptEncoder, cut_prompts
from training.sampling.prompt_reading import Readings, read_set, remarks
from training.sampling.sampling_inputs import clip_skip, model_folder
from training.sampling.schedulers import SamplingScheduler, make_scheduler, starting_latents
from training.sampling.second_pass import enlarge, final_size
from training.tables.schemas import TABLES

Progress = Callable[[int, int], None]
"""Called after each batch with the pictures drawn so far and their total."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of `prompt_sets`."""

    prompt_id: str
    text: str
    negative: str
    group: str
    height: int
    width: int
    seed: int


def sample_folder(
    checkpoint: Path, name: str, prompts: pl.DataFrame, config: SamplingConfig, folder: Path, *,
    home: Path = Path(), device: str = "cpu", progress: Progress | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Draw a checkpoint's pictures and write them as PNG files, each atomically and with its
    parameters inside.

    Args:
        checkpoint: Model folder in diffusers layout, with its averaged weights and READY.json where
            a run made it.
        name: `<run>@<samples_seen>`, written into the pictures.
        prompts: Rows of table `prompt_sets`.
        config: How they are drawn.
        folder: Where `<first 16 of SHA-256 of prompt_id>.png` go: an id may hold anything, a file
            name may not.
        home: What relative paths of LoRAs start from.
        device: Where the models run.
        progress: Follows along.

    Returns:
        Rows of table `sample_images`; height and width are those of the finished pictures. One that
        is not finite has no file and no digest.

    Raises:
        ModelError: the checkpoint is incomplete, or a LoRA does not fit it.
        EvaluationError: the checkpoint cannot be sampled in this way, or a prompt cannot be drawn.
    """
    read_set(prompts, config)  # before anything is loaded
    model, layer = model_folder(checkpoint, config), clip_skip(checkpoint, config)
    parts = load_checkpoint(checkpoint, model, device)
    files = [home / lora.path for lora in config.loras]
    add_loras(parts, [(file, lora.weight) for file, lora in zip(files, config.loras, strict=True)])
    hashes = {lora.name: lora_hash(file) for file, lora in zip(files, config.loras, strict=True)}
    shown = name if model == checkpoint else f"{name} ema"
    by_id = {prompt.prompt_id: prompt for prompt in _prompts(prompts)}
    rows: list[dict[str, object]] = []
    for prompt_id, picture in sample(parts, prompts, config, clip_skip=layer, device=device):
        prompt = by_id[prompt_id]
        size = final_size(
            Size(prompt.height, prompt.width), config.second_pass, scale_of(parts.vae)
        )
        row: dict[str, object] = {
            "prompt_id": prompt_id, "text": prompt.text, "negative": prompt.negative, "group": prompt.group,
            "seed": prompt.seed, "height": size.height, "width": size.width,
        }  # fmt: skip
        if picture is None:
            (folder / file_name(prompt_id)).unlink(missing_ok=True)
        else:
            row |= {
                "file": file_name(prompt_id),
                "sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
            }
            text = parameters(
                prompt.text, prompt.negative, seed=prompt.seed, size=Size(prompt.height, prompt.width), model=shown,
                config=config, clip_skip=layer if parts.family == "sd1" else 1, lora_hashes=hashes,
            )  # fmt: skip
            write_png(folder / file_name(prompt_id), picture, text)
        rows.append(row)
        if progress is not None and (len(rows) % config.batch_size == 0 or len(rows) == len(by_id)):
            progress(len(rows), len(by_id))
    return TABLES["sample_images"].conform(
        pl.DataFrame(rows, schema=TABLES["sample_images"].schema)
    )


def sample(
    parts: PipelineParts,
    prompts: pl.DataFrame,
    config: SamplingConfig,
    *,
    clip_skip: int = 1,
    device: str = "cpu",
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Draw one picture per prompt, batched by size and number of chunks.

    Args:
        parts: The model, fp32; the UNet is rounded in place where the precision is bf16.
        prompts: Rows of table `prompt_sets`.
        config: How they are drawn; its averaged weights, clip skip and LoRAs are the caller's to
            choose.
        clip_skip: Layer of SD 1.x's text encoder, from the end.
        device: Where the model is.

    Yields:
        `(prompt_id, (H, W, 3) uint8)`, in an order of its own; None for a picture that is not
        finite, as a broken checkpoint draws them. A picture follows from its prompt, size, seed,
        the weights and `config` without `batch_size`; batches change it by rounding only.

    Raises:
        EvaluationError: a prompt cannot be drawn, a side does not fit the checkpoint's VAE, or the
            checkpoint cannot be sampled in this way.
    """
    rows, readings = _prompts(prompts), read_set(prompts, config)
    encoder = PromptEncoder(parts, readings, config, clip_skip=clip_skip, device=device)
    # SDXL's VAE overflows in fp16, and bf16 has no more bits than a picture; TF32 has the range and
    # three bits more.
    vae = Vae(parts.vae, device, precision="fp32" if config.precision == "fp32" else "tf32")
    _lay_out(parts, config, vae.device)
    _warn_of_plain(parts, config)
    _warn_of_cut(prompts, parts, config)
    _warn_of_remarks(prompts, readings)
    for batch in _batches(rows, encoder, config.batch_size):
        odd = [prompt for prompt in batch if prompt.height % vae.scale or prompt.width % vae.scale]
        if odd:
            size = f"{odd[0].height}x{odd[0].width}"
            raise EvaluationError(
                f"prompt {odd[0].prompt_id!r}: size {size} must be a multiple of {vae.scale} pixels"
            )
        with arithmetic(vae.device, vae.precision):
            latents = draw(parts, vae, encoder, batch, config)
        pictures = vae.decode_each(latents)
        for prompt, picture in zip(batch, pictures, strict=True):
            yield prompt.prompt_id, picture


@torch.inference_mode()
def draw(
    parts: PipelineParts,
    vae: Vae,
    encoder: PromptEncoder,
    batch: Sequence[Prompt],
    config: SamplingConfig,
) -> torch.Tensor:
    """Scaled latents `(B, C, H/scale, W/scale)` fp32 of prompts of one size and number of chunks,
    of both passes."""
    passes = encoder.encode(
        [prompt.negative for prompt in batch], [prompt.text for prompt in batch]
    )
    factors: torch.Tensor | float = 1.0
    if set(found := encoder.guidance([prompt.text for prompt in batch])) != {1.0}:
        factors = torch.tensor(found, device=vae.device)[:, None, None, None]
    size = Size(batch[0].height, batch[0].width)

    def noise_of(size: Size) -> tuple[list[torch.Generator], torch.Tensor]:
        # Both passes start from the picture's seed, as A1111 and ComfyUI do.
        generators = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch]
        shape = (parts.unet.config.in_channels, size.height // vae.scale, size.width // vae.scale)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return generators, noise.to(vae.device)

    trained, family = parts.noise_scheduler_config, parts.family
    scheduler = make_scheduler(
        config.sampler, config.schedule, trained, config.num_steps, family=family
    )
    generators, noise = noise_of(size)
    start = starting_latents(scheduler, noise)
    latents = denoise(parts, passes[0], start, size, scheduler, generators, config, factors)
    if (second := config.second_pass) is None:
        return latents
    size = final_size(size, second, vae.scale)
    scheduler = make_scheduler(
        config.sampler,
        config.schedule,
        trained,
        second.num_steps,
        family=family,
        strength=second.strength,
    )
    generators, noise = noise_of(size)
    latents = enlarge(latents, size, second.enlarge, vae)
    latents = scheduler.add_noise(latents, noise, scheduler.timesteps[:1].expand(len(batch)))
    return denoise(parts, passes[1], latents, size, scheduler, generators, config, factors)


def denoise(
    parts: PipelineParts, text: PassText, latents: torch.Tensor, size: Size, scheduler: SamplingScheduler,
    generators: list[torch.Generator], config: SamplingConfig, factors: torch.Tensor | float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """One pass: from noised latents `(B, C, h, w)` to those of the picture.

    Args:
        parts: The model; the UNet computes in the type of its weights.
        text: Of this pass.
        latents: As the scheduler has them at its first timestep.
        size: Of the pictures, pixels.
        scheduler: New.
        generators: One per picture, for samplers that draw while they step.
        config: Guidance.
        factors: Of the guidance scale, one for all or `(B, 1, 1, 1)`.
    """
    device, dtype = latents.device, parts.unet.dtype
    readings = num_readings(config)
    # As trained, for a picture that was neither shrunk nor cropped: original and target size are
    # its own. In fp32, from which the UNet makes its sines before it rounds them, as with
    # timesteps.
    sizes = torch.tensor([size] * (readings * len(latents)), device=device)
    time_ids = make_time_ids(sizes, torch.zeros_like(sizes), sizes)
    shown = added = hidden_states = None
    with perturbed(parts.unet, config):
        for call, timestep in enumerate(scheduler.timesteps):
            if (now := text.at(call)) is not shown:
                shown, hidden_states = now, repeat_prompts(now.hidden_states, config).to(dtype)
                if now.pooled is not None:
                    added = {
                        "text_embeds": repeat_prompts(now.pooled, config),
                        "time_ids": time_ids,
                    }
            repeated = scheduler.scale_model_input(torch.cat([latents] * readings), timestep)
            prediction = parts.unet(
                repeated.to(dtype),
                timestep.to(device),
                encoder_hidden_states=hidden_states,
                added_cond_kwargs=added,
            ).sample.float()
            guided = guide(prediction, config, factors)
            latents = scheduler.step(guided, timestep, latents, generator=generators).prev_sample
    return latents


def file_name(prompt_id: str) -> str:
    """The PNG's name for a prompt: safe whatever the id holds."""
    return f"{own_file_stem(prompt_id)}.png"


def _prompts(frame: pl.DataFrame) -> list[Prompt]:
    return [
        Prompt(**row)
        for row in frame.select(Prompt.__slots__).sort("prompt_id").iter_rows(named=True)
    ]


def _batches(
    prompts: list[Prompt], encoder: PromptEncoder, batch_size: int
) -> Iterator[list[Prompt]]:
    """Prompts of one size and one number of chunks, at most `batch_size` at a time, in order within
    their group."""
    groups: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        key = (prompt.height, prompt.width, encoder.num_chunks(prompt.text, prompt.negative))
        groups.setdefault(key, []).append(prompt)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _lay_out(parts: PipelineParts, config: SamplingConfig, device: torch.device) -> None:
    """Bring the UNet into the precision, and on a GPU into the memory format that its convolutions
    are fastest in."""
    if config.precision == "bf16":
        parts.unet.bfloat16()
    if config.precision != "fp32" and device.type == "cuda":
        parts.unet.to(memory_format=torch.channels_last)


def _warn_of_plain(parts: PipelineParts, config: SamplingConfig) -> None:
    """SDXL's fine-tunes draw garbage on the plain schedule, bigASP's page says; DDIM and zero-SNR
    models want it."""
    zero_snr = parts.noise_scheduler_config.get("rescale_betas_zero_snr")
    if (
        parts.family == "sdxl"
        and config.schedule == "plain"
        and config.sampler != "ddim"
        and not zero_snr
    ):
        warnings.warn(
            f'evaluation.sampling: sampler="{config.sampler}" with schedule="plain" often draws garbage with SDXL; '
            'take "karras" or "exponential"',
            stacklevel=3,
        )


def _warn_of_cut(prompts: pl.DataFrame, parts: PipelineParts, config: SamplingConfig) -> None:
    cut = cut_prompts(prompts, parts.tokenizers[0], config)
    if cut:
        named = ", ".join(
            f"{row['text']} of {row['prompt_id']!r} {row['tokens']}" for row in cut[:5]
        )
        limit = CHUNK_TOKENS * MAX_CHUNKS
        warnings.warn(
            f"{len(cut)} prompts or negatives have more than {limit} tokens, and what follows is not read: {named}"
            f"{', ...' if len(cut) > 5 else ''}",
            stacklevel=3,
        )


def _warn_of_remarks(prompts: pl.DataFrame, readings: Readings) -> None:
    """Once a prompt, and once for a negative however many prompts share it."""
    for row in remarks(prompts, readings):
        warnings.warn(f"{row['text']} of {row['prompt_id']!r}: {row['read as']}", stacklevel=3)
