"""Each sampler on each schedule against an independent implementation, on a toy denoiser known in
closed form.

The references below follow the papers in variance-exploding form (x = data + sigma * noise), in
fp64, and draw their noise from a generator of the same seed in the same order.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from training.config.evaluation import SamplingConfig
from training.errors import ConfigError, EvaluationError
from training.sampling.schedulers import label, lay_out, make_scheduler, starting_latents

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
# What SDXL's own scheduler_config.json says beside the betas: none of it may reach a sampler.
CONFIG = {
    **BETAS, "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading",
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "use_karras_sigmas": False,
}  # fmt: skip
BETA = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA = torch.cumprod(1 - BETA, 0)
SIGMA = ((1 - ALPHA) / ALPHA).sqrt()
PRESERVING = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddim")
"""Samplers that keep x / sqrt(1 + sigma^2)."""
COPY = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)


def denoised(x, sigma):
    """E[data | x] where data is -1 or 1.5 with equal probability, each blurred by 0.3."""
    spread = 0.3**2
    means, total = torch.tensor([-1.0, 1.5], dtype=torch.float64), spread + sigma**2
    weights = torch.softmax(-((x[..., None] - means) ** 2) / (2 * total), dim=-1)
    return (weights * (means * sigma**2 + x[..., None] * spread) / total).sum(-1)


def walk(scheduler, x, levels, generators, prediction="epsilon"):
    """Step a scheduler over the toy denoiser, which is asked at each of `levels`."""
    for sigma, timestep in zip(levels, scheduler.timesteps, strict=True):
        given = scheduler.scale_model_input(
            x, timestep
        ).double()  # data * alpha + noise * sqrt(1 - alpha^2)
        alpha = 1 / math.sqrt(1 + sigma**2)
        clean = denoised(given / alpha, sigma)
        noise = (given / alpha - clean) / sigma
        output = noise if prediction == "epsilon" else alpha * noise - alpha * sigma * clean
        x = scheduler.step(output.float(), timestep, x, generator=generators).prev_sample
    return x


def run(sampler, num_steps, start, seed=0, prediction="epsilon", schedule="karras", **options):
    """Our scheduler on the toy denoiser; returns the image as data + sigma * noise, and the
    scheduler."""
    schedule = "plain" if sampler == "ddim" else schedule
    config = {**CONFIG, "prediction_type": prediction}
    scheduler = make_scheduler(sampler, schedule, config, num_steps, **options)
    sigmas = scheduler.sigmas.tolist()
    levels = scheduler.levels.tolist() if sampler == "dpmpp_sde" else sigmas[:-1]
    generators = [torch.Generator().manual_seed(seed)]
    x = walk(scheduler, starting_latents(scheduler, start), levels, generators, prediction).double()
    return x * math.sqrt(1 + sigmas[-1] ** 2) if sampler in PRESERVING else x, scheduler


def start_of(sigmas):
    """Unit noise in variance-preserving form, sqrt(1 + sigma^2) times as much in the other."""
    return START.double() * math.sqrt(1 + sigmas[0] ** 2)


# --- schedules
# -------------------------------------------------------------------------------------------------------


def levels_of(schedule, num_steps, family="sdxl"):
    """The noise levels from their definitions, step by step."""
    low, high = SIGMA[0].item(), SIGMA[-1].item()
    share = [place / max(num_steps - 1, 1) for place in range(num_steps)]
    if schedule == "karras":
        return [*((high ** (1 / 7) * (1 - s) + low ** (1 / 7) * s) ** 7 for s in share), 0.0]
    if schedule == "exponential":
        return [*(high ** (1 - s) * low**s for s in share), 0.0]
    if schedule == "plain":
        found = []
        for s in share:
            time = 999 * (1 - s)
            under = min(int(time), 998)
            part = time - under
            found.append(SIGMA[under].item() ** (1 - part) * SIGMA[under + 1].item() ** part)
        return [*found, 0.0]
    # Published with three digits on the authors' page, for 10 steps.
    tables = {
        "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, low],
        "sd1": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, low],
    }
    table, found = tables[family], []
    for place in range(num_steps):
        at = 10 * place / num_steps
        under = int(at)
        found.append(table[under] ** (under + 1 - at) * table[under + 1] ** (at - under))
    return [*found, 0.0]


@pytest.mark.parametrize("schedule", ["karras", "exponential", "ays", "plain"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 23, 60])
@pytest.mark.parametrize("family", ["sdxl", "sd1"])
def test_a_schedule_equals_its_definition(schedule, num_steps, family):
    sigmas = lay_out(schedule, num_steps, SIGMA.numpy(), family)
    assert sigmas.tolist() == pytest.approx(levels_of(schedule, num_steps, family), rel=1e-9)
    assert (np.diff(sigmas) < 0).all()
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-3)


def test_ten_aligned_steps_are_the_tables_of_diffusers():
    for family, name in (("sdxl", "StableDiffusionXL"), ("sd1", "StableDiffusion")):
        assert lay_out("ays", 10, SIGMA.numpy(), family).tolist() == pytest.approx(
            AysSchedules[f"{name}Sigmas"]
        )
        timesteps = make_scheduler("euler", "ays", CONFIG, 10, family=family).timesteps
        # Theirs are rounded too, from sigmas of more digits.
        assert np.abs(timesteps.numpy() - AysSchedules[f"{name}Timesteps"]).max() <= 1


# By hand: NVIDIA's published levels, and log-linear between them; halves are geometric means,
# sqrt(14.615 * 6.315), ...
AYS_15 = (
    14.615, 8.353, 5.318, 3.771, 2.618, 1.855, 1.342, 0.999, 0.744, 0.555, 0.431, 0.323, 0.234, 0.144, 0.072, 0.0,
)  # fmt: skip
AYS_20 = (
    14.615, 9.607, 6.315, 4.880, 3.771, 2.868, 2.181, 1.711, 1.342, 1.076, 0.862, 0.692, 0.555, 0.459, 0.380, 0.298,
    0.234, 0.163, 0.113, 0.057, 0.0,
)  # fmt: skip


@pytest.mark.parametrize("table", [AYS_15, AYS_20])
def test_other_numbers_of_aligned_steps_are_comfyuis(table):
    """As many levels as steps and a 0, of 11 levels of which the last is left out; A1111 would keep
    its 0.029."""
    sigmas = lay_out("ays", len(table) - 1, SIGMA.numpy(), "sdxl")
    assert sigmas.tolist() == pytest.approx(table, abs=6e-4)


def test_the_unet_is_asked_at_whole_timesteps_of_the_same_noise():
    for sampler in ("dpmpp_2m", "dpmpp_sde", "euler"):
        scheduler = make_scheduler(sampler, "karras", CONFIG, 30)
        levels = scheduler.levels if sampler == "dpmpp_sde" else scheduler.sigmas[:-1]
        for timestep, sigma in zip(scheduler.timesteps.tolist(), levels.tolist(), strict=True):
            off = (SIGMA.log() - math.log(sigma)).abs()
            assert timestep == off.argmin().item() or off[int(timestep)] < off.min() * 1.01


@COPY
@pytest.mark.parametrize("num_steps", [5, 20, 30, 100])
def test_the_demos_sampler_lies_where_it_always_did(num_steps):
    stock = DPMSolverMultistepScheduler(**BETAS, solver_order=2, use_karras_sigmas=True)
    stock.set_timesteps(num_steps)
    ours = make_scheduler("dpmpp_2m", "karras", CONFIG, num_steps)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=0)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "euler_a"])
def test_equal_timesteps_are_steps_of_their_own(sampler):
    scheduler = make_scheduler(sampler, "karras", CONFIG, 2000)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    x = scheduler.scale_model_input(START, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], START, generator=[torch.Generator()])
    assert scheduler.step_index == 1


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_a_strength_takes_the_end_of_a_longer_schedule(strength):
    for sampler in ("dpmpp_2m", "euler_a", "ddim", "dpmpp_sde"):
        schedule = "plain" if sampler == "ddim" else "karras"
        part = make_scheduler(sampler, schedule, CONFIG, 12, strength=strength)
        whole = make_scheduler(sampler, schedule, CONFIG, int(12 / strength))
        assert torch.equal(part.sigmas, whole.sigmas[-13:])
        assert len(part.sigmas) == 13
        image, noise = torch.full((2, 4, 8, 8), 3.0), torch.full((2, 4, 8, 8), 1.0)
        began = part.add_noise(image, noise, part.timesteps[:1].expand(2))
        wanted = 3 + part.sigmas[0].item()
        if sampler in PRESERVING:
            wanted /= math.sqrt(1 + part.sigmas[0].item() ** 2)
        assert began.flatten().tolist() == pytest.approx([wanted] * began.numel(), rel=1e-5)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "ddim", "dpmpp_sde"])
def test_a_weak_pass_goes_down_to_the_end_and_never_up(sampler):
    scheduler = make_scheduler(sampler, "plain", CONFIG, 30, strength=0.01)
    assert (scheduler.sigmas.diff() <= 0).all()
    assert scheduler.sigmas[0] < 0.1
    assert scheduler.timesteps.max() < 20


# --- samplers
# --------------------------------------------------------------------------------------------------------


def euler(x, sigmas, draw):
    """Euler's method on dx/dsigma = (x - denoised) / sigma, arXiv:2206.00364, eq. 1."""
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (x - denoised(x, sigma)) / sigma * (following - sigma)
    return x


