"""The closed form of saved activations against torch's hooks, and the bytes of weights by hand."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from saved_tensors import TINY, saved_bytes
from sdxl_shapes import SDXL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.config.run import BatchConfig, ComputeConfig, OptimizerConfig, RunConfig
from training.estimates.flops import ModelConfigs, read_model_configs
from training.estimates.memory import (
    activation_bytes,
    encoder_parameters,
    estimate_memory,
    state_bytes,
)
from training.optimization.optim import make_optimizer


def run_config(**changes):
    return RunConfig(encoding="sdxl", **changes)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("size", [(256, 256), (192, 320)])
def test_activations_are_what_autograd_keeps(precision, dtype, size):
    unet = UNet2DConditionModel.from_config(TINY).to(dtype)
    ours = activation_bytes(TINY, run_config(precision=precision), *size, 77)
    assert ours == pytest.approx(saved_bytes(unet, *size), rel=0.08)


@pytest.mark.parametrize(
    ("precision", "gigabytes"), [("bf16", 6.91), ("bf16_amp", 8.67), ("fp16_amp", 8.67)]
)  # per megapixel, counted with saved_tensors_hooks of PyTorch on fake tensors
def test_activations_of_full_size_sdxl_are_those_of_the_published_table(precision, gigabytes):
    ours = activation_bytes(SDXL, run_config(precision=precision), 1024, 1024, 154)
    assert ours / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_checkpointing_keeps_block_inputs_and_one_block():
    ways = [(), ("mid_block",), ("down_blocks", "mid_block"), ("all",)]
    sizes = [
        activation_bytes(
            SDXL,
            run_config(precision="bf16", compute=ComputeConfig(gradient_checkpointing=way)),
            1024,
            1024,
            154,
        )
        for way in ways
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert (
        0.59e9 < sizes[-1] < 0.85e9
    )  # counted with saved_tensors_hooks: 0.59 to 0.66 and about one block


def text_config(width, **extra):
    return CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=8, **extra,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_class", "projects"), [(CLIPTextModel, False), (CLIPTextModelWithProjection, True)]
)
def test_parameters_of_text_encoders_are_those_of_the_library(model_class, projects):
    config = text_config(16)
    ours = (
        encoder_parameters(config.to_dict(), num_layers=3, embeddings=True, projects=projects)
        + 2 * 16
    )
    assert ours == sum(parameter.numel() for parameter in model_class(config).parameters())


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("trained", [(False, False), (True, False), (True, True)])
def test_trained_parameters_are_those_that_the_trainer_trains(tiny_sdxl, trained, freeze):
    from training.models.full_model import trained_parameters
    from training.models.unet import load_pipeline_parts

    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    theirs = trained_parameters(
        parts, text_encoder=trained[0], text_encoder_2=trained[1], freeze_embeddings=freeze
    )
    config = run_config(
        train_text_encoder=trained[0], train_text_encoder_2=trained[1], freeze_embeddings=freeze
    )
    ours = estimate_memory(
        read_model_configs(tiny_sdxl), config, height=64, width=64, num_chunks=1, num_ranks=1
    )
    assert ours.num_trained == sum(parameter.numel() for parameter in theirs.values())
    modules = (parts.unet, *parts.text_encoders)
    assert ours.num_parameters == sum(p.numel() for module in modules for p in module.parameters())


def sdxl_memory(num_ranks=1, **changes):
    encoders = tuple(
        {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "projection_dim": width,
            "vocab_size": 49408, "max_position_embeddings": 77,
        }
        for width, layers in ((768, 12), (1280, 32))
    )  # fmt: skip
    models = ModelConfigs(family="sdxl", unet=SDXL, text_encoders=encoders)
    return estimate_memory(
        models, run_config(**changes), height=1216, width=832, num_chunks=2, num_ranks=num_ranks
    )


def test_sdxl_takes_what_the_published_table_says():
    # 2.69 billion parameters: fp32 master 10.8, moments 21.5, gradients 10.8, TE2 1.4 GB. The
    # bf16 weights of 5.4 are half of the master; 0.5 is the group of it that is stepped.
    memory = sdxl_memory(precision="bf16")
    fixed = memory.total - memory.activations - memory.context
    assert fixed / 1e9 == pytest.approx(10.8 + 21.5 + 10.8 + 1.4 + 0.5, abs=0.3)
    assert memory.num_parameters == 2_567_463_684 + 123_060_480 + 694_659_840
    # 13 images beside them on an H200's 150.8 GB.
    per_image = memory.activations / BatchConfig().micro_batch_size
    assert int((150.8e9 - (memory.total - memory.activations)) // per_image) in (13, 14, 15)
    # bigASP's setting without checkpointing: 5 images on one card of 80 GB, 7 where 8 cards share
    # the optimizer.
    assert int((85.5e9 - (memory.total - memory.activations)) // per_image) == 5
    shared = sdxl_memory(8, precision="bf16", compute=ComputeConfig(shard_optimizer=True))
    assert int((85.5e9 - (shared.total - shared.activations)) // per_image) >= 7


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "prodigy"])
@pytest.mark.parametrize("trained", [(False, False), (True, True)])
def test_optimizer_state_is_what_the_optimizer_keeps(tiny_sdxl, name, trained):
    from training.models.full_model import trained_parameters
    from training.models.unet import load_pipeline_parts

    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    weights = trained_parameters(
        parts, text_encoder=trained[0], text_encoder_2=trained[1], freeze_embeddings=False
    )
    settings = OptimizerConfig(name=name, learning_rate=1.0 if name == "prodigy" else 1e-4)
    optimizer = make_optimizer(settings, weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    config = run_config(
        train_text_encoder=trained[0], train_text_encoder_2=trained[1], optimizer=settings
    )
    ours = estimate_memory(
        read_model_configs(tiny_sdxl), config, height=64, width=64, num_chunks=1, num_ranks=1
    )
    assert ours.optimizer == sum(
        value.nbytes for value in kept if value.dim() > 0
    )  # AdamW counts steps in numbers


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("adamw", 8), ("adamw_8bit", 2), ("lion", 4), ("lion_8bit", 1), ("prodigy", 16)],
)
def test_optimizer_state_by_name(name, num_bytes):
    rate = 1.0 if name == "prodigy" else 1e-4
    memory = sdxl_memory(optimizer=OptimizerConfig(name=name, learning_rate=rate))
    assert memory.optimizer == memory.num_trained * num_bytes


def test_adafactor_keeps_a_gigabyte_of_sdxl_most_of_it_of_convolutions():
    # 0.98 GB: the row and column sums (arXiv:1804.04235) of SDXL's trained tensors.
    assert sdxl_memory(optimizer=OptimizerConfig(name="adafactor")).optimizer == pytest.approx(
        0.98e9, rel=0.01
    )
    linear, convolution = (1280, 640), (640, 320, 3, 3)
    assert state_bytes("adafactor", [linear]) == 4 * (1280 + 640)
    assert state_bytes("adafactor", [convolution]) == 4 * 640 * 320 * (3 + 3)
    assert state_bytes("adafactor", [(320,)]) == 4 * 320


def test_sharding_ema_and_micro_batches():
    plain = sdxl_memory(precision="bf16")
    sharded = sdxl_memory(8, precision="bf16", compute=ComputeConfig(shard_optimizer=True))
    assert sharded.optimizer == plain.optimizer / 8
    assert (
        sharded.weights == plain.weights - plain.num_trained * 2 * 7 / 8
    )  # the fp32 weights' lower half as well
    assert sdxl_memory(8, precision="bf16").optimizer == plain.optimizer
    averages = OptimizerConfig(ema_half_life_samples=1)
    averaged = sdxl_memory(8, optimizer=averages)
    assert averaged.ema == averaged.num_trained * 4
    assert (
        sdxl_memory(8, optimizer=averages, compute=ComputeConfig(shard_optimizer=True)).ema
        == averaged.ema / 8
    )
    assert plain.ema == 0
    # Ranks' micro-batches are added one by one: the sum, and a slice of 128 MB of each rank.
    canonical = sdxl_memory(8, precision="bf16", reduction="canonical")
    assert canonical.gradients == 2 * plain.gradients + 8 * 128e6
    assert sdxl_memory(1, precision="bf16", reduction="canonical").gradients == plain.gradients
    half = sdxl_memory(
        precision="bf16", batch=dataclasses.replace(BatchConfig(), micro_batch_size=4)
    )
    assert half.activations == plain.activations / 2


def test_checkpointed_text_encoders_keep_the_inputs_of_their_layers():
    def activations(*groups):
        return sdxl_memory(
            precision="bf16", compute=ComputeConfig(gradient_checkpointing=groups)
        ).activations

    # 11 trained layers of width 768 keep 8 widths and 4 inner ones, or one width; two chunks, eight
    # images.
    assert (
        activations() - activations("text_encoders")
        == 8 * 2 * 77 * 11 * (8 * 768 + 4 * 3072 - 768) * 2
    )
