import pytest
import torch

from training.ema import Ema


def model():
    torch.manual_seed(0)
    return {"weight": torch.nn.Parameter(torch.randn(3)), "bias": torch.nn.Parameter(torch.randn(2))}


@pytest.mark.parametrize("steps", [[100], [50, 50], [10] * 10, [1, 99]])
def test_after_one_half_life_half_of_the_past_is_left(steps):
    parameters = {"weight": torch.nn.Parameter(torch.zeros(1))}
    ema = Ema(parameters, 100)
    parameters["weight"].data.fill_(1.0)
    for size in steps:
        ema.update(parameters, size)
    assert ema.shadows["weight"].item() == pytest.approx(0.5, abs=1e-6)


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
    resumed.restore({**{name: value.clone() for name, value in saved.shadows.items()}, "elsewhere": torch.ones(1)})
    resumed.update({name: value + 2 for name, value in parameters.items()}, 5)
    assert all(torch.equal(resumed.shadows[name], straight.shadows[name]) for name in straight.shadows)
    with pytest.raises(KeyError, match="bias"):
        resumed.restore({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"average of weight is \[4\] instead of \[3\]"):
        resumed.restore({"weight": torch.zeros(4), "bias": torch.zeros(2)})