def ancestral(sigma, following):
    up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
    return up, math.sqrt(following**2 - up**2)


def euler_a(x, sigmas, draw):
    for sigma, following in itertools.pairwise(sigmas):
        up, down = ancestral(sigma, following)
        x = x + (x - denoised(x, sigma)) / sigma * (down - sigma) + draw() * up
    return x


def ddim(x, sigmas, draw):
    """Eq. 12 of arXiv:2010.02502 with eta = 0: the noise that the denoiser sees is kept, its share
    shrinks."""
    for sigma, following in itertools.pairwise(sigmas):
        clean = denoised(x, sigma)
        x = clean + (x - clean) / sigma * following
    return x


def dpmpp_2m(x, sigmas, draw):
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


def dpmpp_sde(x, sigmas, draw):
    """Two-stage: an ancestral step to the middle in log sigma, then one from the start with the
    estimate from there.

    The noise is a Brownian path over sigma, drawn as its increments from the start to the middle
    and on to the end.
    """
    for sigma, following in itertools.pairwise(sigmas):
        clean = denoised(x, sigma)
        if following == 0:
            return clean
        middle = math.exp((math.log(sigma) + math.log(following)) / 2)
        first = draw() * math.sqrt(sigma - middle)
        up, down = ancestral(sigma, middle)
        half = math.exp(math.log(down / sigma)) * x - math.expm1(math.log(down / sigma)) * clean
        half = half + up * first / math.sqrt(sigma - middle)
        clean = denoised(half, middle)
        whole = first + draw() * math.sqrt(middle - following)
        up, down = ancestral(sigma, following)
        x = (
            (down / sigma) * x
            + (1 - down / sigma) * clean
            + up * whole / math.sqrt(sigma - following)
        )
    return None


