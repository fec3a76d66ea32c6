"""Training throughput on one device: bigASP's configuration recreated, then one lever at a time, each kept if it fits.

Full-size SDXL with random weights (speed does not depend on their values): UNet and text encoder 1 trained, text
encoder 2 frozen, buckets and prompt lengths mixed as in bigASP's run. The passes and steps are the product's own.

Usage: python benchmarks/train_throughput.py [--tiny] [--steps N] [--accumulate N] [--out FILE]
Without CUDA it runs at tiny size, where its numbers say nothing. FILE is what `foundry cost --rates FILE` reads.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training import noise, seeds
from training.conditioning import make_time_ids, predict, trained_parameters
from training.cost import RATES_FORMAT
from training.data.geometry import Size
from training.data.tokens import CHUNK_LENGTH
from training.flops import ModelConfigs, peak_flops, training_flops
from training.gpus import detect_gpu
from training.loss import mse_per_sample, prediction_target, timestep_weights
from training.models.compute import apply_compute
from training.models.unet import PipelineParts, named_modules
from training.optim import make_optimizer
from training.precision import Arithmetic
from training.run_config import BatchConfig, ComputeConfig, RunConfig
from training.seeds import Purpose

# Images per bucket of bigASP v1, (height, width): five_finetunes.md section 1.
BUCKETS = {
    (1216, 832): 372_164, (832, 1216): 289_428, (1152, 832): 174_153, (896, 1152): 64_223, (1152, 896): 56_959,
    (1344, 768): 30_512, (1024, 1024): 26_565, (1088, 896): 16_070, (1408, 704): 15_656, (768, 1344): 15_149,
    (1280, 768): 13_564, (1344, 704): 11_833, (1088, 960): 10_300, (832, 1152): 7_051, (1024, 960): 6_601,
    (896, 1088): 5_067, (960, 1024): 4_842, (960, 1088): 4_454, (768, 1280): 2_719, (704, 1344): 1_819,
    (704, 1472): 1_334, (704, 1408): 1_293, (640, 1600): 840, (576, 1728): 743, (640, 1536): 326, (576, 1664): 51,
}  # fmt: skip
CHUNK_SHARES = {1: 0.09, 2: 0.66, 3: 0.25}
TINY_SCALE = 16
"""Sides of buckets are divided by it at tiny size,"""
TINY_MICRO_SCALE = 4
"""and micro-batches by this."""
SCHEDULER = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
}  # fmt: skip
UNET = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TINY_UNET = UNET | {
    "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 48,
    "transformer_layers_per_block": [1, 1, 2], "attention_head_dim": [1, 2, 4], "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}  # fmt: skip
# Width, layers, heads and activation of text encoders 1 and 2.
ENCODERS = ((768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu"))
TINY_ENCODERS = ((16, 3, 2, "quick_gelu"), (32, 3, 2, "gelu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One configuration to measure."""

    run: RunConfig
    """Precision, layout, micro-batch."""
    fused: bool = False
    """The product's optimizer; else torch's AdamW as it comes."""
    sync: bool = True
    """Ask after every micro-step whether the loss is a number, as bigASP's code does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a variant came to."""

    name: str
    images_per_s: float | None
    """None where it ran out of memory."""
    mfu: float | None
    """None where the device's peak is not known."""
    peak_bytes: int | None
    """Of device memory; None on a CPU."""
    ratio: float | None
    """Of images_per_s to the recreated configuration's."""


def recreated(micro_batch_size: int) -> Variant:
    """bigASP v1's training as published (performance.md section 1.1), but for the micro-batch, which is not."""
    run = RunConfig(
        encoding="sdxl", precision="fp16_amp", compute=ComputeConfig(gradient_checkpointing=("all",)),
        batch=BatchConfig(micro_batch_size=micro_batch_size),
    )  # fmt: skip
    return Variant(run=run)


