"""Draws a checkpoint's images of a prompt set: one generator per image, so that no image
depends on the others.

Text is encoded as in training, in chunks of 75 tokens, so that long prompts mean what they meant
there; what the UNet attends to may change from call to call. Noise is drawn on the CPU, one seed
per image, as ComfyUI does: equal on every device, and the same for every checkpoint. Latents,
scheduler and guidance are fp32 in every precision; only the models compute in less.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from training.buckets.geometry import Size
from training.config.evaluation import SamplingConfig
from training.errors import EvaluationError
from training.loop.conditioning import make_time_ids
from training.loop.loading import load_checkpoint, needed_base
from training.models.base_model import SUFFIX, config_folder, require_file
from training.models.lora import add_loras
from training.models.text_encoders import load_tokenizer
from training.models.unet import PipelineParts, require_folder
from training.models.vae import Vae, arithmetic, scale_of
from training.sampling.cautions import warn_of_cut, warn_of_plain, warn_of_remarks
from training.sampling.guidance import guide, num_readings, perturbed, repeat_prompts
from training.sampling.image_prompts import own_file_stem
from training.sampling.png_parameters import lora_hash, parameters, write_png
from training.sampling.prompt_encoding import (
    ChunkCounts,
    PassText,
    PromptEncoder,
    check_layer,
)
from training.sampling.prompt_reading import read_set
from training.sampling.sampling_inputs import clip_skip, model_folder
from training.sampling.schedulers import SamplingScheduler, make_scheduler, starting_latents
from training.sampling.second_pass import enlarge, final_size
from training.tables.schemas import TABLES

Progress = Callable[[int, int], None]
"""Called after each batch with the images drawn so far and their total."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What draws, how, and where the files go."""

    checkpoint: Path
    """Model folder in diffusers layout, with its averaged weights and READY.json where a run made
    it; or a single file."""
    name: str
    """`<run>@<samples_seen>`, written into the images."""
    config: SamplingConfig
    """How they are drawn."""
    folder: Path
    """Where `<first 16 of SHA-256 of prompt_id>.png` go: an id may hold anything, a file name may
    not."""
    home: Path
    """What relative paths of LoRAs start from."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one size and one number of chunks."""

    drawing: Drawing
    prompts: tuple[Prompt, ...]

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts of {self.drawing.name} from {self.prompts[0].prompt_id!r} on"


MapBatches = Callable[[Iterable[PromptBatch]], Iterable[list[dict[str, object]]]]


class ImageSampler:
    """Draws batches of prompts into files; a worker of the engine. Its model stays for the next
    batches."""

    def __init__(self, device: str) -> None:
        """Load nothing yet; `device` is where the models run."""
        self._device = device
        self._loaded: tuple[Drawing, _Model] | None = None

    def __call__(self, batch: PromptBatch) -> list[dict[str, object]]:
        """Draw a batch: rows of table `sample_images`, as `sample_folder` says."""
        drawing = batch.drawing
        if self._loaded is None or self._loaded[0] != drawing:
            self._loaded = None  # Never two at a time.
            self._loaded = drawing, _Model(drawing, self._device)
        model = self._loaded[1]
        images = model.painter.draw(batch.prompts)
        return [
            model.keep(prompt, image) for prompt, image in zip(batch.prompts, images, strict=True)
        ]

    def close(self) -> None:
        """Drop the model."""
        self._loaded = None


class _Model:
    """A checkpoint that is loaded for a drawing."""

    def __init__(self, drawing: Drawing, device: str) -> None:
        config, loras = drawing.config, drawing.config.loras
        model = model_folder(drawing.checkpoint, config)
        self.drawing, self.clip_skip = drawing, clip_skip(drawing.checkpoint, config)
        parts = load_checkpoint(drawing.checkpoint, model, device)
        files = [drawing.home / lora.path for lora in loras]
        add_loras(parts, [(file, lora.weight) for file, lora in zip(files, loras, strict=True)])
        self.hashes = {lora.name: lora_hash(file) for file, lora in zip(files, loras, strict=True)}
        self.shown = drawing.name if model == drawing.checkpoint else f"{drawing.name} ema"
        self.painter = Painter(parts, config, clip_skip=self.clip_skip, device=device)

    def keep(self, prompt: Prompt, image: np.ndarray | None) -> dict[str, object]:
        """Write an image's file, or remove that of one that is not finite now; its row."""
        config, parts = self.drawing.config, self.painter.parts
        size = final_size(
            Size(prompt.height, prompt.width), config.second_pass, scale_of(parts.vae)
        )
        row: dict[str, object] = {
            "prompt_id": prompt.prompt_id, "text": prompt.text, "negative": prompt.negative, "group": prompt.group,
            "seed": prompt.seed, "height": size.height, "width": size.width,
        }  # fmt: skip
        file = file_name(prompt.prompt_id)
        if image is None:
            (self.drawing.folder / file).unlink(missing_ok=True)
            return row
        text = parameters(
            prompt.text, prompt.negative, seed=prompt.seed, size=Size(prompt.height, prompt.width), model=self.shown,
            config=config, clip_skip=self.clip_skip if parts.family == "sd1" else 1, lora_hashes=self.hashes,
        )  # fmt: skip
        write_png(self.drawing.folder / file, image, text)
        return row | {"file": file, "sha256": hashlib.sha256(image.tobytes()).hexdigest()}


