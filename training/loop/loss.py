"""What the UNet is asked to predict, and how its error becomes one number per sample."""

from typing import Literal

import torch

from training.config.run import RULES_VERSION, LossConfig
from training.errors import TrainingError
from training.models.noise_schedules import NO_WEIGHT

PredictionType = Literal["epsilon", "v_prediction"]


def prediction_target(
    prediction_type: PredictionType,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    signal: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should say, `(B, 4, h, w)`: the noise, or the velocity `sqrt(a) * noise -
    sqrt(1 - a) * latents`.

    Source: velocity, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    share = signal[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * noise - (1 - share).sqrt() * latents


def mse_per_sample(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared error of each sample, `(B,)` fp32.

    Args:
        prediction: `(B, 4, h, w)`, any floating type.
        target: `(B, 4, h, w)` fp32.
        mask: Weight of each latent pixel, `(B, 1, h, w)` in [0, 1], or None for all 1. The sum is
            divided by the mask's own area, so that a masked sample counts as much as any other.
    """
    error = (prediction.float() - target).square()  # (B, 4, h, w)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    # An image that is all watermark has weight 0 everywhere: the floor of one pixel makes its loss
    # 0, not NaN.
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1.0)
    return (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / area


def timestep_weights(
    config: LossConfig,
    signal: torch.Tensor,
    prediction_type: PredictionType,
    rules_version: int = RULES_VERSION,
) -> torch.Tensor:
    """The weight of a loss at each timestep, `(T,)` fp32; weights are not normalised.

    For epsilon: `min_snr` min(SNR, gamma) / SNR, `debiased` 1 / sqrt(min(SNR, 1000)), `p2` (1 +
    SNR)^-gamma. For v: `min_snr` min(SNR, gamma) / (SNR + 1), `debiased` 1 / (min(SNR, 1000) + 1),
    `p2` as for epsilon.

    Args:
        config: Which, and its gamma.
        signal: `alphas_cumprod`, `(T,)`.
        prediction_type: What the UNet predicts.
        rules_version: Of the run.

    Raises:
        TrainingError: the schedule ends without signal, and `min_snr` would never learn its last
            step.

    Source: min-SNR arXiv:2303.09556 section 3.4, debiased arXiv:2310.08442, P2 arXiv:2204.00227;
    what they leave open for v is decided in docs/decisions/0013.
    """
    if config.weighting == "min_snr" and signal[-1] <= 0:
        raise TrainingError(NO_WEIGHT)
    snr = signal / (1 - signal)
    noise_to_predict = prediction_type == "epsilon"
    if config.weighting == "min_snr":
        return snr.clamp(max=config.min_snr_gamma) / (snr if noise_to_predict else snr + 1)
    if config.weighting == "debiased":
        # The cap, kohya's, keeps the cleanest steps from having next to no weight.
        capped = snr.clamp(max=1000)
        if noise_to_predict:
            return capped.rsqrt()
        return 1 / ((capped if rules_version > 1 else snr) + 1)
    if config.weighting == "p2":
        return (1 + snr) ** -config.p2_gamma
    return torch.ones_like(signal)