def multistep_sde(order):
    def solve(x, sigmas, draw):
        """Stochastic exponential integrator, eta = 1: in lambda = -log(sigma), with e = 2 h.

        x' = (s' / s) exp(-h) x + integral of the estimate's polynomial + s' sqrt(1 - exp(-2 h))
        noise.
        """
        cleans, lambdas = [], []
        for sigma, following in itertools.pairwise(sigmas):
            cleans.append(denoised(x, sigma))
            lambdas.append(-math.log(sigma))
            noise = draw()
            if following == 0:
                return cleans[-1]
            h = math.log(sigma / following)
            used = min(order, len(cleans))
            drift = polynomial_drift(cleans[-used:], lambdas[-used:], h, midpoint=order == 2)
            x = (following / sigma) * math.exp(-h) * x + drift
            x = x + following * math.sqrt(1 - math.exp(-2 * h)) * noise
        return None

    return solve


def polynomial_drift(cleans, lambdas, h, *, midpoint):
    """Integral over the step of 2 exp(2 (u - h)) times a polynomial through the last estimates, by
    quadrature.

    The samplers that people know are not that integral: 2M SDE takes the line's value in the middle
    of the step for all of it, and the third-order samplers of both papers' code give the curvature
    half its weight.
    """
    times = np.array(lambdas) - lambdas[-1]
    powers = np.vander(times, increasing=True)  # (n, n)
    stacked = np.stack([clean.numpy().ravel() for clean in cleans])
    coefficients = np.linalg.solve(powers, stacked)  # (n, values): constant, slope, curvature
    if len(cleans) == 3:
        coefficients[2] /= 2
    nodes, weights = np.polynomial.legendre.leggauss(24)
    at, weights = h * (nodes + 1) / 2, weights * h / 2
    if midpoint:
        at = np.full_like(at, h / 2)
    decay = 2 * np.exp(2 * (h * (nodes + 1) / 2 - h))
    values = np.vander(at, len(cleans), increasing=True) @ coefficients
    return torch.from_numpy(((weights * decay) @ values).reshape(cleans[0].shape))


