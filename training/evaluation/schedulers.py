"""Samplers by the names that people use, as diffusers' schedulers with the settings that hold for latents.

A checkpoint's own scheduler config is for SDXL `EulerDiscreteScheduler` with leading spacing; a sampler made from it
starts at sigma 11.5 instead of 14.6 and never sees pure noise. So only what describes the training is taken from it.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from training.evaluation_config import Sampler, Schedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

LABELS: Mapping[str, str] = {
    "dpmpp_2m": "DPM++ 2M", "euler_a": "Euler a", "ddim": "DDIM", "karras": "Karras", "plain": "",
}  # fmt: skip
"""As A1111 and its relatives write them into pictures."""

_TRAINING_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")

SamplingScheduler: TypeAlias = "DDIMScheduler | DPMSolverMultistepScheduler | EulerAncestralDiscreteScheduler"


def label(sampler: Sampler, schedule: Schedule) -> str:
    """Sampler and schedule as the UIs write them."""
    return f"{LABELS[sampler]} {LABELS[schedule]}".rstrip()


def make_scheduler(
    sampler: Sampler, schedule: Schedule, noise_scheduler_config: Mapping[str, Any], num_steps: int
) -> SamplingScheduler:
    """A scheduler with its timesteps set; it holds the state of one batch, so make one for each.

    Args:
        sampler: Its name in the configuration.
        schedule: Where its steps lie.
        noise_scheduler_config: `scheduler_config.json` of the checkpoint: betas and prediction type.
        num_steps: Steps, each one call of the UNet.

    Source: Karras et al., arXiv:2206.00364, eq. 5 (rho = 7); Lu et al., arXiv:2211.01095, algorithm 2; Lin et al.,
    arXiv:2305.08891, section 3.3 (trailing timesteps, so that DDIM starts from pure noise).
    """
    trained = {key: noise_scheduler_config[key] for key in _TRAINING_KEYS if key in noise_scheduler_config}
    with warnings.catch_warnings():
        # diffusers 0.42 reads tensors with np.array, which NumPy 2 deprecates for those that cannot say `copy`.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
        scheduler = _make(sampler, schedule, trained)
        scheduler.set_timesteps(num_steps)
    return scheduler


def _make(sampler: Sampler, schedule: Schedule, trained: dict[str, Any]) -> SamplingScheduler:
    # Here, because the model card asks for labels while Dagster draws the graph, which must not load torch.
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

    if sampler == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**trained, solver_order=2, use_karras_sigmas=schedule == "karras")
    if sampler == "euler_a":
        return EulerAncestralDiscreteScheduler(**trained, timestep_spacing="linspace")
    # Latents leave [-1, 1], so nothing is clipped; the last step ends at the schedule's own first alpha.
    return DDIMScheduler(**trained, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
