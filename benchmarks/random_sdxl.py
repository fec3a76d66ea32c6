"""SDXL with random weights, full-size or tiny, and the sizes of bigASP's batches: speed depends on
nothing else."""

import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training import seeds
from training.buckets.geometry import Size
from training.models.unet import PipelineParts
from training.seeds import Purpose

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tools"))

from sdxl_shapes import SDXL as UNET

Shape = tuple[Size, int]
"""Bucket and number of chunks of text of a micro-batch."""
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
TINY_UNET = UNET | {
    "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 48,
    "transformer_layers_per_block": [1, 1, 1], "attention_head_dim": [1, 2, 4], "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}  # fmt: skip
# Width, layers, heads and activation of text encoders 1 and 2.
ENCODERS = ((768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu"))
TINY_ENCODERS = ((16, 3, 2, "quick_gelu"), (32, 3, 2, "gelu"))


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


def draw_shapes(count: int, *, tiny: bool) -> list[Shape]:
    """Bucket and chunks of so many micro-batches, the same for every variant."""
    rng = seeds.generator(0, Purpose.ORDER, "throughput")
    buckets = rng.choices(list(BUCKETS), weights=list(BUCKETS.values()), k=count)
    chunks = rng.choices(list(CHUNK_SHARES), weights=list(CHUNK_SHARES.values()), k=count)
    scale = TINY_SCALE if tiny else 1
    return [
        (Size(height // scale, width // scale), number)
        for (height, width), number in zip(buckets, chunks, strict=True)
    ]