def dpmpp_3m_sde(x, sigmas, draw):
    return multistep_sde(3)(x, sigmas, draw)


REFERENCES = {
    "dpmpp_2m": dpmpp_2m, "dpmpp_sde": dpmpp_sde, "dpmpp_2m_sde": multistep_sde(2), "dpmpp_3m_sde": dpmpp_3m_sde,
    "euler": euler, "euler_a": euler_a, "ddim": ddim,
}  # fmt: skip
START = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(START.shape, generator=generator).double()


@pytest.mark.parametrize("schedule", ["karras", "exponential", "ays", "plain"])
@pytest.mark.parametrize("num_steps", [4, 20, 30])
@pytest.mark.parametrize("sampler", [name for name in REFERENCES if name != "ddim"])
def test_a_sampler_equals_the_papers_with_the_same_noise(sampler, schedule, num_steps):
    x, _ = run(sampler, num_steps, START, seed=9, schedule=schedule)
    sigmas = levels_of(schedule, num_steps)
    reference = REFERENCES[sampler](start_of(sigmas), sigmas, drawing(9))
    # The denoiser decides between two values, which magnifies what fp32 rounds; a wrong term is off
    # by 0.01 and more.
    torch.testing.assert_close(x, reference, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [4, 20, 30, 7])
def test_ddim_equals_the_paper_from_pure_noise_to_the_first_timestep(num_steps):
    x, scheduler = run("ddim", num_steps, START)
    timesteps = [round(1000 - 1000 / num_steps * place) - 1 for place in range(num_steps)]
    assert scheduler.timesteps.tolist() == timesteps
    assert timesteps[0] == 999
    sigmas = [*SIGMA[timesteps].tolist(), SIGMA[0].item()]
    torch.testing.assert_close(x, ddim(start_of(sigmas), sigmas, None), atol=1e-4, rtol=0)


