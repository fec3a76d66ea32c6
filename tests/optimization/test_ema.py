import pytest
import torch
from diffusers.training_utils import EMAModel

from training.optimization.ema import Ema


def model():
    torch.manual_seed(0)
    return {
        "weight": torch.nn.Parameter(torch.randn(3)),
        "bias": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("steps", [[100], [50, 50], [10] * 10, [1, 99]])
def test_after_one_half_life_half_of_the_past_is_left(steps):
    parameters = {"weight": torch.nn.Parameter(torch.zeros(1))}
    ema = Ema(parameters, 100)
    parameters["weight"].data.fill_(1.0)
    for size in steps:
        ema.update(parameters, size)
    assert ema.shadows["weight"].item() == pytest.approx(0.5, abs=1e-6)


def moved(weights):
    """A step of a random walk that drifts."""
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.01 + 0.05 * torch.randn_like(weight))


@pytest.mark.parametrize("half_life_steps", [2, 30, 250])
def test_the_warm_up_is_the_librarys(half_life_steps):
    weights = model()
    ema, library = (
        Ema(weights, 2048 * half_life_steps),
        EMAModel(weights.values(), decay=0.5 ** (1 / half_life_steps)),
    )
    for step in range(400):
        base = {name: shadow.clone() for name, shadow in ema.shadows.items()}
        moved(weights)
        ema.update(weights, 2048, step)
        library.step(weights.values())
        for name, own, theirs in zip(
            weights, ema.shadows.values(), library.shadow_params, strict=True
        ):
            if step == 0:  # the library keeps nothing of where it began, which is its own odd step
                assert torch.equal(theirs, weights[name])
                torch.testing.assert_close(own, 0.1 * base[name] + 0.9 * weights[name])
                theirs.copy_(own)
            torch.testing.assert_close(own, theirs, rtol=2e-5, atol=1e-6)


def test_what_the_library_does_in_its_first_step_is_soon_no_difference():
    weights = model()
    ema, library, apart = (
        Ema(weights, 500_000),
        EMAModel(weights.values(), decay=0.5 ** (2048 / 500_000)),
        [],
    )
    for step in range(100):
        moved(weights)
        ema.update(weights, 2048, step)
        library.step(weights.values())
        own = zip(ema.shadows.values(), library.shadow_params, strict=True)
        apart.append(max((ours - theirs).abs().max().item() for ours, theirs in own))
    assert apart[2] < 0.05 * apart[0]
    assert apart[-1] < 1e-6


def test_a_warm_average_follows_the_weights_from_the_first_step_on():
    # 100 steps of 2,048 at a half-life of 500,000 samples, weights that went from 0 to 1.1 by equal
    # steps.
    cold, warm = (Ema({"weight": torch.zeros(1)}, 500_000) for _ in range(2))
    for step in range(100):
        weights = {"weight": torch.full((1,), 0.011 * (step + 1))}
        cold.update(weights, 2048)
        warm.update(weights, 2048, step)
    assert cold.shadows["weight"].item() < 0.2
    # The ramp weighs step k by about k^8: its mean is 9/10 of the way.
    assert warm.shadows["weight"].item() == pytest.approx(0.9 * 1.1, abs=0.02)


def test_it_starts_from_the_weights_and_leaves_them_alone():
    parameters = model()
    ema = Ema(parameters, 10)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ema.update(parameters, 5)
    for name, value in before.items():
        torch.testing.assert_close(ema.shadows[name], value)
        assert torch.equal(parameters[name], value)


def test_swapped_shows_the_average_and_restores_the_weights_even_after_an_error():
    parameters = model()
    ema = Ema(parameters, 10)
    average = ema.shadows["weight"].clone()
    with torch.no_grad():
        parameters["weight"].add_(1)
    own = parameters["weight"].detach().clone()

    def look():
        with ema.swapped(parameters):
            assert torch.equal(parameters["weight"], average)
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert torch.equal(parameters["weight"], own)
    assert torch.equal(ema.shadows["weight"], average)


def test_it_goes_on_from_its_shadows_and_passes_over_those_of_other_ranks():
    parameters = model()
    straight, saved = Ema(parameters, 10), Ema(parameters, 10)
    for ema, sizes in ((straight, (3, 4, 5)), (saved, (3, 4))):
        for number, size in enumerate(sizes):
            moved = {name: torch.nn.Parameter(value + number) for name, value in parameters.items()}
            ema.update(moved, size)
    resumed = Ema({name: torch.nn.Parameter(value * 0) for name, value in parameters.items()}, 10)
    resumed.restore(
        {
            **{name: value.clone() for name, value in saved.shadows.items()},
            "elsewhere": torch.ones(1),
        }
    )
    resumed.update({name: value + 2 for name, value in parameters.items()}, 5)
    assert all(
        torch.equal(resumed.shadows[name], straight.shadows[name]) for name in straight.shadows
    )
    with pytest.raises(KeyError, match="bias"):
        resumed.restore({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"average of weight is \[4\] instead of \[3\]"):
        resumed.restore({"weight": torch.zeros(4), "bias": torch.zeros(2)})
