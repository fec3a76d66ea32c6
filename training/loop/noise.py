"""Timesteps, noise and posterior draws, keyed by (epoch, image_id): equal on every rank, device and
after a resume.

All numbers are drawn on the CPU, so that they do not depend on the device that trains.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training import seeds
from training.errors import TrainingError
from training.models.noise_schedules import NOTHING_TO_PREDICT
from training.seeds import Purpose


def alphas_cumprod(noise_scheduler_config: Mapping[str, Any]) -> torch.Tensor:
    """The share of signal left at each timestep, `(T,)` fp32, from a diffusers scheduler config.

    Raises:
        TrainingError: the schedule ends without any signal, and the model predicts the noise: such
            a step has nothing to learn from, and its min-SNR weight is 0/0.
    """
    from diffusers import DDPMScheduler

    # SD's folders name samplers (Euler, PNDM); all of them share the betas that DDPM reads.
    scheduler = DDPMScheduler.from_config(
        {**noise_scheduler_config, "_class_name": "DDPMScheduler"}
    )
    shares = scheduler.alphas_cumprod.float()
    prediction_type = noise_scheduler_config.get("prediction_type", "epsilon")
    if shares[-1] <= 0 and prediction_type == "epsilon":
        raise TrainingError(NOTHING_TO_PREDICT)
    return shares


def draw_timesteps(
    seed: int, epoch: int, image_ids: Sequence[str], num_timesteps: int
) -> torch.Tensor:
    """Uniform timesteps `(B,)` int64 in `[0, num_timesteps)`."""
    draws = [seeds.generator(seed, Purpose.TIMESTEP, epoch, image_id) for image_id in image_ids]
    return torch.tensor([draw.randrange(num_timesteps) for draw in draws], dtype=torch.int64)


def stratified_timesteps(seed: int, image_ids: Sequence[str], num_timesteps: int) -> torch.Tensor:
    """One timestep per image, `(N,)` int64: one from each of N equal slices, dealt out at random,
    always the same."""
    count = len(image_ids)
    rng = seeds.generator(seed, Purpose.VALIDATION, "timesteps", count)
    steps = [int((slot + rng.random()) * num_timesteps / count) for slot in range(count)]
    rng.shuffle(steps)
    return torch.tensor(steps, dtype=torch.int64)


def draw_noise(
    seed: int,
    purpose: Purpose,
    epoch: int,
    image_ids: Sequence[str],
    shape: torch.Size,
    *,
    offset: float = 0.0,
) -> torch.Tensor:
    """Standard normal noise `(B, *shape)` fp32, one generator per image.

    Args:
        seed: The run's.
        purpose: NOISE, POSTERIOR or VALIDATION: which stream.
        epoch: Keys the draw; 0 for draws that never change.
        image_ids: B of them.
        shape: `(4, H/8, W/8)`.
        offset: Standard deviation of a constant added to each channel; 0 for none.

    Source: offset noise, crosslabs.org/blog/diffusion-with-offset-noise.
    """
    rows = []
    for image_id in image_ids:
        generator = seeds.torch_generator(seed, purpose, epoch, image_id)
        row = torch.randn(shape, generator=generator)
        if offset > 0:
            row = row + offset * torch.randn((shape[0], 1, 1), generator=generator)
        rows.append(row)
    return torch.stack(rows)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, signal: torch.Tensor
) -> torch.Tensor:
    """Noised latents `(B, 4, h, w)`: `sqrt(a) * latents + sqrt(1 - a) * noise`.

    Args:
        latents: `(B, 4, h, w)` fp32.
        noise: Of equal shape.
        timesteps: `(B,)` int64.
        signal: `alphas_cumprod`, `(T,)` fp32 on the latents' device.

    Source: DDPM, arXiv:2006.11239, equation 4.
    """
    share = signal[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * latents + (1 - share).sqrt() * noise