@COPY
def test_ddim_equals_diffusers_where_its_steps_divide_the_timesteps():
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    stock.set_timesteps(20)
    theirs = walk(stock, START, SIGMA[stock.timesteps].tolist(), None)
    ours, scheduler = run("ddim", 20, START)
    theirs = theirs.double() * math.sqrt(1 + scheduler.sigmas[-1].item() ** 2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sampler", REFERENCES)
def test_both_kinds_of_prediction_draw_the_same(sampler):
    noise, velocity = (
        run(sampler, 12, START, seed=3, prediction=kind)[0] for kind in ("epsilon", "v_prediction")
    )
    torch.testing.assert_close(noise, velocity, atol=1e-4, rtol=0)


@COPY
def test_the_third_order_solver_of_diffusers_is_still_wrong():
    """When this fails, diffusers has mended its sign and `Dpmpp3mSde` can go."""
    sigmas = levels_of("karras", 30)
    reference = dpmpp_3m_sde(start_of(sigmas), sigmas, drawing(9))
    stock = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun", use_karras_sigmas=True,
        lower_order_final=False,
    )  # fmt: skip
    stock.set_timesteps(30)
    x = walk(stock, START, stock.sigmas[:-1].tolist(), torch.Generator().manual_seed(9))
    assert (x.double() - reference).abs().max() > 0.3


@pytest.mark.parametrize("sampler", REFERENCES)
def test_samples_follow_the_data(sampler):
    start = torch.randn((1, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    x = run(sampler, 50, start)[0]
    assert abs((x > 0.25).double().mean().item() - 0.5) < 0.05
    assert x[x > 0.25].mean().item() == pytest.approx(1.5, abs=0.1)
    assert x[x < 0.25].std().item() == pytest.approx(0.3, abs=0.08)


@COPY
@pytest.mark.parametrize("schedule", ["karras", "exponential", "ays", "plain"])
@pytest.mark.parametrize("sampler", REFERENCES)
def test_every_sampler_starts_from_noise_of_variance_one(sampler, schedule):
    """Stability AI's rule for SDXL, ComfyUI's and, with its leading spacing, that of diffusers'
    Euler."""
    schedule = "plain" if sampler == "ddim" else schedule
    scheduler = make_scheduler(sampler, schedule, CONFIG, 20)
    start = starting_latents(scheduler, START)
    torch.testing.assert_close(
        scheduler.scale_model_input(start, scheduler.timesteps[0]), START, rtol=1e-6, atol=0
    )
    factor = 1.0 if sampler in PRESERVING else math.sqrt(1 + 14.6146**2)
    torch.testing.assert_close(start, START * factor, rtol=1e-4, atol=0)
    stock = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    stock.set_timesteps(1000)
    if sampler not in PRESERVING:
        torch.testing.assert_close(start, START * stock.init_noise_sigma, rtol=1e-4, atol=0)


# --- what is refused
# -------------------------------------------------------------------------------------------------

ZERO = {**CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("sampler", REFERENCES)
def test_zero_terminal_snr_starts_from_pure_noise(sampler):
    scheduler = make_scheduler(sampler, "plain", ZERO, 20)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas[0] > 4000  # diffusers' stand-in for infinity
    assert make_scheduler(sampler, "plain", CONFIG, 20).sigmas[0] < 15


def test_what_cannot_be_sampled_is_refused_with_the_reason():
    with pytest.raises(EvaluationError, match=r"zero terminal SNR .* predicts the noise"):
        make_scheduler("euler", "plain", {**ZERO, "prediction_type": "epsilon"}, 20)
    with pytest.raises(
        EvaluationError, match=r'schedule="ays" is tabled for models that start at sigma 14.6'
    ):
        make_scheduler("euler", "ays", ZERO, 20)
    for schedule in ("karras", "exponential", "ays"):
        with pytest.raises(
            ConfigError, match=f'takes schedule="plain", not "{schedule}"; "euler" is the same'
        ):
            SamplingConfig(sampler="ddim", schedule=schedule)
    assert SamplingConfig(sampler="ddim", schedule="plain").schedule == "plain"


def test_labels_are_those_of_the_uis():
    assert label("dpmpp_2m", "karras") == "DPM++ 2M Karras"
    assert label("euler_a", "plain") == "Euler a"
    assert label("dpmpp_3m_sde", "ays") == "DPM++ 3M SDE Align Your Steps"
