"""What a base model, a recipe and the libraries must have to be trained: refused by the dry run as by the trainer.

Needs no torch: all of it is told before weights are loaded.
"""

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from training.config.run import LossConfig, OptimizerConfig, RunConfig
from training.errors import ConfigError, ModelError, TrainingError
from training.estimates.flops import ModelConfigs
from training.models.base_model import noise_schedule

EIGHT_BIT = ("adamw_8bit", "lion_8bit")
"""Optimizers that bitsandbytes has."""
# Kohaku XL Delta's page.
_FIRST_BROKEN, _LAST_BROKEN = (0, 36, 0), (0, 41, 0)
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


def check_trainable(folder: Path, model: ModelConfigs, config: RunConfig, num_ranks: int) -> None:
    """Refuse what the trainer refuses of a base model, a recipe and the libraries here, before it loads weights.

    Args:
        folder: The base model, as messages name it.
        model: Its configs.
        config: Of the run.
        num_ranks: That the run has.

    Raises:
        ModelError: the model is of another family than the recipe's, or its noise schedule is not known.
        ConfigError: an option that the model, the schedule, the ranks or this machine does not have.
        TrainingError: the model's noise schedule has steps that the loss cannot teach.
    """
    if config.family not in ("any", model.family):
        raise ModelError(
            f"family={config.family!r}, but base model {folder} is of family {model.family!r}: name another one under "
            "`base`"
        )
    if config.train_text_encoder_2 and len(model.text_encoders) == 1:
        raise ConfigError(f"train_text_encoder_2=true, but base model {folder} has one text encoder")
    layers = model.text_encoders[0]["num_hidden_layers"]
    if config.clip_skip > layers:
        raise ConfigError(f"clip_skip={config.clip_skip}: the text encoder of {folder} has {layers} layers")
    blocks = model.block_names
    if unknown := [name for name in config.compute.gradient_checkpointing if name not in blocks]:
        raise ConfigError(f"compute.gradient_checkpointing: no block {unknown[0]!r}; there are {', '.join(blocks)}")
    schedule = change_schedule(
        noise_schedule(folder), config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
    )
    check_last_step(schedule, config.loss)
    check_installed(config.optimizer)
    shares_optimizer(config, num_ranks)


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
        zero_terminal_snr: Rescale the schedule so that its last step holds no signal; False leaves it as it is.

    Raises:
        ConfigError: the last step holds no signal and the noise is to be predicted.

    Source: arXiv:2305.08891, algorithm 1 (rescaling) and section 3.3 (samplers must begin at the last step).
    """
    config = dict(noise_scheduler_config)
    if prediction_type != "base":
        config["prediction_type"] = prediction_type
    if zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        whose = "zero_terminal_snr=true" if zero_terminal_snr else "the base model's schedule has zero terminal SNR"
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
        TrainingError: the step holds no signal, and the model predicts the noise, or `min_snr` gives it no weight.
    """
    if (curve := schedule.get("beta_schedule", "linear")) not in _CURVES and not schedule.get("trained_betas"):
        raise ModelError(f"scheduler_config.json: beta_schedule={curve!r} is none of {', '.join(_CURVES)}")
    if not _ends_without_signal(schedule):
        return
    if schedule.get("prediction_type", "epsilon") == "epsilon":
        raise TrainingError(NOTHING_TO_PREDICT)
    if loss.weighting == "min_snr":
        raise TrainingError(NO_WEIGHT)


def _ends_without_signal(schedule: Mapping[str, Any]) -> bool:
    """Whether the last step of a diffusers schedule is noise alone: rescaled to be so, or a beta of 1."""
    betas = schedule.get("trained_betas") or [0.0]
    if not schedule.get("trained_betas") and schedule.get("beta_schedule", "linear") in ("linear", "scaled_linear"):
        betas = [schedule.get("beta_end", 0.02)]  # the other curves stay below 1
    return bool(schedule.get("rescale_betas_zero_snr")) or max(betas) >= 1


def check_installed(config: OptimizerConfig) -> None:
    """Check that the library of an optimizer is there, where it is an optional one.

    Raises:
        ConfigError: bitsandbytes is missing, or a version with known errors.
    """
    if config.name not in EIGHT_BIT:
        return
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"optimizer.name={config.name} needs bitsandbytes, which is not installed: run `pip install "
            "'diffusion-foundry[gpu8bit]'`, or take adamw or lion"
        ) from None
    if _FIRST_BROKEN <= tuple(int(digits) for digits in re.findall(r"\d+", version)[:3]) <= _LAST_BROKEN:
        raise ConfigError(
            f"bitsandbytes {version}: 8-bit optimizers of 0.36.0 to 0.41.0 are known to be wrong; install a newer one"
        )


def shares_optimizer(config: RunConfig, num_ranks: int) -> bool:
    """Whether a run of so many ranks shares its optimizer's state.

    Raises:
        ConfigError: it would, and the optimizer needs all parameters at once.
    """
    active = config.compute.shard_optimizer and num_ranks > 1
    if active and config.optimizer.name == "prodigy":
        raise ConfigError(
            "compute.shard_optimizer=true: prodigy estimates one rate from all parameters, so no rank can hold a "
            "part of them; take another optimizer or false"
        )
    return active
