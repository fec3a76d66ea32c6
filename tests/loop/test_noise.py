import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from scipy import stats

from training.errors import TrainingError
from training.loop import noise
from training.seeds import Purpose

SDXL = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}  # fmt: skip
IDS = [f"{number:064x}" for number in range(400)]
SHAPE = torch.Size((4, 3, 5))


def test_signal_is_the_librarys_whatever_sampler_the_folder_names():
    shares = noise.alphas_cumprod(SDXL)
    torch.testing.assert_close(shares, EulerDiscreteScheduler.from_config(SDXL).alphas_cumprod)
    assert shares.shape == (1000,)


def test_noising_is_the_librarys():
    torch.manual_seed(0)
    latents, draw, steps = (
        torch.randn(3, *SHAPE),
        torch.randn(3, *SHAPE),
        torch.tensor([0, 500, 999]),
    )
    scheduler = DDPMScheduler.from_config({**SDXL, "_class_name": "DDPMScheduler"})
    torch.testing.assert_close(
        noise.add_noise(latents, draw, steps, noise.alphas_cumprod(SDXL)),
        scheduler.add_noise(latents, draw, steps),
    )


def test_zero_terminal_snr_needs_v_prediction():
    config = {**SDXL, "_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}
    with pytest.raises(TrainingError, match="zero terminal SNR"):
        noise.alphas_cumprod(config)
    assert noise.alphas_cumprod({**config, "prediction_type": "v_prediction"})[-1] == 0


def test_draws_belong_to_the_sample_and_not_to_its_batch():
    together = noise.draw_noise(1, Purpose.NOISE, 2, IDS[:5], SHAPE, offset=0.1)
    alone = [
        noise.draw_noise(1, Purpose.NOISE, 2, [image_id], SHAPE, offset=0.1)[0]
        for image_id in IDS[4::-1]
    ]
    assert torch.equal(together, torch.stack(alone[::-1]))
    steps = noise.draw_timesteps(1, 2, IDS[:5], 1000)
    assert steps.tolist()[::-1] == noise.draw_timesteps(1, 2, IDS[4::-1], 1000).tolist()


@pytest.mark.parametrize(
    "other", [(2, Purpose.NOISE, 2), (1, Purpose.POSTERIOR, 2), (1, Purpose.NOISE, 3)]
)
def test_seed_purpose_and_epoch_each_change_the_draw(other):
    one = noise.draw_noise(1, Purpose.NOISE, 2, IDS[:2], SHAPE)
    assert not torch.equal(one, noise.draw_noise(*other, IDS[:2], SHAPE))


def test_noise_is_standard_normal_and_timesteps_uniform():
    draws = noise.draw_noise(0, Purpose.NOISE, 0, IDS, SHAPE).numpy().ravel()
    assert stats.kstest(draws, "norm").pvalue > 0.01
    steps = noise.draw_timesteps(0, 0, [f"{number}" for number in range(5000)], 1000).numpy()
    assert steps.min() >= 0
    assert steps.max() < 1000
    assert stats.kstest((steps + 0.5) / 1000, "uniform").pvalue > 0.01


def test_the_offset_moves_whole_channels():
    plain = noise.draw_noise(0, Purpose.NOISE, 0, IDS, SHAPE)
    moved = noise.draw_noise(0, Purpose.NOISE, 0, IDS, SHAPE, offset=0.5) - plain
    assert torch.allclose(moved, moved[..., :1, :1].expand_as(moved), atol=1e-6)
    assert moved[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("count", [1, 7, 400, 1500])
def test_stratified_timesteps_take_one_of_each_slice(count):
    ids = [f"{number}" for number in range(count)]
    steps = noise.stratified_timesteps(5, ids, 1000)
    assert torch.equal(steps, noise.stratified_timesteps(5, ids, 1000))
    ordered = np.sort(steps.numpy())
    assert (ordered >= np.floor(np.arange(count) * 1000 / count)).all()
    assert (ordered <= np.ceil((np.arange(count) + 1) * 1000 / count)).all()
    assert ordered[-1] < 1000
