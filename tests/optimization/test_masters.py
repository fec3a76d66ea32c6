"""fp32 weights as bf16 and 16 bits more: lossless, and stepped as if they had been there all the
time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config.run import OptimizerConfig
from training.optimization.masters import Masters, joined, round_to_bf16
from training.optimization.optim import make_optimizer, step_groups

# Halves of bf16's last place on both sides of a tie, the smallest, the largest, and numbers beyond
# it.
EDGES = [
    0.0,
    -0.0,
    1.0,
    1 + 2.0**-8,
    1 + 3 * 2.0**-8,
    1 + 2.0**-8 + 2.0**-20,
    1e-45,
    -1e-39,
    3.4e38,
    -3.38e38,
    2.0**-126,
]


def parameter(values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)
)
def test_no_bit_is_lost(values):
    values += EDGES
    weight = parameter(values)
    masters = Masters({"w": weight}, [["w"]])
    assert weight.dtype == torch.bfloat16
    exact = torch.tensor(values, dtype=torch.float32).view(torch.int32)
    assert torch.equal(masters.values()["w"].view(torch.int32), exact)
    assert torch.equal(joined(masters.halves())["w"].view(torch.int32), exact)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)
)
def test_the_models_half_is_the_nearest_bf16_as_torch_rounds_but_for_ties(values):
    exact = torch.tensor(values + EDGES)
    weight = torch.nn.Parameter(exact.clone())
    Masters({"w": weight}, [["w"]])
    ties = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight.data[~ties], exact.bfloat16()[~ties])
    up = ((exact.view(torch.int32) >> 16) + 1).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(weight.data[ties], up[ties])
    assert torch.equal(weight.data.view(torch.int16), round_to_bf16(exact).view(torch.int16))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "prodigy"])
def test_steps_by_groups_are_those_of_weights_that_are_all_there(name, monkeypatch):
    monkeypatch.setattr("training.optimization.optim.GROUP_NUMBERS", 60)
    torch.manual_seed(3)
    shapes = {
        "unet.a": (6, 8),
        "unet.b": (8,),
        "unet.c": (4, 3, 3, 3),
        "text_encoder.d": (5, 7),
        "unet.e": (2, 2),
    }
    start = {key: torch.randn(shape) for key, shape in shapes.items()}
    start["unet.c"] = start["unet.c"].to(memory_format=torch.channels_last)
    model = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
    plain = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
    groups = step_groups(model)
    assert len(groups) == 4
    assert groups[-1] == ["text_encoder.d"]
    masters = Masters(model, [list(model)] if name == "prodigy" else groups)
    config = OptimizerConfig(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
    ours, theirs = make_optimizer(config, masters.weights), make_optimizer(config, plain)
    for step in range(4):
        for key, weight in masters.weights.items():
            gradient = torch.randn(shapes[key], generator=torch.Generator().manual_seed(step))
            if key == "unet.c":
                gradient = gradient.to(memory_format=torch.channels_last)
            weight.grad, plain[key].grad = gradient.clone(), gradient.clone()
        theirs.step()
        shown, all_groups = {}, ours.param_groups
        for ours.param_groups, weights in masters.groups(all_groups):
            ours.step()
            shown |= {key: weight.detach().clone() for key, weight in weights.items()}
        ours.param_groups = all_groups
        assert shown.keys() == plain.keys()
        for key, weight in plain.items():
            assert torch.equal(shown[key], weight), (key, step)
            assert torch.equal(masters.values()[key], weight)
            assert torch.equal(
                model[key].data.view(torch.int16), round_to_bf16(weight).view(torch.int16)
            )
    assert model["unet.c"].is_contiguous(memory_format=torch.channels_last)


def test_no_more_than_two_halves_and_one_group_are_kept():
    shapes = {f"unet.{number}": (40, 40) for number in range(10)}
    model = {key: torch.nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}
    masters = Masters(model, [[key] for key in model])
    storages = {}
    for tensor in (*model.values(), *masters.weights.values(), *masters.halves().values()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) == 10 * 1600 * 4 + 1600 * 4
