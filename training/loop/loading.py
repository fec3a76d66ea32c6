"""The model that a run trains, as the run wants it, and the one that a checkpoint of it holds."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from training.config import older_runs
from training.config.run import RunConfig
from training.errors import ConfigError, DamageError, ModelError
from training.models.trainable import Trainable
from training.models.trainables import trainable_of
from training.models.unet import PipelineParts, load_pipeline_parts, with_schedule, with_vae
from training.models.vae import Vae
from training.models.weights import model_digest
from training.runs import run_folder


def load_model(
    source: Path, vae: Path | None, config: RunConfig, device: torch.device
) -> PipelineParts:
    """A model as the run wants it: its family, its VAE, its schedule, and free of the place that it
    came from.

    Args:
        source: The base model, or a checkpoint.
        vae: VAE that takes the place of the base model's; None for the model's own.
        config: Of the run.
        device: Where UNet and text encoders go, weight by weight.

    Raises:
        ModelError: it cannot be loaded, or the VAE is not for it.
    """
    parts = load_pipeline_parts(source, device)
    parts.vae.to("cpu")  # it is only saved again
    if vae is not None:
        parts = with_vae(parts, Vae.load(vae, "cpu").model, str(vae))
    parts = with_schedule(parts, config.prediction_type, zero_terminal_snr=config.zero_terminal_snr)
    if config.prompts.empty_prob > 0:
        # The model learns what the empty prompt is, so pipelines must not replace it by zeros, or
        # must.
        zeros = config.prompts.empty_as == "zeros" and parts.family == "sdxl"
        parts = dataclasses.replace(parts, force_zeros_for_empty_prompt=zeros)
    # Libraries note the folder that a model was loaded from in its config: equal models would
    # differ by it.
    parts.unet.register_to_config(_name_or_path="")
    parts.vae.register_to_config(_name_or_path="")
    for encoder in parts.text_encoders:
        encoder.config.name_or_path = ""
    return parts


def fill(parameters: Mapping[str, torch.nn.Parameter], trainable: Trainable, folder: Path) -> None:
    """Give injected parameters the weights that were saved of them.

    Args:
        parameters: By name.
        trainable: What they are of.
        folder: A checkpoint, or the averages in it.

    Raises:
        DamageError: a weight is missing or of another shape.
    """
    saved = trainable.load(folder, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            found = list(saved[name].shape) if name in saved else "missing"
            if found != list(parameter.shape):
                raise DamageError(f"{folder}: {name} is {found} instead of {list(parameter.shape)}")
            parameter.copy_(saved[name])


def needed_base(checkpoint: Path) -> tuple[run_folder.RunInputs, RunConfig, Trainable] | None:
    """The run of a checkpoint that holds only what was added to a base model; None for a checkpoint
    that is a model by itself.

    Raises:
        ModelError: the run, which names the base model, is missing.
    """
    if not (checkpoint / run_folder.READY).is_file():
        return None
    ready = run_folder.read_ready(checkpoint)
    if ready.config.get("trainable") is None:
        return None
    config = older_runs.build(ready.config)
    trainable = trainable_of(config)
    if not trainable.needs_base:
        return None
    try:
        inputs = run_folder.read_inputs(checkpoint.resolve().parents[1])
    except ConfigError as error:
        raise ModelError(
            f"checkpoint {checkpoint} is put into base model {ready.base_digest[:16]}, which its run names: {error}"
        ) from None
    check_digest("base model", inputs.base_model, ready.base_digest)
    return inputs, config, trainable


def load_checkpoint(checkpoint: Path, folder: Path, device: str | torch.device) -> PipelineParts:
    """The model that a checkpoint stands for, to draw with.

    Args:
        checkpoint: A run's, or a model without a run.
        folder: The checkpoint, or the averages in it.
        device: Where the modules go.

    Raises:
        ModelError: it cannot be loaded, or the base model that it needs is missing or another one.
    """
    needed = needed_base(checkpoint)
    if needed is None:
        return load_pipeline_parts(folder, device)
    inputs, config, trainable = needed
    parts = load_model(inputs.base_model, inputs.vae, config, torch.device(device))
    fill(trainable.inject(parts), trainable, folder)
    return parts


def check_digest(what: str, model: Path, recorded: str) -> None:
    """Compare a model with the one that a run began from.

    Raises:
        ModelError: it is another one.
    """
    if (digest := model_digest(model)) != recorded:
        raise ModelError(
            f"{what} {model} has digest {digest[:16]}, inputs.json says {recorded[:16]}: the folder changed since the "
            "run was made"
        )
