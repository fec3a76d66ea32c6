"""What tests of sampling share: prompts as a table, and the latents that a tiny model draws of
them."""

import dataclasses

import polars as pl
import pytest
import torch

from training.config.evaluation import SamplingConfig
from training.evaluation.prompt_sets import seed_of
from training.models.vae import Vae
from training.sampling import sampling
from training.sampling.prompt_encoding import PromptEncoder
from training.sampling.prompt_reading import read_set
from training.tables.schemas import TABLES

# diffusers' own pipelines and schedulers under NumPy 2; ours keeps it quiet itself.
COPY = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)
CONFIG = SamplingConfig(num_steps=6, guidance_scale=5.0, batch_size=4)


def prompt_frame(*rows):
    """Rows of `(prompt_id, text, negative, height, width)`."""
    full = [
        {"prompt_id": key, "text": text, "negative": negative, "group": "g", "height": height, "width": width,
         "seed": seed_of(key)}
        for key, text, negative, height, width in rows
    ]  # fmt: skip
    return pl.DataFrame(full, schema=TABLES["prompt_sets"].schema)


def changed(**changes):
    """The config of these tests with changes; DDIM comes with the only schedule that it takes."""
    if changes.get("sampler") == "ddim":
        changes["schedule"] = "plain"
    return dataclasses.replace(CONFIG, **changes)


def encoder_of(parts, frame, clip_skip=1, **changes):
    config = changed(**changes)
    return PromptEncoder(parts, read_set(frame, config), config, clip_skip=clip_skip, device="cpu")


def latents_of(parts, frame, clip_skip=1, **changes):
    encoder, prompts = encoder_of(parts, frame, clip_skip, **changes), sampling._prompts(frame)
    return sampling.draw(parts, Vae(parts.vae, "cpu"), encoder, prompts, changed(**changes))


def assert_equal_but_for_rounding(one, other):
    """To 2e-6 of the largest value: guidance of random weights drives latents to 50 and more."""
    torch.testing.assert_close(one, other, atol=2e-6 * other.abs().max().item(), rtol=0)
