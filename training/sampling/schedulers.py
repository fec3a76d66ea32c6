"""Samplers and schedules by the names that people use: diffusers' solvers on the noise levels that
the UIs take.

A checkpoint's own scheduler config is for SDXL `EulerDiscreteScheduler` with leading spacing; a
sampler made from it starts at sigma 11.5 instead of 14.6 and never sees pure noise. So only what
describes the training is taken from it.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from training.config.evaluation import Sampler, Schedule
from training.errors import EvaluationError

LABELS: Mapping[str, str] = {
    "dpmpp_2m": "DPM++ 2M", "dpmpp_sde": "DPM++ SDE", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "euler": "Euler", "euler_a": "Euler a", "ddim": "DDIM",
}  # fmt: skip
"""As A1111 and its relatives write them into images."""
SCHEDULE_LABELS: Mapping[str, str] = {
    "karras": "Karras", "exponential": "Exponential", "ays": "Align Your Steps", "plain": "Normal",
}  # fmt: skip

_TRAINING_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
_AYS = {"sdxl": "StableDiffusionXLSigmas", "sd1": "StableDiffusionSigmas"}
_RHO = 7.0


class SamplingScheduler(Protocol):
    """What a sampler is asked: diffusers' schedulers, and ours beside them. It holds the state of
    one pass."""

    timesteps: Any
    """`(n,)` fp32 on the CPU: the timestep of each call of the UNet."""
    sigmas: Any
    """`(steps + 1,)` fp32: noise levels, falling."""

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        """Latents as the UNet is shown them."""
        ...

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """Latents of an image as a second pass starts from."""
        ...

    def step(self, model_output: Any, timestep: Any, sample: Any, *, generator: Any) -> Any:
        """`prev_sample` is what the next call starts from."""
        ...


def starting_latents(scheduler: SamplingScheduler, noise: Any) -> Any:
    """The latents that a first pass starts from: the UNet is shown `noise` itself, of variance 1,
    by every sampler.

    Of data + sigma * noise that is sqrt(1 + sigma^2) times the noise, with data of variance 1 what
    training ends at. Source: x_T ~ N(0, 1) of arXiv:2006.11239, 2010.02502 and 2211.01095; ComfyUI,
    Stability AI's code of SDXL, and A1111 with its option "SGM noise multiplier";
    docs/decisions/0012-start-noise.md.
    """
    return noise / scheduler.scale_model_input(noise.new_ones(()), scheduler.timesteps[0])


def label(sampler: Sampler, schedule: Schedule) -> str:
    """Sampler and schedule in one, as people say them."""
    return (
        LABELS[sampler] if schedule == "plain" else f"{LABELS[sampler]} {SCHEDULE_LABELS[schedule]}"
    )


def make_scheduler(
    sampler: Sampler,
    schedule: Schedule,
    noise_scheduler_config: Mapping[str, Any],
    num_steps: int,
    *,
    family: str = "sdxl",
    strength: float = 1.0,
) -> SamplingScheduler:
    """A scheduler with its timesteps set; it holds the state of one batch's pass, so make one for
    each.

    Args:
        sampler: Its name in the configuration.
        schedule: Where its steps lie.
        noise_scheduler_config: `scheduler_config.json` of the checkpoint: betas, prediction type,
            zero terminal SNR.
        num_steps: Steps taken.
        family: `sdxl` or `sd1`; Align Your Steps has a table for each.
        strength: Share of the schedule that is walked, its end: a schedule of `num_steps /
            strength` steps is laid out and its last `num_steps` are taken, as A1111's hires fix and
            ComfyUI's `denoise` do.

    Raises:
        EvaluationError: the checkpoint's schedule cannot be sampled from, or not with this one.
    """
    trained = {
        key: noise_scheduler_config[key] for key in _TRAINING_KEYS if key in noise_scheduler_config
    }
    _check(schedule, trained)
    with warnings.catch_warnings():
        # diffusers 0.42 reads tensors with np.array, which NumPy 2 deprecates for those that cannot
        # say `copy`.
        warnings.filterwarnings(
            "ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning
        )
        return _make(sampler, schedule, trained, num_steps, family, strength)


def lay_out(schedule: Schedule, num_steps: int, trained: np.ndarray, family: str) -> np.ndarray:
    """Noise levels `(num_steps + 1,)`, falling, the last one 0.

    Args:
        schedule: Which.
        num_steps: How many.
        trained: `(timesteps,)` sigmas of the trained timesteps, rising.
        family: `sdxl` or `sd1`.

    Source: karras: arXiv:2206.00364, eq. 5 with rho = 7; exponential: even in log sigma; plain:
    even in time, the UIs' Normal; ays: arXiv:2404.14507, tables of 10 steps with 11 levels, other
    numbers log-linear between them and the last level 0, as its authors say and ComfyUI does. A1111
    interpolates 11 levels to as many as there are steps and then appends 0: its last step begins at
    0.029, ours of 10 steps at 0.113.
    """
    least, most = float(trained[0]), float(trained[-1])
    ramp = np.linspace(0, 1, num_steps)
    if schedule == "karras":
        sigmas = (most ** (1 / _RHO) + ramp * (least ** (1 / _RHO) - most ** (1 / _RHO))) ** _RHO
    elif schedule == "exponential":
        sigmas = np.exp(np.log(most) + ramp * np.log(least / most))
    elif schedule == "plain":
        places = (1 - ramp) * (len(trained) - 1)
        sigmas = np.exp(np.interp(places, np.arange(len(trained)), np.log(trained)))
    else:
        from diffusers.schedulers import AysSchedules

        table = np.log([*AysSchedules[_AYS[family]][:-1], least])
        sigmas = np.exp(
            np.interp(np.linspace(0, 1, num_steps + 1), np.linspace(0, 1, len(table)), table)
        )[:-1]
    return np.append(sigmas, 0.0)


def _check(schedule: Schedule, trained: Mapping[str, Any]) -> None:
    if not trained.get("rescale_betas_zero_snr"):
        return
    if trained.get("prediction_type", "epsilon") == "epsilon":
        raise EvaluationError(
            "the checkpoint's noise schedule has zero terminal SNR (rescale_betas_zero_snr) and its UNet predicts the "
            "noise: at the first step the image is all noise and the prediction says nothing of it; such a model "
            "must have prediction_type = v_prediction in its scheduler_config.json"
        )
    if schedule == "ays":
        raise EvaluationError(
            'schedule="ays" is tabled for models that start at sigma 14.6, this one has zero terminal SNR and starts '
            'from pure noise; take "plain" or "karras"'
        )


def _make(
    sampler: Sampler,
    schedule: Schedule,
    trained: dict[str, Any],
    num_steps: int,
    family: str,
    strength: float,
) -> SamplingScheduler:
    # Here, because the model card asks for labels while Dagster draws the graph, which must not
    # load torch.
    import torch
    from diffusers import (
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
    )

    from training.sampling.solvers import Dpmpp3mSde, DpmppSde

    multistep: dict[str, tuple[type, dict[str, Any]]] = {
        "dpmpp_2m": (DPMSolverMultistepScheduler, {"solver_order": 2}),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        # Published samplers keep order 3 to the step before the last, however few the steps.
        "dpmpp_3m_sde": (Dpmpp3mSde, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++",
                                      "solver_type": "heun", "lower_order_final": False}),
        "euler": (EulerDiscreteScheduler, {}),
        "euler_a": (EulerAncestralDiscreteScheduler, {}),
        # The first-order solver is DDIM on any sigmas; diffusers' own DDIM steps 1000 // n
        # timesteps, which misses the next one where n does not divide 1,000, and clips latents
        # unless told not to.
        "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    }  # fmt: skip
    solver, options = multistep.get(sampler, (DPMSolverMultistepScheduler, {}))
    scheduler: Any = solver(**trained, **options)
    alphas = scheduler.alphas_cumprod
    table = ((1 - alphas) / alphas).sqrt().double().numpy()  # (timesteps,), rising
    total = int(num_steps / strength)
    sigmas = _ddim(total, table) if sampler == "ddim" else lay_out(schedule, total, table, family)
    sigmas = sigmas[-num_steps - 1 :]
    if sampler == "dpmpp_sde":
        own = DpmppSde(sigmas.tolist(), trained.get("prediction_type", "epsilon"))
        own.timesteps = torch.from_numpy(_timesteps(own.levels.double().numpy(), table))
        return own
    scheduler.set_timesteps(num_steps)
    # What diffusers lays out differs from scheduler to scheduler, and some cannot do Karras;
    # stepping they all can.
    scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float32))
    scheduler.timesteps = torch.from_numpy(_timesteps(sigmas[:-1], table))
    scheduler.set_begin_index(0)  # not looked up by timestep, of which two may be equal
    return scheduler


def _ddim(num_steps: int, trained: np.ndarray) -> np.ndarray:
    """Trailing timesteps, from the last one on, and the first one at the end.

    Source: arXiv:2305.08891, section 3.3; arXiv:2010.02502, whose code ends at the first alpha and
    not at 1.
    """
    places = np.round(len(trained) * (1 - np.arange(num_steps) / num_steps)).astype(int) - 1
    # A weak second pass lays out more steps than there are timesteps; the last of them then stand
    # still.
    return np.append(trained[places.clip(0)], trained[0])


def _timesteps(sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The trained timestep nearest to each level, in log sigma: the UNet has seen no others. As
    ComfyUI does."""
    places = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    return places.round().astype(np.float32)
