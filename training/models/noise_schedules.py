"""Which noise schedules can be trained, and how a recipe changes a base model's. Needs no torch."""

from collections.abc import Mapping
from typing import Any, Literal

from training.config.run import LossConfig
from training.errors import ConfigError, ModelError, TrainingError

_CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
"""`beta_schedule` of a diffusers scheduler."""
NOTHING_TO_PREDICT = (
    "the base model's schedule has zero terminal SNR (rescale_betas_zero_snr) but prediction_type='epsilon'; such a "
    "schedule needs v_prediction"
)
NO_WEIGHT = (
    'loss.weighting="min_snr" on a noise schedule of zero terminal SNR: its last step would have weight 0 and never be '
    'learned; take "plain" or "debiased"'
)
"""Why a schedule whose last step holds no signal cannot be trained."""


def change_schedule(
    noise_scheduler_config: Mapping[str, Any],
    prediction_type: Literal["base", "epsilon", "v_prediction"],
    *,
    zero_terminal_snr: bool,
) -> dict[str, Any]:
    """A noise scheduler's config with another prediction type or schedule.

    Args:
        noise_scheduler_config: The base model's.
        prediction_type: What the UNet is to predict; `base` for what it does.
        zero_terminal_snr: Rescale the schedule so that its last step holds no signal; False leaves
            it as it is.

    Raises:
        ConfigError: the last step holds no signal and the noise is to be predicted.

    Source: arXiv:2305.08891, algorithm 1 (rescaling) and section 3.3 (samplers must begin at the
    last step).
    """
    config = dict(noise_scheduler_config)
    if prediction_type != "base":
        config["prediction_type"] = prediction_type
    if zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if (
        config.get("rescale_betas_zero_snr")
        and config.get("prediction_type", "epsilon") == "epsilon"
    ):
        whose = (
            "zero_terminal_snr=true"
            if zero_terminal_snr
            else "the base model's schedule has zero terminal SNR"
        )
        raise ConfigError(
            f'{whose}, and the UNet is to predict the noise (prediction_type="{prediction_type}"): the last step holds '
            'no signal, is asked for its own input and learns nothing; take prediction_type="v_prediction"'
        )
    return config


def check_last_step(schedule: Mapping[str, Any], loss: LossConfig) -> None:
    """Check that the loss can teach the last step of a noise schedule.

    Args:
        schedule: A diffusers scheduler config.
        loss: Of the run.

    Raises:
        ModelError: diffusers has no such schedule.
        TrainingError: the step holds no signal, and the model predicts the noise, or `min_snr`
            gives it no weight.
    """
    if (curve := schedule.get("beta_schedule", "linear")) not in _CURVES and not schedule.get(
        "trained_betas"
    ):
        raise ModelError(
            f"scheduler_config.json: beta_schedule={curve!r} is none of {', '.join(_CURVES)}"
        )
    if not _ends_without_signal(schedule):
        return
    if schedule.get("prediction_type", "epsilon") == "epsilon":
        raise TrainingError(NOTHING_TO_PREDICT)
    if loss.weighting == "min_snr":
        raise TrainingError(NO_WEIGHT)


def _ends_without_signal(schedule: Mapping[str, Any]) -> bool:
    """Whether the last step of a diffusers schedule is noise alone: rescaled to be so, or a beta of
    1."""
    betas = schedule.get("trained_betas") or [0.0]
    if not schedule.get("trained_betas") and schedule.get("beta_schedule", "linear") in (
        "linear",
        "scaled_linear",
    ):
        betas = [schedule.get("beta_end", 0.02)]  # the other curves stay below 1
    return bool(schedule.get("rescale_betas_zero_snr")) or max(betas) >= 1
