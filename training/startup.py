"""Everything a run needs, checked and loaded before its first step."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from training import checkpoint, commit, run_folder
from training.checkpoint import Clock, TrainingState
from training.conditioning import trained_parameters
from training.data.tables import TABLES
from training.dataset import Dataset
from training.ema import Ema
from training.errors import DamageError, ModelError
from training.latent_source import LatentSource
from training.models.unet import load_pipeline_parts
from training.models.weights import model_digest
from training.optim import make_optimizer
from training.run_config import RunConfig
from training.run_folder import RunInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins or goes on."""

    state: TrainingState
    dataset: Dataset
    checkpoint: Path | None
    """What it resumes from; None for the base model."""
    torn: list[str]
    """A line for each newer checkpoint that is not whole."""


def prepare(folder: Path, config: RunConfig, inputs: RunInputs, device: torch.device) -> Start:
    """Load the newest whole checkpoint, or the base model, and the training set.

    Raises:
        TrainingError: the checkpoint belongs to another set or config.
        ModelError: the base model is not the one that `inputs.json` names, or cannot be loaded.
        DamageError: the training set's file is gone or changed.
        DataError: nothing to train on.
    """
    resumed, torn = checkpoint.find_resumable(folder)
    if resumed is not None:
        checkpoint.check_same_run(resumed, config, inputs)
    elif (digest := model_digest(inputs.base_model)) != inputs.base_digest:
        raise ModelError(
            f"base model {inputs.base_model} has digest {digest[:16]}, inputs.json says {inputs.base_digest[:16]}: "
            "the folder changed since the run was made"
        )
    parts = load_pipeline_parts(resumed or inputs.base_model, "cpu")
    if config.prompts.empty_prob > 0:
        # The model learns what the empty prompt is, so pipelines must not replace it by zeros.
        parts = dataclasses.replace(parts, force_zeros_for_empty_prompt=False)
    # Libraries note the folder that a model was loaded from in its config: equal models would differ by it.
    parts.unet.register_to_config(_name_or_path="")
    parts.vae.register_to_config(_name_or_path="")
    for encoder in parts.text_encoders:
        encoder.config.name_or_path = ""
    fetched = folder / run_folder.FETCHED if config.latents_url else inputs.latents
    dataset = Dataset(
        read_training_set(inputs),
        LatentSource(fetched, config.latents_url),
        config,
        parts.tokenizers,
        parts.vae.config.scaling_factor,
    )
    for module in (parts.unet, *parts.text_encoders):
        module.to(device)  # the VAE stays on the CPU: it is only saved again
    parameters = trained_parameters(
        parts, text_encoder=config.train_text_encoder, text_encoder_2=config.train_text_encoder_2
    )
    half_life = config.optimizer.ema_half_life_samples
    state = TrainingState(
        parts=parts,
        parameters=parameters,
        optimizer=make_optimizer(config.optimizer, parameters.values()),
        ema=Ema(parameters, half_life) if half_life else None,
        clock=Clock(),
    )
    if resumed is not None:
        checkpoint.restore_state(resumed, state)
    return Start(state=state, dataset=dataset, checkpoint=resumed, torn=torn)


def read_training_set(inputs: RunInputs) -> pl.DataFrame:
    """The frozen set, checked against the digest in `inputs.json`.

    Raises:
        DamageError: the file is gone or changed.
    """
    path = inputs.training_set
    found = commit.sha256_file(path) if path.is_file() else "no such file"
    if found != inputs.training_set_sha256:
        raise DamageError(
            f"training set {path}: {found[:16]}, inputs.json says SHA-256 {inputs.training_set_sha256[:16]}"
        )
    return pl.read_parquet(path).select(list(TABLES["training_set"].columns))
