"""Images per second in each precision of sampling, drawn as the product draws them, beside the
goal of 1 on an H200.

SDXL with random weights (speed does not depend on their values), DPM++ 2M with guidance, prompts of
two chunks. On a GPU in full size: 1024 x 1024 pixels, 30 steps. Without one, a tiny model whose
ratios in one run are all that it says.

Usage: python benchmarks/bench_sampling.py [--tiny] [--batch N] [--batches N] [--steps N]

A precision that runs out of memory is tried again with half the batch.
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import polars as pl
import torch
from diffusers import AutoencoderKL
from random_sdxl import TINY_SCALE, make_parts

from training.config.evaluation import SamplingConfig, SamplingPrecision
from training.evaluation.prompt_sets import make_frame
from training.models.text_encoders import load_tokenizer
from training.models.unet import PipelineParts
from training.sampling.sampling import sample

GOAL_PER_S = 1.0
SIDE_PX = 1024
WARM_UP_STEPS = 2
TOKENIZERS = Path(__file__).resolve().parents[1] / "demo" / "models" / "base"
VAE_CHANNELS, TINY_VAE_CHANNELS = (128, 256, 512, 512), (4, 4, 4, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a precision came to."""

    precision: SamplingPrecision
    batch_size: int
    """The largest that fits, of that asked for and its halves; 0 where not one image does."""
    images_per_s: float | None
    """None where it ran out of memory."""
    peak_bytes: int | None
    """Of device memory; None on a CPU."""


def make_model(device: torch.device, *, tiny: bool) -> PipelineParts:
    """A random SDXL with VAE and tokenizers, fp32."""
    channels = TINY_VAE_CHANNELS if tiny else VAE_CHANNELS
    with device:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels, norm_num_groups=min(32, *channels), layers_per_block=2, scaling_factor=0.13025,
        )  # fmt: skip
    tokenizers = tuple(load_tokenizer(TOKENIZERS / name) for name in ("tokenizer", "tokenizer_2"))
    parts = dataclasses.replace(make_parts(device, tiny=tiny), vae=vae, tokenizers=tokenizers)
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.eval().requires_grad_(False)
    return parts


def make_prompts(count: int, side_px: int) -> pl.DataFrame:
    """Prompts of two chunks, for square images."""
    rows: list[dict[str, object]] = [
        {"prompt_id": str(number), "text": f"{number % 10} " * 80, "negative": "bad", "group": "g", "height": side_px,
         "width": side_px}
        for number in range(count)
    ]  # fmt: skip
    return make_frame(rows)


def measure(
    parts: PipelineParts,
    config: SamplingConfig,
    device: torch.device,
    *,
    side_px: int,
    num_batches: int,
) -> Result:
    """Images per second over so many batches, after a short one for warming up; `bf16` rounds the
    model."""
    size = config.batch_size
    while size:
        _free(device)
        try:
            warm_up = dataclasses.replace(config, num_steps=WARM_UP_STEPS, batch_size=size)
            _draw(parts, warm_up, device, make_prompts(size, side_px))
            prompts = make_prompts(size * num_batches, side_px)
            began = time.perf_counter()
            _draw(parts, dataclasses.replace(config, batch_size=size), device, prompts)
            seconds = time.perf_counter() - began  # images are on the CPU: nothing is under way
        except torch.OutOfMemoryError:
            size //= 2
            continue
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Result(
            precision=config.precision,
            batch_size=size,
            images_per_s=prompts.height / seconds,
            peak_bytes=peak,
        )
    return Result(precision=config.precision, batch_size=0, images_per_s=None, peak_bytes=None)


def _free(device: torch.device) -> None:
    """Give back what the last batch held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _draw(
    parts: PipelineParts, config: SamplingConfig, device: torch.device, prompts: pl.DataFrame
) -> None:
    for _ in sample(parts, prompts, config, device=str(device)):
        pass


def measure_all(
    device: torch.device,
    *,
    tiny: bool,
    batch_size: int,
    num_batches: int,
    num_steps: int,
    precisions: Sequence[SamplingPrecision] = get_args(SamplingPrecision),
) -> list[Result]:
    """Every precision on one model, from the widest to the narrowest, because the narrowest rounds
    it."""
    parts = make_model(device, tiny=tiny)
    side_px = SIDE_PX // TINY_SCALE if tiny else SIDE_PX
    results: list[Result] = []
    for precision in precisions:
        config = SamplingConfig(precision=precision, num_steps=num_steps, batch_size=batch_size)
        results.append(measure(parts, config, device, side_px=side_px, num_batches=num_batches))
        _print(results[-1], results[0].images_per_s)
    return results


def _print(result: Result, base: float | None) -> None:
    if result.images_per_s is None:
        print(f"{result.precision:<12}  out of memory", flush=True)
        return
    memory = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB"
    ratio = "-" if base is None else f"{result.images_per_s / base:.2f} x"
    print(
        f"{result.precision:<12}{result.batch_size:>6}{result.images_per_s:>12.3f}{memory:>12}{ratio:>10}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny model of the same classes")
    parser.add_argument("--batch", type=int, default=0, help="images at a time; default 8, tiny 2")
    parser.add_argument(
        "--batches", type=int, default=0, help="batches to measure; default 1, tiny 4"
    )
    parser.add_argument("--steps", type=int, default=0, help="sampler steps; default 30, tiny 10")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    batch_size, num_batches = (
        options.batch or (2 if tiny else 8),
        options.batches or (4 if tiny else 1),
    )
    num_steps = options.steps or (10 if tiny else 30)
    if device.type == "cpu":
        torch.set_num_threads(1)  # two would wait for each other in a model this small
    print(f"{device}, {'tiny' if tiny else 'full-size'} SDXL, {num_steps} steps with guidance")
    print(f"{'':<12}{'batch':>6}{'images/s':>12}{'memory':>12}{'to fp32':>10}")
    results = measure_all(
        device, tiny=tiny, batch_size=batch_size, num_batches=num_batches, num_steps=num_steps
    )
    best = max((result.images_per_s or 0, result.precision) for result in results)
    if not tiny:
        print(
            f"best: {best[0]:.2f} images/s in {best[1]}; goal on an H200: at least {GOAL_PER_S:g}"
        )


if __name__ == "__main__":
    main()
