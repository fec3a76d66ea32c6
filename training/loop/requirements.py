"""What a base model, a recipe and the libraries must have to be trained: refused by the dry run as
by the trainer.

Needs no torch: all of it is told before weights are loaded.
"""

from pathlib import Path

from training.config.run import RunConfig, shares_optimizer
from training.errors import ConfigError, ModelError
from training.estimates.flops import ModelConfigs
from training.models.base_model import noise_schedule
from training.models.noise_schedules import change_schedule, check_last_step
from training.models.trainables import trainable_of
from training.optimization.installed import check_installed


def check_trainable(folder: Path, model: ModelConfigs, config: RunConfig, num_ranks: int) -> None:
    """Refuse what the trainer refuses of a base model, a recipe and the libraries here, before it
    loads weights.

    Args:
        folder: The base model, as messages name it.
        model: Its configs.
        config: Of the run.
        num_ranks: That the run has.

    Raises:
        ModelError: the model is of another family than the recipe's, or its noise schedule is not
            known.
        ConfigError: an option that the model, the schedule, the ranks or this machine does not
            have.
        TrainingError: the model's noise schedule has steps that the loss cannot teach.
    """
    if config.family not in ("any", model.family):
        raise ModelError(
            f"family={config.family!r}, but base model {folder} is of family {model.family!r}: name another one under "
            "`base`"
        )
    if config.train_text_encoder_2 and len(model.text_encoders) == 1:
        raise ConfigError(
            f"train_text_encoder_2=true, but base model {folder} has one text encoder"
        )
    trainable_of(config)
    layers = model.text_encoders[0]["num_hidden_layers"]
    if config.clip_skip > layers:
        raise ConfigError(
            f"clip_skip={config.clip_skip}: the text encoder of {folder} has {layers} layers"
        )
    blocks = model.block_names
    if unknown := [name for name in config.compute.gradient_checkpointing if name not in blocks]:
        raise ConfigError(
            f"compute.gradient_checkpointing: no block {unknown[0]!r}; there are {', '.join(blocks)}"
        )
    schedule = change_schedule(
        noise_schedule(folder), config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
    )
    check_last_step(schedule, config.loss)
    check_installed(config.optimizer)
    shares_optimizer(config, num_ranks)
