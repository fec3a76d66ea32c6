"""What a trainer's memory grows by while it meets new shapes, and that it ends growing: oneDNN's
kernels on a CPU.

Usage: python benchmarks/bench_memory.py [--capacity N]

A step's last micro-batch is cut to fit, so that on a CPU any batch size of any bucket may come, and
oneDNN compiles and keeps kernels for each. Forward and backward passes of the demo's UNet over many
such shapes, three times; memory after each, with what the allocator holds free given back. The
second and third time, nothing may be added.
"""

import argparse
import ctypes
import gc
import itertools
import os
import random
import sys
from pathlib import Path

BATCH_SIZES = (2, 5, 8)
NUM_PASSES = 3
MAX_GROWTH = 16e6
"""Of a later pass, bytes: what is left of it is the allocator's."""
DEFAULT_CAPACITY = 20_000
"""Primitives, as `jobs/cli/app.py` sets it."""


def held_bytes() -> int:
    """Memory of this process, after all that is free was given back."""
    import psutil

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def measure() -> list[tuple[int, int]]:
    """Shapes met so far and bytes held, before the first pass and after each."""
    import torch

    from demo.corpus import BUCKETS
    from training.models.unet import load_pipeline_parts

    unet = load_pipeline_parts(
        Path(__file__).resolve().parents[1] / "demo" / "models" / "base", "cpu"
    ).unet.requires_grad_(True)
    width = unet.config.cross_attention_dim
    pooled = (
        unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    )

    def train(height: int, width_px: int, size: int) -> None:
        added = {"text_embeds": torch.zeros(size, pooled), "time_ids": torch.zeros(size, 6)}
        noised, text = (
            torch.randn(size, 4, height // 8, width_px // 8),
            torch.randn(size, 77, width),
        )
        unet(
            noised, torch.zeros(size, dtype=torch.int64), text, added_cond_kwargs=added
        ).sample.sum().backward()
        unet.zero_grad(set_to_none=False)

    shapes = [(*bucket, size) for bucket in BUCKETS for size in BATCH_SIZES]
    train(*shapes[-1])
    found, met = [(1, held_bytes())], {shapes[-1]}
    for number in range(NUM_PASSES):
        random.Random(number).shuffle(shapes)
        for shape in shapes:
            train(*shape)
        met |= set(shapes)
        found.append((len(met), held_bytes()))
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--capacity", type=int, default=DEFAULT_CAPACITY, help="primitives that oneDNN keeps"
    )
    capacity = parser.parse_args().capacity
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(capacity)  # read when torch is first used
    found = measure()
    print(f"oneDNN keeps {capacity:,} primitives")
    print("| pass | shapes met | MB held | more than before |\n| --- | --- | --- | --- |")
    growths = [0, *(after[1] - before[1] for before, after in itertools.pairwise(found))]
    for number, ((shapes, held), growth) in enumerate(zip(found, growths, strict=True)):
        print(f"| {number} | {shapes} | {held / 1e6:.0f} | {growth / 1e6:+.1f} |")
    new = found[1][0] - found[0][0]
    print(
        f"{growths[1] / new / 1e6:.2f} MB for each new shape; limit of later passes {MAX_GROWTH / 1e6:.0f} MB"
    )
    return int(max(growths[2:]) > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
