"""Optimizers against hand-worked steps, their rates, and their state, exact through safetensors."""

import re
from importlib import metadata

import pytest
import torch
import transformers
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from training.config.run import OptimizerConfig
from training.errors import ConfigError, TrainingError
from training.optimization import optim
from training.optimization.offload import Offload
from training.optimization.optim import (
    make_optimizer,
    optimizer_state,
    restore_optimizer,
    schedule_factor,
    set_learning_rates,
)

NAMES = ["adamw", "lion", "adafactor", "prodigy"]


def config(**changes):
    return OptimizerConfig(**{"learning_rate": 2e-3, "warmup_samples": 100, **changes})


def make_weights():
    torch.manual_seed(0)
    shapes = {
        "unet.conv.weight": (4, 3, 2, 2),
        "unet.conv.bias": (4,),
        "text_encoder.layer.weight": (5, 4),
    }
    weights = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    weights["unet.conv.weight"].data = weights["unet.conv.weight"].data.to(
        memory_format=torch.channels_last
    )
    return weights


def steps(optimizer, weights, numbers):
    for number in numbers:
        torch.manual_seed(number)
        for weight in weights.values():
            weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape))
        set_learning_rates(optimizer, 1 / (1 + number))
        optimizer.step()


@pytest.mark.parametrize(
    ("schedule", "samples", "share"),
    [
        ("constant", 50, 0.5), ("constant", 100, 1), ("constant", 1100, 1),
        ("linear", 25, 0.25), ("linear", 100, 1), ("linear", 600, 0.5), ("linear", 1100, 0), ("linear", 2000, 0),
        ("cosine", 50, 0.5), ("cosine", 100, 1), ("cosine", 600, 0.5), ("cosine", 350, 0.853553), ("cosine", 1100, 0),
    ],
)  # fmt: skip
def test_the_factor_at_hand_worked_points(schedule, samples, share):
    assert schedule_factor(config(schedule=schedule), samples, 1100) == pytest.approx(
        share, abs=1e-6
    )


