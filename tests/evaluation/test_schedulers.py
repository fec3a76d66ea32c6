"""Each sampler against an independent implementation, on a toy denoiser whose answer is known in closed form.

The references below follow the papers in variance-exploding form (x = data + sigma * noise), in fp64.
"""

import itertools
import math

import pytest
import torch

from training.evaluation.schedulers import make_scheduler

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What SDXL's own scheduler_config.json says beside the betas: none of it may reach a sampler.
CONFIG = {
    **BETAS, "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading",
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "use_karras_sigmas": False,
}  # fmt: skip
BETA = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA = torch.cumprod(1 - BETA, 0)
SIGMA = ((1 - ALPHA) / ALPHA).sqrt()


def denoised(x, sigma):
    """E[data | x] where data is -1 or 1.5 with equal probability, each blurred by 0.3."""
    spread = 0.3**2
    means, total = torch.tensor([-1.0, 1.5], dtype=torch.float64), spread + sigma**2
    weights = torch.softmax(-((x[..., None] - means) ** 2) / (2 * total), dim=-1)
    return (weights * (means * sigma**2 + x[..., None] * spread) / total).sum(-1)


def run(sampler, num_steps, start, seed=0, prediction="epsilon", schedule="plain"):
    """Our scheduler on the toy denoiser; returns the picture and the sigmas that the denoiser was asked about."""
    scheduler = make_scheduler(sampler, schedule, {**CONFIG, "prediction_type": prediction}, num_steps)
    generators = [torch.Generator().manual_seed(seed)]
    x, asked = start * scheduler.init_noise_sigma, []
    for place, timestep in enumerate(scheduler.timesteps):
        sigma = SIGMA[int(timestep)].item() if sampler == "ddim" else scheduler.sigmas[place].item()
        given = scheduler.scale_model_input(x, timestep).double()  # data * alpha + noise * sqrt(1 - alpha^2)
        alpha = 1 / math.sqrt(1 + sigma**2)
        clean = denoised(given / alpha, sigma)
        noise = (given / alpha - clean) / sigma
        output = noise if prediction == "epsilon" else alpha * noise - alpha * sigma * clean
        x = scheduler.step(output.float(), timestep, x, generator=generators).prev_sample
        asked.append(sigma)
    return x, asked


def karras(num_steps, rho=7.0):
    """Eq. 5 of arXiv:2206.00364, then 0."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = SIGMA[0] ** (1 / rho), SIGMA[-1] ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def dpmpp_2m(x, sigmas):
    """Algorithm 2 of arXiv:2211.01095 in terms of lambda = -log(sigma)."""
    before = None
    for place in range(len(sigmas) - 1):
        sigma, following = sigmas[place], sigmas[place + 1]
        clean = denoised(x, sigma)
        estimate = clean
        if before is not None and following > 0:
            h = math.log(sigma / following)
            r = math.log(sigmas[place - 1] / sigma) / h
            estimate = clean + (clean - before) / (2 * r)
        x = (following / sigma) * x + (1 - following / sigma) * estimate
        before = clean
    return x


def euler_ancestral(x, sigmas, seed):
    generator = torch.Generator().manual_seed(seed)
    for sigma, following in itertools.pairwise(sigmas):
        up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
        down = math.sqrt(following**2 - up**2)
        x = x + (x - denoised(x, sigma)) / sigma * (down - sigma)
        x = x + torch.randn(x.shape, generator=generator) * up
    return x


def ddim(x, sigmas):
    """Eq. 12 of arXiv:2010.02502 with eta = 0: the noise that the denoiser sees is kept, its share shrinks."""
    for sigma, following in itertools.pairwise(sigmas):
        clean = denoised(x, sigma)
        x = clean + (x - clean) / sigma * following
    return x


START = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("num_steps", [8, 20, 30])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpmpp_2m_karras_equals_the_paper(num_steps, prediction):
    x, asked = run("dpmpp_2m", num_steps, START, prediction=prediction, schedule="karras")
    sigmas = karras(num_steps)
    assert asked == pytest.approx(sigmas[:-1], rel=1e-4)
    assert asked[0] == pytest.approx(14.6146, abs=1e-3)
    assert asked[-1] == pytest.approx(0.0292, abs=1e-4)
    # diffusers starts from unit noise in variance-preserving form; in ours that is sqrt(1 + sigma^2) times as much.
    reference = dpmpp_2m(START.double() * math.sqrt(1 + sigmas[0] ** 2), sigmas)
    torch.testing.assert_close(x.double(), reference, atol=5e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [8, 20, 30])
def test_euler_a_equals_its_definition_with_the_same_noise(num_steps):
    x, asked = run("euler_a", num_steps, START, seed=9)
    places = torch.linspace(999, 0, num_steps, dtype=torch.float64)
    low = places.floor().long()
    high = (low + 1).clamp(max=999)
    sigmas = [*(SIGMA[low] + (SIGMA[high] - SIGMA[low]) * (places - low)).tolist(), 0.0]
    assert asked == pytest.approx(sigmas[:-1], rel=1e-4)
    assert asked[0] == pytest.approx(14.6146, abs=1e-3)
    reference = euler_ancestral(START.double() * sigmas[0], sigmas, 9)
    torch.testing.assert_close(x.double(), reference, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("num_steps", "tolerance"), [(10, 5e-5), (20, 5e-5), (30, 0.05)])
def test_ddim_equals_the_paper_from_pure_noise_to_the_first_timestep(num_steps, tolerance):
    x, asked = run("ddim", num_steps, START)
    timesteps = [round(1000 - 1000 / num_steps * place) - 1 for place in range(num_steps)]
    sigmas = [*SIGMA[timesteps].tolist(), SIGMA[0].item()]
    assert asked == pytest.approx(sigmas[:-1])
    assert timesteps[0] == 999
    in_ve = START.double() * math.sqrt(1 + sigmas[0] ** 2)
    reference = ddim(in_ve, sigmas) / math.sqrt(1 + sigmas[-1] ** 2)
    # Where the steps do not divide 1,000, diffusers ends each step at a timestep that is off by one.
    torch.testing.assert_close(x.double(), reference, atol=tolerance, rtol=0)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "ddim"])
def test_samples_follow_the_data(sampler):
    start = torch.randn((1, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    x = run(sampler, 50, start)[0]
    assert abs((x > 0.25).double().mean().item() - 0.5) < 0.05
    assert x[x > 0.25].mean().item() == pytest.approx(1.5, abs=0.1)
    assert x[x < 0.25].std().item() == pytest.approx(0.3, abs=0.08)
