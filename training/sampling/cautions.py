"""What people are warned of before sample images are drawn."""

import warnings
from collections.abc import Callable

import polars as pl

from training.config.evaluation import SamplingConfig
from training.models.tokens import CHUNK_TOKENS, MAX_CHUNKS, Tokenizer
from training.models.unet import PipelineParts
from training.sampling.prompt_encoding import (
    cut_prompts,
)
from training.sampling.prompt_reading import Readings, remarks

Progress = Callable[[int, int], None]
"""Called after each batch with the images drawn so far and their total."""


def warn_of_plain(parts: PipelineParts, config: SamplingConfig) -> None:
    """SDXL's fine-tunes draw garbage on the plain schedule, bigASP's page says; DDIM and zero-SNR
    models want it."""
    zero_snr = parts.noise_scheduler_config.get("rescale_betas_zero_snr")
    if (
        parts.family == "sdxl"
        and config.schedule == "plain"
        and config.sampler != "ddim"
        and not zero_snr
    ):
        warnings.warn(
            f'evaluation.sampling: sampler="{config.sampler}" with schedule="plain" often draws garbage with SDXL; '
            'take "karras" or "exponential"',
            stacklevel=3,
        )


def warn_of_cut(prompts: pl.DataFrame, tokenizer: Tokenizer, config: SamplingConfig) -> None:
    """Prompts that are longer than what the text encoders read."""
    cut = cut_prompts(prompts, tokenizer, config)
    if cut:
        named = ", ".join(
            f"{row['text']} of {row['prompt_id']!r} {row['tokens']}" for row in cut[:5]
        )
        limit = CHUNK_TOKENS * MAX_CHUNKS
        warnings.warn(
            f"{len(cut)} prompts or negatives have more than {limit} tokens, and what follows is not read: {named}"
            f"{', ...' if len(cut) > 5 else ''}",
            stacklevel=3,
        )


def warn_of_remarks(prompts: pl.DataFrame, readings: Readings) -> None:
    """Once a prompt, and once for a negative however many prompts share it."""
    for row in remarks(prompts, readings):
        warnings.warn(f"{row['text']} of {row['prompt_id']!r}: {row['read as']}", stacklevel=3)
