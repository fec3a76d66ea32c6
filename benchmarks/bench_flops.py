"""How long the count of a full-size SDXL's operations and memory takes, beside torch's counter on
meta tensors.

Usage: python benchmarks/bench_flops.py
"""

import time

import torch
from diffusers import UNet2DConditionModel
from random_sdxl import BUCKETS, UNET
from torch.utils.flop_counter import FlopCounterMode

from training.config.run import RunConfig
from training.estimates.flops import unet_flops
from training.estimates.memory import activation_bytes

LIMIT_S = 1.0


def counted() -> float:
    """Operations of one 1024 x 1024 sample with 77 tokens, forward and backward, as torch counts
    them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET)
        inputs = (
            torch.empty(1, 4, 128, 128),
            torch.empty(1, dtype=torch.int64),
            torch.empty(1, 77, 2048),
        )
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    inputs[2].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        unet(
            inputs[0], inputs[1], encoder_hidden_states=inputs[2], added_cond_kwargs=added
        ).sample.sum().backward()
    return float(counter.get_total_flops())


def main() -> None:
    """Measure and print."""
    began = time.perf_counter()
    ours = unet_flops(UNET, 1024, 1024, 77).model
    first = time.perf_counter() - began
    shapes = [(*bucket, 77 * chunks) for bucket in BUCKETS for chunks in (1, 2, 3)]
    began = time.perf_counter()
    for shape in shapes:
        unet_flops(UNET, *shape)
    each = (time.perf_counter() - began) / len(shapes)
    began = time.perf_counter()
    activation_bytes(UNET, RunConfig(encoding="sdxl"), 1024, 1024, 77)
    memory = time.perf_counter() - began
    began = time.perf_counter()
    theirs = counted()
    slow = time.perf_counter() - began
    print(
        f"first shape {first:.2f} s (limit {LIMIT_S}), each of {len(shapes)} more {each * 1e3:.2f} ms"
    )
    print(f"activations {memory:.2f} s")
    print(
        f"torch's counter {slow:.2f} s, {slow / first:.0f} x; difference {abs(ours / theirs - 1):.1e}"
    )


if __name__ == "__main__":
    main()
