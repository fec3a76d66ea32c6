"""The two solvers that diffusers has wrong or not without torchsde, with the methods that its
schedulers have.

Noise levels are sigmas, of images in the form x = data + sigma * noise; diffusers' DPM solvers
keep theirs divided by sqrt(1 + sigma^2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class Dpmpp3mSde(DPMSolverMultistepScheduler):
    """DPM++ 3M SDE: diffusers' solver of order 3 with the sign of its third-order term mended.

    diffusers 0.42 subtracts 1/2 where the integral of the second divided difference has + 1/2, and
    images get noisier with more steps. A test holds the stock solver to being wrong: when it no
    longer is, this class can go.
    """

    def multistep_dpm_solver_third_order_update(
        self,
        model_output_list: list[torch.Tensor],
        *args: Any,
        sample: torch.Tensor,
        noise: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One step from the last three estimates of the data, with fresh noise.

        Source: k-diffusion's sampler of this name, which carries the third order of
        arXiv:2211.01095, appendix B, over to the SDE. Like the code of that paper it gives the
        curvature half the weight that the integral has.
        """
        after, now, before, first = (
            self.sigmas[self.step_index + shift] for shift in (1, 0, -1, -2)
        )
        clean = 1 / (1 + after**2).sqrt()  # share of the data in the image after the step
        h, h_0, h_1 = (now / after).log(), (before / now).log(), (first / before).log()
        m_0, m_1, m_2 = reversed(model_output_list[-3:])
        slope, slope_before = (m_0 - m_1) * (h / h_0), (m_1 - m_2) * (h / h_1)
        r_0, r_1 = h_0 / h, h_1 / h
        curve = (slope - slope_before) / (r_0 + r_1)
        slope = slope + r_0 * curve
        phi_1 = -torch.expm1(-2 * h)
        phi_2 = 1 - phi_1 / (2 * h)
        phi_3 = phi_2 / (2 * h) - 0.5
        kept = clean * (after / now * torch.exp(-h)) * (1 + now**2).sqrt() * sample
        drawn = clean * after * phi_1.sqrt() * noise
        return kept + clean * (phi_1 * m_0 + phi_2 * slope - phi_3 * curve) + drawn


class DpmppSde:
    """DPM++ SDE: each step looks at its geometric middle first, and calls the UNet twice but for
    the last.

    The noise of the half step is part of that of the whole step, as on one Brownian path. Source:
    Lu et al., arXiv:2211.01095, algorithm 1 (r = 1/2), with ancestral noise as in k-diffusion's
    sampler of this name.
    """

    def __init__(self, sigmas: Sequence[float], prediction_type: str) -> None:
        """Walk down `sigmas`, of which the last is 0."""
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        middles = (self.sigmas[:-2] * self.sigmas[1:-1]).sqrt()
        self.levels = torch.cat(
            [torch.stack([self.sigmas[:-2], middles], dim=1).flatten(), self.sigmas[-2:-1]]
        )
        """Sigma of each call of the UNet, `(2 n - 1,)`."""
        self.timesteps = torch.empty(0)
        """Set by the maker: the trained timestep of each level."""
        self._prediction_type = prediction_type
        self._calls = 0
        self._start = self._half_noise = torch.empty(0)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet is shown, of variance 1."""
        scaled: torch.Tensor = sample / (1 + self.levels[self._calls] ** 2).sqrt()
        return scaled

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Latents as the first call is to see them."""
        return original_samples + self.sigmas[0] * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: list[torch.Generator],
    ) -> SchedulerOutput:
        """Go to the middle of a step, or from its start over the whole of it."""
        level = self.levels[self._calls]
        place, in_the_middle = divmod(self._calls, 2)
        self._calls += 1
        now, after = self.sigmas[place], self.sigmas[place + 1]
        if self._prediction_type == "epsilon":
            clean = sample - level * model_output
        else:
            clean = sample / (1 + level**2) - model_output * (level / (1 + level**2).sqrt())
        if after == 0:
            return SchedulerOutput(prev_sample=clean)
        noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
        )
        middle = (now * after).sqrt()
        if not in_the_middle:
            self._start, self._half_noise = sample, noise
            return SchedulerOutput(prev_sample=_ancestral(sample, clean, noise, now, middle))
        noise = (self._half_noise * (now - middle).sqrt() + noise * (middle - after).sqrt()) / (
            now - after
        ).sqrt()
        return SchedulerOutput(prev_sample=_ancestral(self._start, clean, noise, now, after))


def _ancestral(
    sample: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    now: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """From level `now` further down than to `after`, and up again with noise."""
    up = (after**2 * (now**2 - after**2) / now**2).sqrt()
    down = (after**2 - up**2).sqrt()
    return clean + (sample - clean) * (down / now) + noise * up
