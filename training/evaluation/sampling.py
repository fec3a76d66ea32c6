"""Draws a checkpoint's pictures of a prompt set: one generator per picture, so that no picture depends on the others.

Text is encoded as in training, in chunks of 75 tokens, so that long prompts mean what they meant there. Noise is drawn
on the CPU, one seed per picture, as ComfyUI does: equal on every device, and the same for every checkpoint.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training import commit
from training.conditioning import make_time_ids
from training.data.tables import TABLES
from training.data.tokens import count_chunks, tokenize
from training.errors import EvaluationError, ModelError
from training.evaluation.schedulers import label, make_scheduler
from training.evaluation_config import SamplingConfig
from training.models.text_encoders import TextConditioning, encode_sd1, encode_sdxl, ids_tensor
from training.models.unet import PipelineParts, load_pipeline_parts
from training.models.vae import Vae

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
    device: str = "cpu", progress: Progress | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Draw a checkpoint's pictures and write them as PNG files, each atomically and with its parameters inside.

    Args:
        checkpoint: Model folder in diffusers layout.
        name: `<run>@<samples_seen>`, written into the pictures.
        prompts: Rows of table `prompt_sets`.
        config: Sampler, steps, guidance and batch size.
        folder: Where `<first 16 of SHA-256 of prompt_id>.png` go: an id may hold anything, a file name may not.
        device: Where the models run.
        progress: Follows along.

    Returns:
        Rows of table `sample_images`.

    Raises:
        ModelError: the checkpoint is incomplete.
        EvaluationError: a picture is not finite, or a side does not fit the checkpoint's VAE.
    """
    parts = load_pipeline_parts(checkpoint, device)
    by_id = {prompt.prompt_id: prompt for prompt in _prompts(prompts)}
    rows: list[dict[str, object]] = []
    for prompt_id, picture in sample(parts, prompts, config, device=device):
        prompt = by_id[prompt_id]
        file = file_name(prompt_id)
        write_png(folder / file, picture, parameters(prompt, config, name))
        rows.append(
            {
                "prompt_id": prompt_id, "text": prompt.text, "negative": prompt.negative, "group": prompt.group,
                "seed": prompt.seed, "height": prompt.height, "width": prompt.width, "file": file,
                "sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
            }
        )  # fmt: skip
        if progress is not None and (len(rows) % config.batch_size == 0 or len(rows) == len(by_id)):
            progress(len(rows), len(by_id))
    return TABLES["sample_images"].conform(pl.DataFrame(rows, schema=TABLES["sample_images"].schema))


def sample(
    parts: PipelineParts, prompts: pl.DataFrame, config: SamplingConfig, *, device: str = "cpu"
) -> Iterator[tuple[str, np.ndarray]]:
    """Draw one picture per prompt, batched by size and number of chunks.

    Yields:
        `(prompt_id, (H, W, 3) uint8)`, in an order of its own. A picture follows from its prompt, size, seed, the
        weights and `config` without `batch_size`; batches change it by rounding only.

    Raises:
        EvaluationError: a picture is not finite, or a side does not fit the checkpoint's VAE.
    """
    vae = Vae(parts.vae, device)
    for batch in _batches(_prompts(prompts), parts, config.batch_size):
        odd = [prompt for prompt in batch if prompt.height % vae.scale or prompt.width % vae.scale]
        if odd:
            size = f"{odd[0].height}x{odd[0].width}"
            raise EvaluationError(f"prompt {odd[0].prompt_id!r}: size {size} must be a multiple of {vae.scale} pixels")
        latents = denoise(parts, batch, config, vae.scale, device)
        try:
            pictures = vae.decode(latents)
        except ModelError as error:
            ids = ", ".join(repr(prompt.prompt_id) for prompt in batch)
            raise EvaluationError(f"pictures of prompts {ids} cannot be shown: {error}") from error
        for prompt, picture in zip(batch, pictures, strict=True):
            yield prompt.prompt_id, picture