@pytest.mark.parametrize(
    ("schedule", "library"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_the_shape_is_the_librarys(schedule, library):
    # One sample a step: the library counts steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = library(optimizer, num_warmup_steps=100, num_training_steps=1100)
    for step in range(1100):
        factor = schedule_factor(config(schedule=schedule), step, 1100)
        assert factor == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_without_warm_up_the_first_rate_is_the_peak():
    assert schedule_factor(config(warmup_samples=0), 0, 1000) == 1


def test_groups_have_their_own_rates_under_one_schedule():
    weights = make_weights()
    optimizer = make_optimizer(config(learning_rate=4e-5, text_encoder_learning_rate=1e-5), weights)
    assert set_learning_rates(optimizer, 0.5) == {
        "learning_rate": 2e-5,
        "text_encoder_learning_rate": 5e-6,
    }
    by_group = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert by_group["text_encoders"] == {id(weights["text_encoder.layer.weight"])}
    assert len(by_group["unet"]) == 2
    assert [group["lr"] for group in optimizer.param_groups] == [2e-5, 5e-6]
    shared = make_optimizer(config(learning_rate=4e-5), weights)
    assert set_learning_rates(shared, 1) == {
        "learning_rate": 4e-5,
        "text_encoder_learning_rate": 4e-5,
    }
    alone = make_optimizer(config(), {"unet.conv.bias": weights["unet.conv.bias"]})
    assert set_learning_rates(alone, 1).keys() == {"learning_rate"}


def twice(make):
    return make(), make()


def two_steps(settings, start, gradients):
    weights = {"unet.w": torch.nn.Parameter(start.clone())}
    optimizer = make_optimizer(settings, weights)
    for gradient in gradients:
        weights["unet.w"].grad = gradient.clone()
        set_learning_rates(optimizer, 1.0)
        optimizer.step()
    return weights["unet.w"].detach(), optimizer


START, GRADIENTS = (
    torch.tensor([1.0, -2.0, 0.5]),
    [torch.tensor([0.3, -0.1, 0.2]), torch.tensor([-0.2, 0.4, 0.2])],
)


def test_adamw_against_its_formulas_with_decay_on_everything():
    settings = config(weight_decay=0.1, betas=(0.8, 0.9), epsilon=1e-6, learning_rate=0.01)
    found, optimizer = two_steps(settings, START, GRADIENTS)
    expected, moment, square = START.clone(), torch.zeros(3), torch.zeros(3)
    for step, gradient in enumerate(GRADIENTS, 1):
        moment, square = 0.8 * moment + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        expected = expected * (1 - 0.01 * 0.1)
        expected -= 0.01 * (moment / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
    torch.testing.assert_close(found, expected)
    assert optimizer.defaults["fused"]


def test_lion_steps_by_the_sign_of_its_interpolated_moment():
    settings = config(name="lion", weight_decay=0.1, betas=(0.5, 0.6), learning_rate=0.01)
    gradients = [torch.tensor([0.3, -0.1, 0.2]), torch.tensor([-0.1, 0.4, 0.2])]
    found, _ = two_steps(settings, START, gradients)
    # Step 1: the moment is 0, the sign is the gradient's. Step 2: the moment is 0.4 of that, and
    # for the first weight 0.5 * 0.4 * 0.3 - 0.5 * 0.1 > 0 (with betas of 0.9 and 0.99 it would be <
    # 0), for the second < 0 before, > 0 now.
    expected = START * (1 - 0.001) - 0.01 * torch.tensor([1.0, -1, 1])
    expected = expected * (1 - 0.001) - 0.01 * torch.tensor([1.0, 1, 1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("threshold", [0.9, 1.0, 5.0])
def test_adafactor_is_that_of_transformers_without_scaling_and_relative_steps(threshold):
    torch.manual_seed(0)
    shapes = {
        "unet.matrix": (12, 7),
        "unet.conv": (6, 5, 3, 3),
        "unet.bias": (9,),
        "text_encoder.one": (1, 4),
    }
    # Weights of a model's size: scaled by their root mean square, steps would be 50 times smaller.
    ours = {name: torch.nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()}
    ours["unet.conv"].data = ours["unet.conv"].data.to(memory_format=torch.channels_last)
    theirs = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in ours.items()}
    optimizer = make_optimizer(
        config(name="adafactor", weight_decay=0.1, learning_rate=1e-2, clip_threshold=threshold),
        ours,
    )
    library = transformers.optimization.Adafactor(
        theirs.values(),
        lr=1e-2,
        weight_decay=0.1,
        clip_threshold=threshold,
        scale_parameter=False,
        relative_step=False,
    )
    for number in [*range(6), 20_000, 20_001]:
        if number == 20_000:  # long after the step where a cap on the decay at 0.999 would be felt
            for group in optimizer.param_groups:
                group["step"] = number
            for state in library.state.values():
                state["step"] = number
        before = {name: weight.detach().clone() for name, weight in theirs.items()}
        for name, weight in ours.items():
            weight.grad = torch.empty_like(weight).copy_(
                torch.randn(weight.shape) * 10 ** torch.randn(())
            )
            theirs[name].grad = weight.grad.clone()
        set_learning_rates(optimizer, 1 / (1 + number % 7))
        library.param_groups[0]["lr"] = 1e-2 / (1 + number % 7)
        optimizer.step()
        library.step()
        for name, weight in theirs.items():
            update, expected = ours[name].detach() - before[name], weight.detach() - before[name]
            # Weights are rounded at 1e-9, updates are some 1e-3.
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-8)
            ours[name].data.copy_(weight.detach())


def test_adafactor_never_waits_for_the_device():
    weights = make_weights()
    optimizer = make_optimizer(config(name="adafactor"), weights)

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, (
                "a number is read from a tensor"
            )
            return function(*args, **(kwargs or {}))

    with Refuse():
        steps(optimizer, weights, range(2))


def test_options_that_an_optimizer_does_not_have_are_refused_by_name():
    for name, changes, message in (
        (
            "adamw",
            {"clip_threshold": 2.0},
            r"optimizer.clip_threshold=2.0 is an option of adafactor, .*name=adamw has",
        ),
        (
            "adafactor",
            {"betas": (0.5, 0.9)},
            r"optimizer.betas=\(0.5, 0.9\) is an option of adamw, .* leave it at \(0.9,",
        ),
        (
            "adafactor",
            {"epsilon": 1e-6},
            r"optimizer.epsilon=1e-06 is an option of adamw, adamw_8bit, prodigy, .*",
        ),
        (
            "lion",
            {"epsilon": 1e-6},
            r"optimizer.epsilon=1e-06 .* optimizer.name=lion has none: leave it at 1e-08",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            config(name=name, **changes)


def test_prodigy_against_its_formulas():
    # arXiv:2306.06101, algorithm 4, without bias correction, d0 = 1e-6.
    settings = config(
        name="prodigy", weight_decay=0.1, learning_rate=1.0, betas=(0.9, 0.99), epsilon=1e-8
    )
    found, optimizer = two_steps(settings, START, GRADIENTS)
    start, gradients = START.double(), [gradient.double() for gradient in GRADIENTS]
    x, d, d_max, r = start.clone(), 1e-6, 1e-6, 0.0
    m, v, s = torch.zeros(3, 3).double()
    root = 0.99**0.5
    for g in gradients:
        m, v = 0.9 * m + 0.1 * d * g, 0.99 * v + 0.01 * (d * g) ** 2
        # r and s are kept divided by d0, which cancels.
        r, s = (
            root * r + (d / 1e-6) * d * torch.dot(g, start - x).item(),
            root * s + (d / 1e-6) * d * g,
        )
        estimate = r / s.abs().sum().item()
        used, d_max = d, max(d_max, estimate)
        d = max(d, estimate) if d == 1e-6 else d_max
        x = x - used * 0.1 * x - used * m / (v.sqrt() + d * 1e-8)
    torch.testing.assert_close(found, x.float(), rtol=1e-6, atol=1e-8)
    assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-5)


def test_prodigys_rate_in_the_log_is_what_it_found_and_it_takes_no_other():
    weights = make_weights()
    optimizer = make_optimizer(config(name="prodigy", learning_rate=1.0), weights)
    assert set_learning_rates(optimizer, 0.5)["learning_rate"] == pytest.approx(5e-7)
    assert config(name="prodigy", learning_rate=1.0, text_encoder_learning_rate=0.0), (
        "frozen text encoders"
    )
    for rates in (
        {"learning_rate": 1e-4},
        {"learning_rate": 1.0, "text_encoder_learning_rate": 0.5},
    ):
        with pytest.raises(ConfigError, match=r"prodigy with learning_rate=.* set that to 1"):
            config(name="prodigy", **rates)


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_saved_and_three_more_are_six_straight(name, tmp_path):
    settings = config(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
    straight, saved, resumed = make_weights(), make_weights(), make_weights()
    first = make_optimizer(settings, straight)
    steps(first, straight, range(6))
    second = make_optimizer(settings, saved)
    steps(second, saved, range(3))
    kept = Offload(torch.device("cpu")).copy(optimizer_state(second, saved))
    save_file(kept, tmp_path / "optimizer.safetensors")
    for key, weight in saved.items():
        resumed[key].data.copy_(weight.data)
    third = make_optimizer(settings, resumed)
    restore_optimizer(third, resumed, load_file(tmp_path / "optimizer.safetensors"))
    steps(third, resumed, range(3, 6))
    for key in straight:
        assert torch.equal(straight[key], resumed[key])
        assert not torch.equal(straight[key], saved[key])
    ours, theirs = optimizer_state(third, resumed), optimizer_state(first, straight)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )
    if name in ("adamw", "lion"):
        moment = third.state[resumed["unet.conv.weight"]]["exp_avg"]
        assert moment.stride() == resumed["unet.conv.weight"].stride(), (
            "fused kernels want one memory format"
        )


@pytest.mark.parametrize("name", NAMES)
def test_state_is_the_optimizers_own_memory(name):
    """A copy made here would be made behind the mark that a checkpoint's thread waits for, and read
    before it is."""
    weights = make_weights()
    optimizer = make_optimizer(
        config(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2), weights
    )
    steps(optimizer, weights, range(2))
    own = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    own += [
        value
        for group in optimizer.param_groups
        for value in group.values()
        if isinstance(value, torch.Tensor)
    ]
    places = {value.data_ptr() for value in own}
    state = optimizer_state(optimizer, weights)
    assert all(value.data_ptr() in places for value in state.values() if value.dim())


@pytest.mark.parametrize("name", ["lion", "adafactor", "prodigy"])
def test_lists_of_weights_of_any_length_take_the_same_steps(name, monkeypatch):
    settings, whole, divided = (
        config(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2),
        *twice(make_weights),
    )
    first = make_optimizer(settings, whole)
    monkeypatch.setattr(optim, "GROUP_NUMBERS", 30)
    second = make_optimizer(settings, divided)
    assert [[len(weight) for weight in group["params"]] for group in second.param_groups] == [
        [4],
        [4],
        [5],
    ]
    for optimizer, weights in ((first, whole), (second, divided)):
        steps(optimizer, weights, range(4))
    assert all(torch.equal(whole[key], divided[key]) for key in whole)
    ours, theirs = optimizer_state(second, divided), optimizer_state(first, whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    restore_optimizer(second, divided, theirs)
    steps(first, whole, range(4, 6))
    steps(second, divided, range(4, 6))
    assert all(torch.equal(whole[key], divided[key]) for key in whole)


def test_state_of_torchs_adafactor_is_refused_by_name():
    weights = make_weights()
    before = torch.optim.Adafactor(weights.values())
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    before.step()
    for group in before.param_groups:
        group["name"] = "unet"
    state = optimizer_state(before, weights)
    optimizer = make_optimizer(config(name="adafactor"), weights)
    with pytest.raises(
        TrainingError, match=r"\((row_var|variance)\.unet.*torch's Adafactor.*another run"
    ):
        restore_optimizer(optimizer, weights, state)


def test_factored_moments_of_another_shape_are_refused():
    weights = make_weights()
    optimizer = make_optimizer(config(name="adafactor"), weights)
    steps(optimizer, weights, range(1))
    state = optimizer_state(optimizer, weights)
    for key, shape in (
        ("exp_avg_sq_row", [4, 3, 2]),
        ("exp_avg_sq_col", [4, 3, 2]),
        ("exp_avg_sq", [4]),
    ):
        name = "unet.conv.bias" if key == "exp_avg_sq" else "unet.conv.weight"
        wrong = state | {f"{key}.{name}": torch.zeros(7)}
        message = f"{key} of {name} is [7] instead of {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            restore_optimizer(optimizer, weights, wrong)


def test_state_before_the_first_step_is_nothing_and_restores_nothing():
    weights = make_weights()
    optimizer = make_optimizer(config(), weights)
    assert optimizer_state(optimizer, weights) == {}
    restore_optimizer(optimizer, weights, {})
    assert not optimizer.state


def test_state_of_another_model_is_refused_and_of_another_rank_passed_over():
    weights = make_weights()
    optimizer = make_optimizer(config(), weights)
    steps(optimizer, weights, range(1))
    state = optimizer_state(optimizer, weights)
    share = {"unet.conv.bias": weights["unet.conv.bias"]}
    partial = make_optimizer(config(), share)
    restore_optimizer(partial, share, state)
    assert len(partial.state) == 1
    with pytest.raises(KeyError, match=r"unet\.other"):
        restore_optimizer(optimizer, {"unet.other": weights["unet.conv.bias"]}, state)
    state["exp_avg.unet.conv.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"exp_avg of unet.conv.bias is \[7\] instead of \[4\]"):
        restore_optimizer(optimizer, weights, state)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_8_bit_optimizers_say_what_they_lack(monkeypatch, name):
    def version(installed):
        def answer(package):
            assert package == "bitsandbytes"
            if installed is None:
                raise metadata.PackageNotFoundError(package)
            return installed

        monkeypatch.setattr(metadata, "version", answer)

    for installed, message in (
        (None, r"needs bitsandbytes.*diffusion-foundry\[gpu8bit\]"),
        ("0.36.0", "0.36.0 to 0.41.0"), ("0.39.1", "0.36.0 to 0.41.0"), ("0.41.0", "0.36.0 to 0.41.0"),
        ("0.35.4", "needs a GPU, the weights are on cpu"), ("0.41.1", "needs a GPU"), ("0.50.0rc1", "needs a GPU"),
    ):  # fmt: skip
        version(installed)
        with pytest.raises(ConfigError, match=message):
            make_optimizer(config(name=name), make_weights())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_8_bit_optimizers_go_on_exactly(name):
    pytest.importorskip("bitsandbytes")

    def large():
        torch.manual_seed(0)
        return {"unet.w": torch.nn.Parameter(torch.randn(128, 64, device="cuda"))}

    straight, resumed = large(), large()
    first, second = (make_optimizer(config(name=name), weights) for weights in (straight, resumed))
    steps(first, straight, range(6))
    steps(second, resumed, range(3))
    state = {key: value.cpu() for key, value in optimizer_state(second, resumed).items()}
    assert any(value.dtype == torch.uint8 for value in state.values())
    third = make_optimizer(config(name=name), resumed)
    restore_optimizer(third, resumed, state)
    steps(third, resumed, range(3, 6))
    assert torch.equal(straight["unet.w"], resumed["unet.w"])
