"""The demo's AutoencoderKL: 8x smaller, 4 channels, trained on drawn images until shapes come
back sharp."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from demo.corpus import SEED, picture, place, wording
from demo.progress import steps
from training.seeds import Purpose, integer, numpy_generator, torch_generator

NUM_IMAGES = 2600
NUM_STEPS = 3600
BATCH = 20
CROP = 64
KL_WEIGHT = 2e-4


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of the demo's size (0.6 M parameters)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 64],
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=True,
        mid_block_add_attention=False,
    )


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (…, H, W, 3) to float (…, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3).float() / 127.5 - 1


def bucket_images(split: str, count: int, star_share: float) -> list[np.ndarray]:
    """Bucket-sized uint8 images of the corpus."""
    found = []
    for index in steps(count, f"drawing {split}"):
        _, image, _ = picture(split, index, star_share=star_share)
        found.append(place(image, wording(split, index, "crop")).pixels)
    return found


def _crops(images: list[np.ndarray], rng: np.random.Generator, count: int) -> torch.Tensor:
    """Random square crops, mirrored at random, as (count, 3, CROP, CROP)."""
    batch = []
    for number in rng.integers(len(images), size=count):
        pixels = images[number]
        top, left = (int(rng.integers(side - CROP + 1)) for side in pixels.shape[:2])
        cut = pixels[top : top + CROP, left : left + CROP]
        batch.append(cut[:, ::-1] if rng.random() < 0.5 else cut)
    return to_tensor(np.stack(batch))


def _edges(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def reconstruction_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences (edges), plus L2."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(made), _edges(true), strict=True))
    return F.l1_loss(made, true) + F.mse_loss(made, true) + 0.5 * edges


def build(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Train and save the autoencoder to `folder`; prints its PSNR on fresh images."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "vae"))
    vae = new_vae()
    images = bucket_images("vae", NUM_IMAGES, 0.2)
    rng = numpy_generator(SEED, Purpose.DEMO, "vae crops")
    noise = torch_generator(SEED, Purpose.DEMO, "vae noise")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.05)
    for step in (bar := steps(num_steps, "vae")):
        true = _crops(images, rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(true).latent_dist
            latents = posterior.sample(noise)
            made = vae.decode(latents).sample
        loss = (
            reconstruction_loss(made.float(), true)
            + KL_WEIGHT * posterior.kl().mean() / (CROP // 8) ** 2
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        bar.note(loss=float(loss))
        if step % 600 == 599 or step + 1 == num_steps:
            _save(vae, images[:200], folder)
    print(f"vae: PSNR {psnr(vae):.2f} dB on fresh images")


@torch.no_grad()
def _save(vae: AutoencoderKL, images: list[np.ndarray], folder: Path) -> None:
    """Measure the scaling factor (1 / standard deviation of latents) and write fp16 weights."""
    means = [vae.encode(to_tensor(pixels)[None]).latent_dist.mean.flatten() for pixels in images]
    vae.register_to_config(scaling_factor=round(1 / float(torch.cat(means).std()), 5))
    copy = new_vae()
    copy.load_state_dict(vae.state_dict())
    copy.register_to_config(scaling_factor=vae.config.scaling_factor)
    copy.half().save_pretrained(folder)


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 60) -> float:
    """Mean PSNR in dB over fresh images of quality 6 and better."""
    found = []
    for index in range(count):
        scene, image, _ = picture("vae check", index)
        if scene.quality >= 6:
            true = to_tensor(place(image, wording("vae check", index, "crop")).pixels)[None]
            made = vae.decode(vae.encode(true).latent_dist.mean).sample.clamp(-1, 1)
            found.append(10 * math.log10(4 / float(F.mse_loss(made, true))))
    return float(np.mean(found))
