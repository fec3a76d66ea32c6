import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from training.config.run import LossConfig
from training.errors import TrainingError
from training.loop.loss import mse_per_sample, prediction_target, timestep_weights

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SIGNAL = SCHEDULER.alphas_cumprod
# Shares of signal with SNR 1, 9 and 1/9; the last has 1,999, beyond the cap of `debiased`.
SHARES = torch.tensor([0.5, 0.9, 0.1, 0.9995])


def weights(weighting, signal=SIGNAL, prediction_type="epsilon", **changes):
    return timestep_weights(LossConfig(weighting=weighting, **changes), signal, prediction_type)


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "expected"),
    [
        ("plain", "epsilon", [1, 1, 1, 1]),
        ("plain", "v_prediction", [1, 1, 1, 1]),
        ("min_snr", "epsilon", [1, 5 / 9, 1, 5 / 1999]),
        ("min_snr", "v_prediction", [1 / 2, 5 / 10, (1 / 9) / (10 / 9), 5 / 2000]),
        ("debiased", "epsilon", [1, 1 / 3, 3, 1 / math.sqrt(1000)]),
        ("debiased", "v_prediction", [1 / 2, 1 / 10, 9 / 10, 1 / 1001]),
        ("p2", "epsilon", [1 / 2, 1 / 10, 9 / 10, 1 / 2000]),
        ("p2", "v_prediction", [1 / 2, 1 / 10, 9 / 10, 1 / 2000]),
    ],
)
def test_weights_against_hand_worked_values(weighting, prediction_type, expected):
    found = weights(weighting, SHARES, prediction_type)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float32), rtol=2e-4, atol=1e-7
    )


def test_rules_of_version_1_have_no_cap_for_v():
    found = timestep_weights(LossConfig(weighting="debiased"), SHARES, "v_prediction", 1)
    torch.testing.assert_close(
        found, torch.tensor([1 / 2, 1 / 10, 9 / 10, 1 / 2000]), rtol=2e-4, atol=1e-7
    )


def test_debiased_weights_of_v_on_sdxls_schedule_are_kohyas():
    # kohya-ss/sd-scripts 48d368fa, apply_debiased_estimation(v_prediction=True) on its all_snr: SNR
    # 1,175.4 at t = 0.
    table = {
        0: 9.990010e-04,
        1: 1.703978e-03,
        100: 1.057768e-01,
        500: 7.236676e-01,
        999: 9.953399e-01,
    }
    found = weights("debiased", prediction_type="v_prediction")
    assert {t: found[t].item() for t in table} == pytest.approx(table, rel=1e-5)


def test_p2_is_the_factor_of_its_paper_whatever_is_predicted():
    # 1 / (k + SNR)^gamma with k = 1, the signal of DDPM's schedule in double precision.
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - beta)
    for gamma in (0.5, 1.0):
        expected = torch.from_numpy((1 + signal / (1 - signal)) ** -gamma).float()
        for predicted in ("epsilon", "v_prediction"):
            found = weights("p2", prediction_type=predicted, p2_gamma=gamma)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


def test_gammas_are_the_cap_and_the_exponent():
    torch.testing.assert_close(
        weights("min_snr", SHARES[:2], min_snr_gamma=1.0), torch.tensor([1.0, 1 / 9])
    )
    torch.testing.assert_close(
        weights("p2", SHARES[:2], p2_gamma=0.5), torch.tensor([0.5**0.5, 0.1**0.5])
    )


def test_weights_on_sdxls_schedule_as_measured():
    # Min-SNR, arXiv:2303.09556, with gamma 5 on SDXL's scaled_linear schedule (0.00085 to 0.012):
    # mean 0.917, 0.0043 at t = 0, 1 from t = 147; v: mean 0.294, max 0.833.
    epsilon, velocity = weights("min_snr"), weights("min_snr", prediction_type="v_prediction")
    assert epsilon.mean().item() == pytest.approx(0.917, abs=5e-4)
    assert epsilon[0].item() == pytest.approx(0.0043, abs=5e-5)
    assert (epsilon[147:] == 1).all()
    assert epsilon[146] < 1
    assert velocity.mean().item() == pytest.approx(0.294, abs=5e-4)
    assert velocity.max().item() == pytest.approx(5 / 6, abs=2e-3)
    # The same page: mean 3.02, up to 14.6, so the learning rate means something else with it.
    debiased = weights("debiased")
    assert debiased.mean().item() == pytest.approx(3.02, abs=5e-3)
    assert debiased.max().item() == pytest.approx(14.6, abs=5e-2)


@pytest.mark.parametrize("weighting", ["plain", "debiased", "p2"])
def test_the_last_step_of_a_schedule_without_signal_weighs_something_or_is_refused(weighting):
    rescaled = torch.cat([SIGNAL[:-1], torch.zeros(1)])
    assert weights(weighting, rescaled, "v_prediction")[-1] == 1
    with pytest.raises(TrainingError, match=r"min_snr.*zero terminal SNR.*weight 0"):
        weights("min_snr", rescaled, "v_prediction")


def test_weights_use_the_librarys_snr():
    snr = compute_snr(SCHEDULER, torch.arange(1000))
    torch.testing.assert_close(weights("min_snr"), snr.clamp(max=5) / snr)
    torch.testing.assert_close(weights("p2", p2_gamma=2.0), (1 + snr) ** -2.0)


def test_targets_are_the_librarys():
    torch.manual_seed(0)
    latents, noise, steps = (
        torch.randn(3, 4, 2, 3),
        torch.randn(3, 4, 2, 3),
        torch.tensor([0, 400, 999]),
    )
    assert prediction_target("epsilon", latents, noise, steps, SIGNAL) is noise
    torch.testing.assert_close(
        prediction_target("v_prediction", latents, noise, steps, SIGNAL),
        SCHEDULER.get_velocity(latents, noise, steps),
    )


def test_the_plain_loss_is_the_mean_of_squares_even_of_half_precision():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 4, 3, 5).bfloat16(), torch.randn(2, 4, 3, 5)
    expected = torch.nn.functional.mse_loss(prediction.float(), target, reduction="none").mean(
        dim=(1, 2, 3)
    )
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
    torch.testing.assert_close(
        mse_per_sample(prediction, target, mask), mse_per_sample(prediction, target, None)
    )
