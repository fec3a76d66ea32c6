"""The closed form against torch's own counter, which sees every operation of a real pass."""

import functools
import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from sdxl_shapes import SDXL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.config.run import ComputeConfig, OptimizerConfig, RunConfig
from training.errors import ModelError
from training.estimates.flops import (
    Flops,
    ModelConfigs,
    is_checkpointed,
    locate,
    peak_flops,
    read_model_configs,
    training_flops,
    unet_flops,
    vae_flops,
)
from training.loop.conditioning import predict
from training.models.full_model import trained_parameters
from training.models.unet import PipelineParts

TINY_SDXL = {
    **SDXL, "block_out_channels": [8, 16, 32], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 24,
    "transformer_layers_per_block": [1, 1, 2], "attention_head_dim": [1, 2, 4], "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 8,
}  # fmt: skip
# SD 1.x: four levels, convolutions around its transformers, no pooled text.
TINY_SD1 = {
    "sample_size": 64, "block_out_channels": [8, 16, 16, 32], "norm_num_groups": 4, "cross_attention_dim": 12,
    "attention_head_dim": 4,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class.from_config(config)


def checkpoint_groups(model, groups):
    """As diffusers does it, but for some blocks only."""
    model.enable_gradient_checkpointing()
    for name, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = any(group in ("all", *_above(name)) for group in groups)


def _above(name):
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


@functools.cache
def tiny_unet(name):
    return UNet2DConditionModel.from_config({"sdxl": TINY_SDXL, "sd1": TINY_SD1}[name])


def counted_unet(
    unet, height, width, tokens, *, text_gradient=True, pooled_gradient=False, checkpointed=()
):
    """What torch counts, forward and backward; its counter knows no fused attention of the CPU."""
    device, config = unet.device, unet.config
    checkpoint_groups(unet, checkpointed)
    latents = torch.zeros(1, 4, height // 8, width // 8, device=device)
    text = torch.zeros(
        1, tokens, config.cross_attention_dim, device=device, requires_grad=text_gradient
    )
    added = None
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        embeds = torch.zeros(1, pooled, device=device, requires_grad=pooled_gradient)
        added = {"text_embeds": embeds, "time_ids": torch.zeros(1, 6, device=device)}
    step = torch.zeros(1, dtype=torch.int64, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        prediction = unet(latents, step, encoder_hidden_states=text, added_cond_kwargs=added).sample
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@settings(max_examples=8, deadline=None)
@given(
    family=st.sampled_from(["sdxl", "sd1"]),
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    num_chunks=st.integers(1, 3),
    gradients=st.sampled_from([(True, True), (True, False), (False, False)]),
)
def test_unet_equals_torchs_counter_on_any_shape(family, height, width, num_chunks, gradients):
    options = {"text_gradient": gradients[0], "pooled_gradient": gradients[1]}
    shape = (height * 8, width * 8, num_chunks * 77)  # latents of odd sides too
    unet = tiny_unet(family)
    ours, theirs = unet_flops(unet.config, *shape, **options), counted_unet(unet, *shape, **options)
    assert (ours.forward, ours.backward) == theirs
    assert ours.recompute == 0


@pytest.mark.parametrize(
    "groups",
    [
        ("all",),
        ("down_blocks.1",),
        ("mid_block", "up_blocks.0"),
        ("down_blocks",),
        ("text_encoders",),
    ],
)
@pytest.mark.parametrize("family", ["sdxl", "sd1"])
def test_recomputation_of_each_group_is_what_torch_counts(family, groups):
    unet = tiny_unet(family)
    ours = unet_flops(unet.config, 128, 96, 77, checkpointed=groups)
    forward, backward = counted_unet(unet, 128, 96, 77, checkpointed=groups)
    assert (ours.forward, ours.backward + ours.recompute) == (forward, backward)
    assert (ours.recompute > 0) == (groups != ("text_encoders",))


def test_groups_are_whole_names():
    assert is_checkpointed("down_blocks.1.resnets.0", ["down_blocks.1"])
    assert not is_checkpointed("down_blocks.11.resnets.0", ["down_blocks.1"])
    assert not is_checkpointed("", ["all"])


@pytest.mark.parametrize("height_width", [(64, 64), (128, 96)])
def test_vae_equals_torchs_counter(height_width):
    height, width = height_width
    config = {**VAE, "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    vae = AutoencoderKL.from_config(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encode, torch.no_grad():
        vae.encode(torch.zeros(1, 3, height, width))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decode, torch.no_grad():
        vae.decode(torch.zeros(1, 4, height // 8, width // 8))
    assert vae_flops(config, height, width) == (encode.get_total_flops(), decode.get_total_flops())


def text_config(width, num_layers):
    return CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=num_layers,
        num_attention_heads=2, projection_dim=8, bos_token_id=58, eos_token_id=59, pad_token_id=59,
    )  # fmt: skip


def tiny_parts(family):
    configs = [text_config(8, 3), text_config(16, 4)] if family == "sdxl" else [text_config(12, 3)]
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = tuple(
        model_class(config) for model_class, config in zip(classes, configs, strict=False)
    )
    unet = UNet2DConditionModel.from_config(TINY_SDXL if family == "sdxl" else TINY_SD1)
    return PipelineParts(
        family=family, unet=unet, vae=None, text_encoders=encoders, tokenizers=(), noise_scheduler_config={},
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["sdxl", "sd1"])
@pytest.mark.parametrize("trained", [(False, False), (True, False), (True, True), (False, True)])
def test_a_whole_training_sample_equals_torchs_counter(family, trained):
    if family == "sd1" and trained[1]:
        pytest.skip("SD 1.x has one text encoder")
    parts = tiny_parts(family)
    trained_parameters(parts, text_encoder=trained[0], text_encoder_2=trained[1])
    config = RunConfig(
        encoding="sdxl", train_text_encoder=trained[0], train_text_encoder_2=trained[1]
    )
    ids = [torch.zeros(1, 2, 77, dtype=torch.int64) for _ in parts.text_encoders]
    arguments = (
        torch.zeros(1, 4, 16, 12), torch.zeros(1, dtype=torch.int64), ids,
        torch.zeros(1, 6),
    )  # fmt: skip
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(parts, *arguments).sum().backward()
    models = ModelConfigs(
        family=family,
        unet=dict(parts.unet.config),
        text_encoders=tuple(e.config.to_dict() for e in parts.text_encoders),
    )
    assert training_flops(models, config)(128, 96, 2).model == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )
    frozen, off = OptimizerConfig(text_encoder_learning_rate=0.0), {"train_text_encoder": False}
    assert training_flops(models, RunConfig(encoding="sdxl", optimizer=frozen))(
        128, 96, 2
    ) == training_flops(models, RunConfig(encoding="sdxl", **off))(128, 96, 2)


def test_configs_are_read_without_weights(tiny_sdxl, tmp_path):
    for name in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(
            (tiny_sdxl / name / "config.json").read_bytes()
        )
    models = read_model_configs(tmp_path)
    assert (models.family, len(models.text_encoders)) == ("sdxl", 2)
    plain = RunConfig(encoding="sdxl")
    again = RunConfig(encoding="sdxl", compute=ComputeConfig(gradient_checkpointing=("all",)))
    one, other = training_flops(models, plain)(64, 64, 1), training_flops(models, again)(64, 64, 1)
    assert one.model == other.model
    assert one.recompute == 0 < other.recompute < other.forward


def test_a_layer_of_another_architecture_is_refused():
    with pytest.raises(
        ModelError, match=r"transformer_blocks\.0\.attn\.to_q.*none of SD 1\.x or SDXL"
    ):
        locate("transformer_blocks.0.attn.to_q", 3)


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "fp32") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "forward", "trained", "checkpointed"),
    [
        ((1024, 1024, 77), 6.761, 20.283, 25.495),
        ((1024, 1024, 154), 6.846, 20.538, 25.834),
        ((1024, 1024, 231), 6.931, 20.792, 26.173),
        ((832, 1216, 154), 6.584, 19.750, 24.839),
        ((576, 1728, 231), 6.551, 19.651, 24.731),
    ],
)
def test_full_size_sdxl_equals_the_published_table_and_torchs_counter(
    shape, forward, trained, checkpointed
):
    # The numbers: FlopCounterMode of PyTorch on meta tensors, diffusers' UNet2DConditionModel.
    ours = unet_flops(SDXL, *shape, checkpointed=["all"])
    assert ours.forward / 1e12 == pytest.approx(forward, abs=5e-4)
    assert ours.model / 1e12 == pytest.approx(trained, abs=5e-4)
    assert (ours.model + ours.recompute) / 1e12 == pytest.approx(checkpointed, abs=5e-4)
    assert math.isclose(
        ours.model, sum(counted_unet(on_meta(UNet2DConditionModel, SDXL), *shape)), rel_tol=1e-3
    )


def test_the_mean_sample_of_bigasp_takes_20_tflop():
    # By FlopCounterMode: 19.94 over bigASP's buckets and 9/66/25 % of 1, 2 and 3 chunks.
    encoders = tuple(
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "projection_dim": width,
        }
        for width, layers in ((768, 12), (1280, 32))
    )
    models = ModelConfigs(family="sdxl", unet=SDXL, text_encoders=encoders)
    count = training_flops(models, RunConfig(encoding="sdxl"))
    shares = {1: 0.09, 2: 0.66, 3: 0.25}
    mean = sum(share * count(1216, 832, chunks).model for chunks, share in shares.items())
    assert mean / 1e12 == pytest.approx(19.94, rel=0.01)
    assert Flops(1, 2, 3).plus(Flops(1, 1, 1)) == (2, 3, 4)
