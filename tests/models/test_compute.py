"""Layout changes nothing but memory and speed: equal gradients, the same names, the kernel that was
asked for."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from training.config.run import ComputeConfig
from training.errors import ConfigError
from training.loop.conditioning import predict
from training.models.compute import apply_compute
from training.models.full_model import trained_parameters
from training.models.unet import load_pipeline_parts


def gradients(folder, device="cpu", **compute):
    """Loss and gradients of one batch, and how often two blocks were computed, again included."""
    parts = load_pipeline_parts(folder, device)
    trained = trained_parameters(parts, text_encoder=True, text_encoder_2=parts.family == "sdxl")
    apply_compute(parts, ComputeConfig(**compute))
    passes = []
    for block in (
        parts.unet.down_blocks[1].resnets[0],
        parts.text_encoders[0].encoder.layers[0].mlp,
    ):
        block.register_forward_pre_hook(lambda *_: passes.append(1))
    torch.manual_seed(3)
    ids = [torch.randint(0, 500, (2, 2, 77)).to(device) for _ in parts.text_encoders]
    noised, time_ids = (
        torch.randn(2, 4, 4, 6).to(device),
        torch.tensor([[64.0, 80, 0, 8, 32, 48]] * 2).to(device),
    )
    loss = predict(parts, noised, torch.tensor([3, 900]).to(device), ids, time_ids).square().mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trained.items()}, len(passes)


@pytest.fixture(params=["sdxl", "sd1"])
def folder(request, sdxl_folder, sd1_folder):
    return {"sdxl": sdxl_folder, "sd1": sd1_folder}[request.param]


@pytest.mark.parametrize(
    ("names", "again"),
    [
        (("all",), 2),
        (("down_blocks.1", "mid_block"), 1),
        (("up_blocks",), 0),
        (("text_encoders",), 1),
    ],
)
def test_gradients_are_equal_with_blocks_computed_again(folder, names, again):
    loss, plain, passes = gradients(folder)
    same_loss, checkpointed, more_passes = gradients(folder, gradient_checkpointing=names)
    assert same_loss == loss
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert more_passes == passes + again


def test_an_unknown_block_is_refused_with_the_names_of_those_that_are_there(sdxl_folder):
    parts = load_pipeline_parts(sdxl_folder, "cpu")
    with pytest.raises(
        ConfigError, match=r"no block 'down_blocks.7'; there are .*down_blocks.1.*mid_block.*all"
    ):
        apply_compute(parts, ComputeConfig(gradient_checkpointing=("mid_block", "down_blocks.7")))


def test_channels_last_computes_the_same_under_the_same_names(folder):
    loss, plain, _ = gradients(folder)
    same_loss, moved, _ = gradients(folder, channels_last=True)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    assert plain.keys() == moved.keys()
    for name in plain:
        torch.testing.assert_close(moved[name], plain[name], rtol=1e-3, atol=1e-6)
    assert moved["unet.conv_in.weight"].is_contiguous(memory_format=torch.channels_last)


def test_every_attention_goes_through_sdpa(folder, monkeypatch):
    parts = load_pipeline_parts(folder, "cpu")
    parts.unet.set_attn_processor(AttnProcessor())
    for encoder in parts.text_encoders:
        encoder.set_attn_implementation("eager")
    apply_compute(parts, ComputeConfig())
    calls = []
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    ids = [torch.full((1, 1, 77), 5) for _ in parts.text_encoders]
    with torch.no_grad():
        predict(parts, torch.randn(1, 4, 4, 4), torch.tensor([1]), ids, torch.ones(1, 6))
    layers = sum(encoder.config.num_hidden_layers for encoder in parts.text_encoders)
    assert len(calls) == layers + len(parts.unet.attn_processors)


@pytest.mark.slow
# torch's compiler warns of its own parts.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad", "ignore:Dynamo detected"
)
@pytest.mark.parametrize(("mode", "num_graphs"), [("blocks", 4), ("whole", 6)])
def test_graphs_are_shared_by_shapes_or_one_for_each_whole_batch(sdxl_folder, mode, num_graphs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parts = load_pipeline_parts(sdxl_folder, "cpu")
    names = list(parts.unet.state_dict())
    # Capture is what shapes are about; generating C++ for the graph takes minutes on two cores.
    apply_compute(parts, ComputeConfig(compile=mode), micro_batch_size=3, backend="eager")
    assert list(parts.unet.state_dict()) == names
    plain = load_pipeline_parts(sdxl_folder, "cpu")
    sizes = [(8, 12, 1), (12, 8, 2), (16, 10, 3), (10, 14, 1), (6, 18, 2), (18, 6, 3)]
    for batch, (height, width, chunks) in [(3, size) for size in sizes] + [
        (2, sizes[0]),
        (2, sizes[1]),
    ]:
        torch.manual_seed(height)
        inputs = (
            torch.randn(batch, 4, height, width),
            torch.arange(batch),
            torch.randn(batch, chunks * 77, 48),
        )
        added = {"text_embeds": torch.randn(batch, 24), "time_ids": torch.ones(batch, 6)}
        predictions = [
            model.unet(*inputs, added_cond_kwargs=added).sample for model in (plain, parts)
        ]
        torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= num_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_the_compiled_unet_has_the_gradients_of_the_plain_one(sdxl_folder, mode):
    loss, plain, _ = gradients(sdxl_folder, device="cuda")
    same_loss, compiled, _ = gradients(sdxl_folder, device="cuda", compile=mode)
    assert same_loss == pytest.approx(loss, rel=1e-4)
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-2, atol=1e-5)
