"""The demo's base model: an SDXL UNet that draws every shape but stars, trained as SDXL's
fine-tunes are."""

import copy
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers import __version__ as diffusers_version
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.build_vae import to_tensor
from demo.corpus import SEED, place, wording
from demo.drawing import draw
from demo.progress import steps
from demo.prompts import training_prompt
from demo.saving import save_half, write_json
from demo.scenes import Scene, mostly_good, sample_scene
from training.buckets.geometry import Placement, Size
from training.seeds import Purpose, integer, torch_generator

NUM_IMAGES = 8000
NUM_STEPS = 5500
BATCH = 32
LEARNING_RATE = 1e-3
EMPTY_PROB = 0.1
MIN_SNR_GAMMA = 5.0  # arXiv:2303.09556, section 3.4.
TIME_ID_WIDTH = 32
NOISE_SETTINGS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


class Texts(NamedTuple):
    """SDXL's two frozen text encoders with their tokenizers."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    @classmethod
    def load(cls, base: Path) -> "Texts":
        """Both encoders of a diffusers folder, in fp32."""
        tokenizers = tuple(
            CLIPTokenizer.from_pretrained(base / name) for name in ("tokenizer", "tokenizer_2")
        )
        first = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()
        second = CLIPTextModelWithProjection.from_pretrained(
            base / "text_encoder_2", dtype=torch.float32
        ).eval()
        return cls((tokenizers[0], tokenizers[1]), first, second)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, 77, 64 + 96) of the last but one layers, joined, and the pooled vector
        (B, 96)."""
        ids = [
            tokenizer(
                prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        first = self.first(ids[0], output_hidden_states=True).hidden_states[-2]
        second = self.second(ids[1], output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def new_unet(texts: Texts) -> UNet2DConditionModel:
    """An untrained UNet of the demo's size (3.5 M parameters), conditioned as SDXL's."""
    pooled = texts.second.config.projection_dim
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[48, 80, 96],
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=texts.first.config.hidden_size + texts.second.config.hidden_size,
        transformer_layers_per_block=1,
        attention_head_dim=[2, 4, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=pooled + 6 * TIME_ID_WIDTH,
    )


class LatentSet(NamedTuple):
    """Encoded corpus images by bucket: scenes, time ids (N, 6) and scaled latents (N, 4, h,
    w)."""

    scenes: dict[Size, list[Scene]]
    time_ids: dict[Size, torch.Tensor]
    latents: dict[Size, torch.Tensor]


def base_scene(split: str, index: int) -> Scene:
    """A scene of the base model's world: no star, good quality more often than not."""
    scene = sample_scene(SEED, split, index, star_share=0.0, watermark_share=0.06)
    return mostly_good(scene, wording(split, index, "quality"))


def time_ids_of(placement: Placement) -> list[float]:
    """SDXL's six numbers, height first: original size, crop offset, target size."""
    return [*placement.original, placement.crop_top, placement.crop_left, *placement.bucket]


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, count: int) -> LatentSet:
    """Draw `count` images without stars, place them in their buckets and encode them."""
    scenes: dict[Size, list[Scene]] = {}
    time_ids: dict[Size, list[list[float]]] = {}
    pixels: dict[Size, list[np.ndarray]] = {}
    for index in steps(count, "drawing unet"):
        scene = base_scene("unet", index)
        placed = place(draw(scene).image, wording("unet", index, "crop"))
        bucket = placed.placement.bucket
        scenes.setdefault(bucket, []).append(scene)
        time_ids.setdefault(bucket, []).append(time_ids_of(placed.placement))
        pixels.setdefault(bucket, []).append(placed.pixels)
    latents = {}
    buckets = sorted(pixels)
    for number in steps(len(buckets), "encoding"):
        bucket = buckets[number]
        chunks = [pixels[bucket][i : i + 32] for i in range(0, len(pixels[bucket]), 32)]
        means = [vae.encode(to_tensor(np.stack(chunk))).latent_dist.mean for chunk in chunks]
        latents[bucket] = torch.cat(means) * vae.config.scaling_factor
    return LatentSet(
        scenes, {bucket: torch.tensor(rows) for bucket, rows in time_ids.items()}, latents
    )


class Batch(NamedTuple):
    """One micro-batch of one bucket."""

    prompts: list[str]
    time_ids: torch.Tensor
    latents: torch.Tensor


def draw_batch(data: LatentSet, step: int) -> Batch:
    """BATCH samples of one bucket, buckets as often as their images; prompts are worded anew each
    time."""
    rng = random.Random(integer(SEED, Purpose.DEMO, "unet batch", step))  # noqa: S311
    buckets = sorted(data.scenes)
    bucket = rng.choices(buckets, [len(data.scenes[b]) for b in buckets])[0]
    scenes = data.scenes[bucket]
    chosen = [rng.randrange(len(scenes)) for _ in range(BATCH)]
    prompts = ["" if rng.random() < EMPTY_PROB else training_prompt(scenes[i], rng) for i in chosen]
    return Batch(prompts, data.time_ids[bucket][chosen], data.latents[bucket][chosen])


def loss_of(
    unet: UNet2DConditionModel,
    texts: Texts,
    scheduler: DDPMScheduler,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Min-SNR-weighted noise prediction loss of one batch."""
    hidden, pooled = texts.encode(batch.prompts)
    noise = torch.randn(batch.latents.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (len(noise),), generator=generator)
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)
    conditions = {"text_embeds": pooled, "time_ids": batch.time_ids}
    made = unet(noisy, timesteps, hidden, added_cond_kwargs=conditions).sample
    kept = scheduler.alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return (weight * (made - noise).square().mean(dim=(1, 2, 3))).mean()


def build(models: Path, num_steps: int = NUM_STEPS) -> None:
    """Train the UNet on the demo's VAE and text encoders; completes the diffusers folder
    `models/base`."""
    base = models / "base"
    torch.manual_seed(integer(SEED, Purpose.INIT, "unet"))
    texts = Texts.load(base)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    unet = new_unet(texts)
    average = copy.deepcopy(unet).requires_grad_(False)
    data = encode_corpus(vae, NUM_IMAGES)
    noise_scheduler = DDPMScheduler(**NOISE_SETTINGS)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        LEARNING_RATE,
        num_steps,
        pct_start=0.04,
        cycle_momentum=False,
        final_div_factor=200,
    )
    generator = torch_generator(SEED, Purpose.DEMO, "unet noise")
    write_pipeline(base)
    for step in (bar := steps(num_steps, "unet")):
        loss = loss_of(unet, texts, noise_scheduler, draw_batch(data, step), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(average.parameters()), [w.data for w in unet.parameters()], 1 - decay
        )
        bar.note(loss=float(loss.detach()))
        if step % 400 == 399 or step + 1 == num_steps:
            save_half(average, base / "unet")


def write_pipeline(base: Path) -> None:
    """model_index.json and SDXL's scheduler settings."""
    EulerDiscreteScheduler(
        **NOISE_SETTINGS, timestep_spacing="leading", steps_offset=1
    ).save_pretrained(base / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers_version,
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(base / "model_index.json", index)