def sample_folder(
    checkpoint: Path, name: str, prompts: pl.DataFrame, config: SamplingConfig, folder: Path, *,
    home: Path = Path(), map_batches: MapBatches | None = None, progress: Progress | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Draw a checkpoint's images and write them as PNG files, each atomically and with its
    parameters inside.

    Args:
        checkpoint: See `Drawing`, as for `name`, `config`, `folder` and `home`.
        name: See `Drawing`.
        prompts: Rows of table `prompt_sets`.
        config: See `Drawing`.
        folder: See `Drawing`.
        home: See `Drawing`.
        map_batches: Maps an `ImageSampler` over batches: the engine; None for one on the CPU.
        progress: Follows along.

    Returns:
        Rows of table `sample_images`; height and width are those of the finished images. One that
        is not finite has no file and no digest.

    Raises:
        ModelError: the checkpoint is incomplete, or a LoRA does not fit it.
        EvaluationError: the checkpoint cannot be sampled in this way, or a prompt cannot be drawn.
    """
    readings = read_set(prompts, config)  # before anything is loaded
    needed = needed_base(checkpoint)
    whole = model_folder(checkpoint, config) if needed is None else needed[0].base_model
    require_file(whole) if whole.suffix == SUFFIX else require_folder(whole)
    tokenizer = load_tokenizer(config_folder(whole) / "tokenizer")
    warn_of_cut(prompts, tokenizer, config)
    warn_of_remarks(prompts, readings)
    drawing = Drawing(checkpoint=checkpoint, name=name, config=config, folder=folder, home=home)
    counts = ChunkCounts(readings, tokenizer)
    batches = [
        PromptBatch(drawing, tuple(batch))
        for batch in _batches(_prompts(prompts), counts, config.batch_size)
    ]
    rows: list[dict[str, object]] = []
    for made in (map_batches or partial(map, ImageSampler("cpu")))(batches):
        rows += made
        if progress is not None:
            progress(len(rows), prompts.height)
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
    """Draw one image per prompt, batched by size and number of chunks.

    Args:
        parts: The model, fp32; the UNet is rounded in place where the precision is bf16.
        prompts: Rows of table `prompt_sets`.
        config: How they are drawn; its averaged weights, clip skip and LoRAs are the caller's to
            choose.
        clip_skip: Layer of SD 1.x's text encoder, from the end.
        device: Where the model is.

    Yields:
        `(prompt_id, (H, W, 3) uint8)`, in an order of its own; None for an image that is not
        finite, as a broken checkpoint draws them. An image follows from its prompt, size, seed,
        the weights and `config` without `batch_size`; batches change it by rounding only.

    Raises:
        EvaluationError: a prompt cannot be drawn, a side does not fit the checkpoint's VAE, or the
            checkpoint cannot be sampled in this way.
    """
    readings = read_set(prompts, config)
    painter = Painter(parts, config, clip_skip=clip_skip, device=device)
    warn_of_cut(prompts, parts.tokenizers[0], config)
    warn_of_remarks(prompts, readings)
    counts = ChunkCounts(readings, parts.tokenizers[0])
    for batch in _batches(_prompts(prompts), counts, config.batch_size):
        for prompt, image in zip(batch, painter.draw(batch), strict=True):
            yield prompt.prompt_id, image


class Painter:
    """Draws batches of prompts with one model."""

    def __init__(
        self, parts: PipelineParts, config: SamplingConfig, *, clip_skip: int, device: str
    ) -> None:
        """See `sample` for the arguments.

        Raises:
            EvaluationError: the checkpoint cannot be sampled in this way.
        """
        self.parts, self._config, self._device = parts, config, device
        self._clip_skip = clip_skip
        check_layer(parts, config, clip_skip)
        # SDXL's VAE overflows in fp16, and bf16 has no more bits than an image; TF32 has the range
        # and three bits more.
        self._vae = Vae(
            parts.vae, device, precision="fp32" if config.precision == "fp32" else "tf32"
        )
        _lay_out(parts, config, self._vae.device)
        warn_of_plain(parts, config)

    def draw(self, batch: Sequence[Prompt]) -> list[np.ndarray | None]:
        """Images `(H, W, 3)` uint8 of prompts of one size and number of chunks; None for one that
        is not finite.

        Raises:
            EvaluationError: a side does not fit the VAE.
        """
        vae, config = self._vae, self._config
        odd = [prompt for prompt in batch if prompt.height % vae.scale or prompt.width % vae.scale]
        if odd:
            size = f"{odd[0].height}x{odd[0].width}"
            raise EvaluationError(
                f"prompt {odd[0].prompt_id!r}: size {size} must be a multiple of {vae.scale} pixels"
            )
        readings = read_set(pl.DataFrame([asdict(prompt) for prompt in batch]), config)
        encoder = PromptEncoder(
            self.parts, readings, config, clip_skip=self._clip_skip, device=self._device
        )
        with arithmetic(vae.device, vae.precision):
            latents = draw(self.parts, vae, encoder, batch, config)
        return vae.decode_each(latents)


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
        # Both passes start from the image's seed, as A1111 and ComfyUI do.
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
    """One pass: from noised latents `(B, C, h, w)` to those of the image.

    Args:
        parts: The model; the UNet computes in the type of its weights.
        text: Of this pass.
        latents: As the scheduler has them at its first timestep.
        size: Of the images, pixels.
        scheduler: New.
        generators: One per image, for samplers that draw while they step.
        config: Guidance.
        factors: Of the guidance scale, one for all or `(B, 1, 1, 1)`.
    """
    device, dtype = latents.device, parts.unet.dtype
    readings = num_readings(config)
    # As trained, for an image that was neither shrunk nor cropped: original and target size are
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


def _batches(prompts: list[Prompt], counts: ChunkCounts, batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts of one size and one number of chunks, at most `batch_size` at a time, in order within
    their group."""
    groups: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        key = (prompt.height, prompt.width, counts.of(prompt.text, prompt.negative))
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