def levers(variant: Variant, *, compiles: bool) -> Generator[tuple[str, Variant], Variant, None]:
    """`variant` with one lever more; the caller sends back what the next one is to build on."""

    def changed(**values: object) -> Variant:
        return dataclasses.replace(variant, run=dataclasses.replace(variant.run, **values))

    def laid_out(**values: object) -> Variant:
        return changed(compute=dataclasses.replace(variant.run.compute, **values))

    variant = yield "no sync in micro-steps", dataclasses.replace(variant, sync=False)
    variant = yield "fused AdamW", dataclasses.replace(variant, fused=True)
    variant = yield "bf16 autocast", changed(precision="bf16_amp")
    variant = yield "bf16 weights, fp32 master", changed(precision="bf16")
    variant = yield "no checkpointing", laid_out(gradient_checkpointing=())
    variant = yield "channels_last", laid_out(channels_last=True)
    if compiles:
        variant = yield "compile", laid_out(compile=True)
    for size in (variant.run.batch.micro_batch_size * quarters // 4 for quarters in (2, 6, 8)):
        yield f"micro-batch {size}", changed(batch=dataclasses.replace(variant.run.batch, micro_batch_size=size))


def make_parts(device: torch.device, *, tiny: bool) -> PipelineParts:
    """A random SDXL without its VAE, which training does not read."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seeds.integer(0, Purpose.INIT, "throughput"))
        configs = [
            CLIPTextConfig(
                vocab_size=49_408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=heads, hidden_act=act, projection_dim=width,
            )
            for width, layers, heads, act in (TINY_ENCODERS if tiny else ENCODERS)
        ]  # fmt: skip
        return PipelineParts(
            family="sdxl",
            unet=UNet2DConditionModel.from_config(TINY_UNET if tiny else UNET),
            vae=None,  # type: ignore[arg-type]
            text_encoders=(CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])),
            tokenizers=(),
            noise_scheduler_config=SCHEDULER,
            force_zeros_for_empty_prompt=False,
        )


def draw_shapes(count: int, *, tiny: bool) -> list[tuple[Size, int]]:
    """Bucket and chunks of so many micro-batches, the same for every variant."""
    rng = seeds.generator(0, Purpose.ORDER, "throughput")
    buckets = rng.choices(list(BUCKETS), weights=list(BUCKETS.values()), k=count)
    chunks = rng.choices(list(CHUNK_SHARES), weights=list(CHUNK_SHARES.values()), k=count)
    scale = TINY_SCALE if tiny else 1
    return [
        (Size(height // scale, width // scale), number) for (height, width), number in zip(buckets, chunks, strict=True)
    ]


class Bench:
    """A model in one variant, ready to train."""

    def __init__(self, variant: Variant, device: torch.device, *, tiny: bool) -> None:
        """Build it as `training/startup.py` does."""
        self.variant, self.device = variant, device
        self.parts = make_parts(device, tiny=tiny)
        run = variant.run
        for module in named_modules(self.parts).values():
            module.train(False)
        parameters = trained_parameters(self.parts, text_encoder=True, text_encoder_2=False)
        self.configs = ModelConfigs(
            family="sdxl", unet=dict(self.parts.unet.config),
            text_encoders=tuple(encoder.config.to_dict() for encoder in self.parts.text_encoders),
        )  # fmt: skip
        apply_compute(self.parts, run.compute)
        self.arithmetic = Arithmetic(run.precision, self.parts, parameters, parameters, device)
        self.optimizer = (
            make_optimizer(run.optimizer, self.arithmetic.weights)
            if variant.fused
            else torch.optim.AdamW(self.arithmetic.weights.values(), lr=1e-4, weight_decay=0.1)
        )
        self.signal = noise.alphas_cumprod(SCHEDULER).to(device)
        self.weights = timestep_weights(run.loss, self.signal, "epsilon")
        self.random = torch.Generator(device).manual_seed(seeds.integer(0, Purpose.NOISE, "throughput"))

    def micro_step(self, bucket: Size, num_chunks: int, share: float) -> None:
        """Forward and backward pass of one micro-batch, `share` of a step."""
        size, device = self.variant.run.batch.micro_batch_size, self.device
        shape = (size, 4, bucket.height // 8, bucket.width // 8)
        latents, draw = (torch.randn(shape, generator=self.random, device=device) for _ in range(2))
        timesteps = torch.randint(0, len(self.signal), (size,), generator=self.random, device=device)
        ids = torch.randint(0, 49_000, (size, num_chunks, CHUNK_LENGTH), generator=self.random, device=device)
        sides = torch.tensor([bucket], dtype=torch.float32, device=device).expand(size, 2)
        time_ids = make_time_ids(sides, torch.zeros_like(sides), sides)
        with self.arithmetic.autocast():
            noised = noise.add_noise(latents, draw, timesteps, self.signal)
            prediction = predict(self.parts, noised, timesteps, (ids, ids), time_ids)
        target = prediction_target("epsilon", latents, draw, timesteps, self.signal)
        loss = (mse_per_sample(prediction, target, None) * self.weights[timesteps]).mean() * share
        if self.variant.sync and bool(loss.isnan()):
            raise FloatingPointError(f"loss {loss.item()} of a random model")
        self.arithmetic.backward(loss)

    def step(self, shapes: list[tuple[Size, int]]) -> None:
        """One optimizer step."""
        self.arithmetic.clear_gradients()
        for bucket, num_chunks in shapes:
            self.micro_step(bucket, num_chunks, 1 / len(shapes))
        self.arithmetic.unscale_and_clip(self.variant.run.optimizer.max_grad_norm)
        self.arithmetic.step(self.optimizer)


def measure(
    name: str, variant: Variant, device: torch.device, *, tiny: bool, steps: int, accumulate: int, base: float | None
) -> Result:
    """Images per second of a variant over `steps` steps, after one step for warming up."""
    on_gpu = device.type == "cuda"
    _free(device)
    try:
        bench = Bench(variant, device, tiny=tiny)
        shapes = draw_shapes((steps + 1) * accumulate, tiny=tiny)
        bench.step(shapes[:accumulate])
        _wait(device)
        began = time.perf_counter()
        for first in range(accumulate, len(shapes), accumulate):
            bench.step(shapes[first : first + accumulate])
        _wait(device)
        seconds = time.perf_counter() - began
    except torch.OutOfMemoryError:
        return Result(name=name, images_per_s=None, mfu=None, peak_bytes=None, ratio=None)
    size = variant.run.batch.micro_batch_size
    count = training_flops(bench.configs, variant.run)
    flops = size * sum(count(*bucket, chunks).model for bucket, chunks in shapes[accumulate:])
    peak, rate = peak_flops(device, variant.run.precision), size * steps * accumulate / seconds
    return Result(
        name=name,
        images_per_s=rate,
        mfu=flops / seconds / peak if peak else None,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        ratio=rate / base if base else 1.0,
    )


def _free(device: torch.device) -> None:
    """Give back what the last variant held."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_all(device: torch.device, *, tiny: bool, steps: int, accumulate: int) -> list[Result]:
    """The recreated configuration, every lever, and the first again, which shows how far the machine drifts."""
    results: list[Result] = []

    def one(name: str, variant: Variant) -> bool:
        base = results[0].images_per_s if results else None
        results.append(
            measure(name, variant, device, tiny=tiny, steps=steps, accumulate=accumulate, base=base)
        )  # fmt: skip
        _print(results[-1])
        return results[-1].images_per_s is not None

    micro_batch_size = 8 // TINY_MICRO_SCALE if tiny else 8
    best = recreated(micro_batch_size)
    one("bigASP recreated", best)
    # Compiling for a CPU takes longer than all the rest of the tiny run.
    steps_up = levers(best, compiles=device.type == "cuda")
    with contextlib.suppress(StopIteration):
        name, variant = next(steps_up)
        while True:
            best = variant if one(name, variant) else best
            name, variant = steps_up.send(best)
    one("bigASP recreated, again", recreated(micro_batch_size))
    return results


def _print(result: Result) -> None:
    if result.images_per_s is None:
        print(f"{result.name:<28}  out of memory", flush=True)
        return
    mfu = "-" if result.mfu is None else f"{result.mfu:.1%}"
    memory = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB"
    print(f"{result.name:<28}{result.images_per_s:>10.2f}{mfu:>8}{memory:>10}{result.ratio:>8.2f} x", flush=True)


def write(path: Path, device: torch.device, results: list[Result], *, tiny: bool) -> None:
    """Write all results, and for `foundry cost` the best rate where the card is known and the model is SDXL itself."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    best = max(results, key=lambda result: result.images_per_s or 0)
    gpu = None if tiny else detect_gpu(name)
    rates = None
    if gpu is not None and best.mfu is not None:
        rates = {"gpu": gpu.name, "training": best.images_per_s, "mfu": best.mfu}
    content = {
        "format": RATES_FORMAT, "device": name, "torch": torch.__version__, "tiny": tiny, "rates": rates,
        "configurations": [dataclasses.asdict(result) for result in results],
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny model of the same classes")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps to measure; default 4, tiny 1")
    parser.add_argument("--accumulate", type=int, default=0, help="micro-batches a step; default 12, tiny 2")
    parser.add_argument("--out", type=Path, default=Path("train_throughput.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    steps, accumulate = options.steps or (1 if tiny else 4), options.accumulate or (2 if tiny else 12)
    print(f"{device}, {'tiny' if tiny else 'full-size'} SDXL, {steps} steps of {accumulate} micro-batches")
    print(f"{'':<28}{'images/s':>10}{'MFU':>8}{'memory':>10}{'ratio':>10}")
    results = measure_all(device, tiny=tiny, steps=steps, accumulate=accumulate)
    write(options.out, device, results, tiny=tiny)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
