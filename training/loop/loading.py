"""The model that a run trains, as the run wants it."""

import dataclasses
from pathlib import Path

import torch

from training.config.run import RunConfig
from training.models.unet import PipelineParts, load_pipeline_parts, with_schedule, with_vae
from training.models.vae import Vae


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
