import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from training.loss import min_snr_weights, mse_per_sample, prediction_target

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SIGNAL = SCHEDULER.alphas_cumprod


def test_min_snr_against_hand_worked_values():
    # Signal shares 0.5, 0.9, 0.1 have SNR 1, 9, 1/9.
    signal = torch.tensor([0.5, 0.9, 0.1])
    steps = torch.arange(3)
    torch.testing.assert_close(min_snr_weights(steps, signal, 5.0, "epsilon"), torch.tensor([1.0, 5 / 9, 1.0]))
    torch.testing.assert_close(
        min_snr_weights(steps, signal, 5.0, "v_prediction"), torch.tensor([0.5, 0.5, (1 / 9) / (10 / 9)])
    )
    assert min_snr_weights(steps, signal, 0, "epsilon").tolist() == [1, 1, 1]


def test_min_snr_on_sdxls_schedule_as_measured():
    # facts/trainers.md (g): mean 0.917, 0.0043 at t = 0, 1 from t = 147; v: mean 0.294, max 0.833.
    steps = torch.arange(1000)
    weights = min_snr_weights(steps, SIGNAL, 5.0, "epsilon")
    assert weights.mean().item() == pytest.approx(0.917, abs=5e-4)
    assert weights[0].item() == pytest.approx(0.0043, abs=5e-5)
    assert (weights[147:] == 1).all()
    assert weights[146] < 1
    velocity = min_snr_weights(steps, SIGNAL, 5.0, "v_prediction")
    assert velocity.mean().item() == pytest.approx(0.294, abs=5e-4)
    assert velocity.max().item() == pytest.approx(5 / 6, abs=2e-3)


def test_min_snr_uses_the_librarys_snr():
    steps = torch.tensor([0, 10, 500, 999])
    snr = compute_snr(SCHEDULER, steps)
    torch.testing.assert_close(min_snr_weights(steps, SIGNAL, 5.0, "epsilon"), snr.clamp(max=5) / snr)


def test_targets_are_the_librarys():
    torch.manual_seed(0)
    latents, noise, steps = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2, 3), torch.tensor([0, 400, 999])
    assert prediction_target("epsilon", latents, noise, steps, SIGNAL) is noise
    torch.testing.assert_close(
        prediction_target("v_prediction", latents, noise, steps, SIGNAL),
        SCHEDULER.get_velocity(latents, noise, steps),
    )


def test_the_plain_loss_is_the_mean_of_squares_even_of_half_precision():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 4, 3, 5).bfloat16(), torch.randn(2, 4, 3, 5)
    expected = torch.nn.functional.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
    losses = mse_per_sample(prediction, target, None)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


def test_a_mask_takes_the_mean_over_its_own_area():
    prediction, target = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    target[..., 0, 0] = 2.0  # error 4 in one pixel
    target[..., 1, 1] = 10.0  # error 100, under the mask
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    assert mse_per_sample(prediction, target, mask).item() == pytest.approx(4 / 3)
    mask[..., 1, 1] = 0.5
    assert mse_per_sample(prediction, target, mask).item() == pytest.approx((4 + 50) / 3.5)
    assert mse_per_sample(prediction, target, torch.zeros(1, 1, 2, 2)).item() == 0


@given(st.floats(0.05, 1.0), st.integers(0, 100))
def test_a_uniform_mask_changes_nothing(weight, seed):
    torch.manual_seed(seed)
    prediction, target = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    mask = torch.full((2, 1, 6, 5), weight)
    torch.testing.assert_close(mse_per_sample(prediction, target, mask), mse_per_sample(prediction, target, None))