@torch.inference_mode()
def denoise(
    parts: PipelineParts, batch: Sequence[Prompt], config: SamplingConfig, scale: int, device: str
) -> torch.Tensor:
    """Scaled latents `(B, C, H/scale, W/scale)` fp32 of prompts of one size and one number of chunks.

    Source: classifier-free guidance, Ho and Salimans, arXiv:2207.12598.
    """
    scheduler = make_scheduler(config.sampler, config.schedule, parts.noise_scheduler_config, config.num_steps)
    generators = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch]
    height, width = batch[0].height, batch[0].width
    shape = (parts.unet.config.in_channels, height // scale, width // scale)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(device) * scheduler.init_noise_sigma  # (B, C, H/scale, W/scale)
    text = _encode(parts, [prompt.negative for prompt in batch], [prompt.text for prompt in batch], device)
    # As trained, for a picture that was neither shrunk nor cropped: original and target size are its own.
    size = torch.tensor([[height, width]] * (2 * len(batch)), device=device)
    time_ids = make_time_ids(size, torch.zeros_like(size), size)
    added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": time_ids}
    for timestep in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        prediction = parts.unet(
            doubled, timestep.to(device), encoder_hidden_states=text.hidden_states, added_cond_kwargs=added
        ).sample
        without, with_text = prediction.chunk(2)
        guided = without + config.guidance_scale * (with_text - without)
        # Only the ancestral sampler draws while it steps; DDIM and DPM++ 2M take the generators and leave them alone.
        latents = scheduler.step(guided, timestep, latents, generator=generators).prev_sample
    return latents


def parameters(prompt: Prompt, config: SamplingConfig, checkpoint: str) -> str:
    """The generation parameters of a picture in the form that A1111 and its relatives write and read."""
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    settings = {
        "Steps": config.num_steps,
        "Sampler": label(config.sampler, config.schedule),
        "CFG scale": config.guidance_scale,
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Model": checkpoint,
        "RNG": "CPU",
    }
    return f"{prompt.text}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def write_png(path: Path, picture: np.ndarray, text: str) -> None:
    """Write `(H, W, 3)` uint8 as PNG with `text` under the keyword `parameters`, atomically."""
    info = PngInfo()
    # tEXt is Latin-1 by definition; anything else goes into iTXt, which the readers of these pictures know too.
    if text.isascii():
        info.add_text("parameters", text)
    else:
        info.add_itxt("parameters", text)
    with commit.atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", pnginfo=info, compress_level=4)


def file_name(prompt_id: str) -> str:
    """The PNG's name for a prompt: safe whatever the id holds."""
    return f"{hashlib.sha256(prompt_id.encode()).hexdigest()[:16]}.png"


def _prompts(frame: pl.DataFrame) -> list[Prompt]:
    return [Prompt(**row) for row in frame.select(Prompt.__slots__).sort("prompt_id").iter_rows(named=True)]


def _batches(prompts: list[Prompt], parts: PipelineParts, batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts of one size and one number of chunks, at most `batch_size` at a time, in order within their group."""
    texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
    chunks = {
        text: count_chunks(entry.num_tokens)
        for text, entry in zip(texts, tokenize(texts, parts.tokenizers[0]), strict=True)
    }
    groups: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        key = (prompt.height, prompt.width, max(chunks[prompt.text], chunks[prompt.negative]))
        groups.setdefault(key, []).append(prompt)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _encode(parts: PipelineParts, negatives: list[str], prompts: list[str], device: str) -> TextConditioning:
    """Conditioning `(2 * B, n * 77, d)`, negatives first; each distinct text is encoded once."""
    texts = [*negatives, *prompts]
    distinct = list(dict.fromkeys(texts))
    num_chunks = max(prompt.num_chunks for prompt in tokenize(distinct, parts.tokenizers[0]))
    ids = [ids_tensor(tokenize(distinct, tokenizer, min_chunks=num_chunks), device) for tokenizer in parts.tokenizers]
    rows = torch.tensor([distinct.index(text) for text in texts], device=device)
    if parts.family == "sd1":
        return TextConditioning(
            hidden_states=encode_sd1(parts.text_encoders[0], ids[0]).hidden_states[rows], pooled=None
        )
    encoded = encode_sdxl(*parts.text_encoders, *ids)
    assert encoded.pooled is not None, "SDXL has pooled text"
    hidden_states, pooled = encoded.hidden_states[rows], encoded.pooled[rows]
    if parts.force_zeros_for_empty_prompt:
        empty = [place for place, negative in enumerate(negatives) if not negative]
        hidden_states[empty], pooled[empty] = 0.0, 0.0
    return TextConditioning(hidden_states=hidden_states, pooled=pooled)
