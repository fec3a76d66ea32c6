import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from training.optim import learning_rate, make_optimizer, set_learning_rate
from training.run_config import OptimizerConfig


def config(**changes):
    return OptimizerConfig(**{"learning_rate": 2e-3, "warmup_samples": 100, **changes})


@pytest.mark.parametrize(
    ("schedule", "samples", "share"),
    [
        ("constant", 50, 0.5), ("constant", 100, 1), ("constant", 1100, 1),
        ("linear", 25, 0.25), ("linear", 100, 1), ("linear", 600, 0.5), ("linear", 1100, 0), ("linear", 2000, 0),
        ("cosine", 50, 0.5), ("cosine", 100, 1), ("cosine", 600, 0.5), ("cosine", 350, 0.853553), ("cosine", 1100, 0),
    ],
)  # fmt: skip
def test_the_rate_at_hand_worked_points(schedule, samples, share):
    rate = learning_rate(config(schedule=schedule), samples, 1100)
    assert rate == pytest.approx(2e-3 * share, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "library"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_the_shape_is_the_librarys(schedule, library):
    # One sample a step: the library counts steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = library(optimizer, num_warmup_steps=100, num_training_steps=1100)
    for step in range(1100):
        assert learning_rate(config(schedule=schedule), step, 1100) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_without_warm_up_the_first_rate_is_the_peak():
    assert learning_rate(config(warmup_samples=0), 0, 1000) == 2e-3


def test_the_optimizer_is_adamw_with_decay_on_everything():
    torch.manual_seed(0)
    start, gradient = torch.randn(5), torch.randn(5)
    settings = config(weight_decay=0.1, betas=(0.8, 0.9), epsilon=1e-6)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(settings, [parameter])
    set_learning_rate(optimizer, 0.01)
    expected, moment, square = start.clone(), torch.zeros(5), torch.zeros(5)
    for step in range(1, 4):
        parameter.grad = gradient.clone()
        optimizer.step()
        moment, square = 0.8 * moment + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        expected = expected * (1 - 0.01 * 0.1)
        expected -= 0.01 * (moment / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
    torch.testing.assert_close(parameter.detach(), expected)
