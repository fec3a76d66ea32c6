"""Training throughput on one device: bigASP's configuration recreated, then one lever at a time,
each kept if it fits.

Full-size SDXL with random weights (speed does not depend on their values): UNet and text encoder 1
trained, text encoder 2 frozen, buckets and prompt lengths mixed as in bigASP's run. The passes and
steps are the product's own. Of each lever it prints where the time of a step goes, what the step
asks of the device, and whether the lever is seen to act; it fails where one is not.

Usage: python benchmarks/train_throughput.py [--tiny] [--steps N] [--accumulate N] [--out FILE]
Without CUDA it runs at tiny size, where its times say nothing. FILE is what `foundry cost --rates
FILE` reads.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from levers_seen import Evidence, contradiction, not_run
from random_sdxl import TINY_MICRO_SCALE, Shape, draw_shapes
from step_counter import PHASES
from train_bench import Bench, Variant

from training.config.run import BatchConfig, ComputeConfig, RunConfig
from training.estimates.cost import RATES_FORMAT
from training.estimates.flops import peak_flops, training_flops
from training.estimates.gpus import detect_gpu
from training.loop.device_defaults import Device, resolve

MICRO_BATCH = 8
AMORTISED = ("checkpoint", "validation")
"""What is due at intervals only: its share of a step, by the product's intervals."""


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
    budget: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by part: those of `PHASES`, then `AMORTISED`."""
    stall_s: float | None = None
    """By which a step is longer beside which a checkpoint is copied; None where none was."""
    counts: dict[str, int | None] = field(default_factory=dict)
    """What a step asks of the device; None where that cannot be counted here."""
    contradiction: str = ""
    """What shows that the lever does not act; empty where it is seen to act."""
    not_run: str = ""
    """What of the lever cannot be seen on this machine, and why."""


def recreated(micro_batch_size: int) -> Variant:
    """bigASP v1's training as published (github.com/fpgaminer/bigasp-training), but for the
    micro-batch, which is not."""
    compute = ComputeConfig(gradient_checkpointing=("all",), channels_last=False, compile=False)
    batch = BatchConfig(micro_batch_size=micro_batch_size)
    return Variant(
        run=RunConfig(encoding="sdxl", precision="fp16_amp", compute=compute, batch=batch)
    )


def defaults(micro_batch_size: int) -> Variant:
    """What the product does on a GPU that has all it asks of one, when a recipe says nothing."""
    device = Device(name="a GPU", is_gpu=True, has_bf16=True, has_tf32=True)
    config = RunConfig(encoding="sdxl", batch=BatchConfig(micro_batch_size=micro_batch_size))
    return Variant(run=resolve(config, device, {}), fused=True, sync=False, sent_ahead=True)


def levers(variant: Variant) -> Generator[tuple[str, Variant], Variant, None]:
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
    variant = yield "pinned, sent ahead", dataclasses.replace(variant, sent_ahead=True)
    variant = yield "compile blocks", laid_out(compile="blocks")
    for size in (variant.run.batch.micro_batch_size * quarters // 4 for quarters in (6, 8, 2)):
        yield (
            f"micro-batch {size}",
            changed(batch=dataclasses.replace(variant.run.batch, micro_batch_size=size)),
        )
    # A graph for each size takes minutes: both on one size.
    yield "compile blocks; one size", dataclasses.replace(variant, one_shape=True)
    yield "compile whole; one size", dataclasses.replace(laid_out(compile="whole"), one_shape=True)


def measure(
    name: str, variant: Variant, *, device: torch.device, tiny: bool, steps: int, accumulate: int, base: float | None,
    offload: bool, backend: str,
) -> Result:  # fmt: skip
    """Speed, budget and counts of a variant.

    Args:
        name: The lever's that it adds.
        variant: What to measure.
        device: Where.
        tiny: A small model.
        steps: Optimizer steps to measure, after one over all their sizes for warming up.
        accumulate: Micro-batches a step.
        base: Images per second of the recreated configuration.
        offload: Copy a checkpoint beside a step; at full size it takes 32 GB of main memory.
        backend: What compiles graphs.
    """
    shapes = draw_shapes(steps * accumulate, tiny=tiny)
    if variant.one_shape:
        shapes = shapes[:1] * len(shapes)
    _free(device)
    bench = None
    try:
        bench = Bench(variant, device, tiny=tiny, backend=backend)
        bench.warm_up(shapes)
        _wait(device)
        began = time.perf_counter()
        bench.steps(shapes, accumulate)
        _wait(device)
        seconds = time.perf_counter() - began
        budget = {phase: spent / steps for phase, spent in bench.phases.take().items()}
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        seen = bench.inspect(shapes[:accumulate])
        counts = _counts(bench, seen, shapes[:accumulate])
        stall_s = bench.checkpoint_stall_s(shapes[:accumulate]) if offload else None
        budget |= _amortised(bench, shapes[:accumulate], stall_s)
    except torch.OutOfMemoryError:
        return Result(name=name, images_per_s=None, mfu=None, peak_bytes=None, ratio=None)
    finally:
        if bench is not None:
            bench.close()
    size = variant.run.batch.micro_batch_size
    count = training_flops(bench.configs, variant.run)
    flops = size * sum(count(*bucket, chunks).model for bucket, chunks in shapes)
    peak, rate = peak_flops(device, variant.run.precision), size * len(shapes) / seconds
    return Result(
        name=name, images_per_s=rate, mfu=flops / seconds / peak if peak else None, peak_bytes=peak_bytes,
        ratio=rate / base if base else 1.0, budget=budget, stall_s=stall_s, counts=counts,
        contradiction=contradiction(name, seen), not_run=not_run(name, seen),
    )  # fmt: skip


def _amortised(bench: Bench, shapes: list[Shape], stall_s: float | None) -> dict[str, float]:
    """A step's share of validations, and of checkpoints where one was copied, at the product's
    intervals."""
    run = bench.variant.run
    images = run.batch.micro_batch_size * len(shapes)
    passes = (
        2 * run.validation.num_images / run.batch.micro_batch_size
    )  # the held-out list and the stable one
    found = {
        "validation": images / run.validation.every_samples * passes * bench.validation_s(shapes[0])
    }
    return (
        found
        if stall_s is None
        else found | {"checkpoint": stall_s * images / run.checkpoints.every_samples}
    )


def _counts(bench: Bench, seen: Evidence, shapes: list[Shape]) -> dict[str, int | None]:
    on_gpu, compiled = bench.device.type == "cuda", bench.graphs is not None
    return {
        "host syncs": len(seen.host_syncs),
        "blocking copies": len(seen.blocking_copies),
        "operations": None if compiled else seen.operations.total(),
        "kernels": _kernels(bench, shapes) if on_gpu else None,
        "CUDA syncs": _cuda_syncs(bench, shapes) if on_gpu else None,
        "optimizer bytes": seen.optimizer_bytes,
        "graphs": seen.num_graphs,
        "graph breaks": seen.num_graph_breaks,
        "late graphs": seen.num_late_graphs,
    }


def _kernels(bench: Bench, shapes: list[Shape]) -> int:
    """Kernels of a step, as the driver saw them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        bench.steps(shapes, len(shapes))
        _wait(bench.device)
    on_device = (
        event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _cuda_syncs(bench: Bench, shapes: list[Shape]) -> int:
    """Times that a step waits for CUDA, as torch itself notices it."""
    with _syncs_warned(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bench.steps(shapes, len(shapes))
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def _syncs_warned() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _free(device: torch.device) -> None:
    """Give back what the last variant held."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_all(
    device: torch.device, *, tiny: bool, steps: int, accumulate: int, backend: str
) -> Iterator[Result]:
    """The recreated configuration, every lever, and the first again, which shows how far the
    machine drifts."""
    size = MICRO_BATCH // TINY_MICRO_SCALE if tiny else MICRO_BATCH
    best, base = recreated(size), None
    setting = {
        "device": device,
        "tiny": tiny,
        "steps": steps,
        "accumulate": accumulate,
        "backend": backend,
    }
    steps_up, pending = levers(best), ("bigASP recreated", best)
    with contextlib.suppress(StopIteration):
        while True:
            name, variant = pending
            result = measure(name, variant, base=base, offload=base is None, **setting)
            yield result
            base = base or result.images_per_s
            best = variant if result.images_per_s is not None else best
            pending = next(steps_up) if name == "bigASP recreated" else steps_up.send(best)
    yield measure("bigASP recreated; again", recreated(size), base=base, offload=False, **setting)


def print_head() -> None:
    """Names of the columns of `print_result`."""
    print(
        f"{'':<28}{'images/s':>10}{'MFU':>8}{'memory':>10}{'ratio':>10}  seconds a step, counts a step"
    )


def print_result(result: Result) -> None:
    """A variant's line, its step's budget and counts, and what is wrong with it."""
    if result.images_per_s is None:
        print(f"{result.name:<28}  out of memory", flush=True)
        return
    mfu = "-" if result.mfu is None else f"{result.mfu:.1%}"
    memory = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB"
    print(
        f"{result.name:<28}{result.images_per_s:>10.2f}{mfu:>8}{memory:>10}{result.ratio:>8.2f} x"
    )
    parts = (
        f"{name} {result.budget[name]:.4f}"
        for name in (*PHASES, *AMORTISED)
        if name in result.budget
    )
    print(f"{'':<6}{', '.join(parts)}")
    if result.stall_s is not None:
        print(f"{'':<6}{result.stall_s:.3f} s longer beside a checkpoint")
    counted = (f"{value:,} {name}" for name, value in result.counts.items() if value is not None)
    print(f"{'':<6}{', '.join(counted)}")
    for note in (
        result.not_run and f"not run: {result.not_run}",
        result.contradiction and f"NOT SEEN: {result.contradiction}",
    ):
        if note:
            print(f"{'':<6}{note}")
    sys.stdout.flush()


def write(path: Path, device: torch.device, results: list[Result], *, tiny: bool) -> None:
    """Write all results, and for `foundry cost` the best rate where the card is known and the model
    is SDXL itself."""
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


def default_backend(*, tiny: bool) -> str:
    """What compiles graphs: a tiny model's are only counted, which takes seconds instead of
    minutes."""
    return "eager" if tiny else "inductor"


def main() -> int:
    """Measure, print and write; 1 where a lever was not seen to act."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny model of the same classes")
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps to measure; default 4, tiny 1"
    )
    parser.add_argument(
        "--accumulate", type=int, default=0, help="micro-batches a step; default 12, tiny 2"
    )
    parser.add_argument("--out", type=Path, default=Path("train_throughput.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    steps, accumulate = (
        options.steps or (1 if tiny else 4),
        options.accumulate or (2 if tiny else 12),
    )
    print(
        f"{device}, {'tiny' if tiny else 'full-size'} SDXL, {steps} steps of {accumulate} micro-batches"
    )
    print_head()
    results = []
    backend = default_backend(tiny=tiny)
    for result in measure_all(
        device, tiny=tiny, steps=steps, accumulate=accumulate, backend=backend
    ):
        print_result(result)
        results.append(result)
    write(options.out, device, results, tiny=tiny)
    print(f"wrote {options.out}")
    return int(any(result.contradiction for result in results))


if __name__ == "__main__":
    sys.exit(main())
