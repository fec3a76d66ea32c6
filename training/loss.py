"""What the UNet is asked to predict, and how its error becomes one number per sample."""

from typing import Literal

import torch

PredictionType = Literal["epsilon", "v_prediction"]


def prediction_target(
    prediction_type: PredictionType,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    signal: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should say, `(B, 4, h, w)`: the noise, or the velocity `sqrt(a) * noise - sqrt(1 - a) * latents`.

    Source: velocity, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    share = signal[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * noise - (1 - share).sqrt() * latents


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error of each sample, `(B,)` fp32.

    Args:
        prediction: `(B, 4, h, w)`, any floating type.
        target: `(B, 4, h, w)` fp32.
        mask: Weight of each latent pixel, `(B, 1, h, w)` in [0, 1], or None for all 1. The sum is divided by the
            mask's own area, so that a masked sample counts as much as any other.
    """
    error = (prediction.float() - target).square()  # (B, 4, h, w)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    # A picture that is all watermark has weight 0 everywhere: the floor of one pixel makes its loss 0, not NaN.
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1.0)
    return (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / area


def min_snr_weights(
    timesteps: torch.Tensor, signal: torch.Tensor, gamma: float, prediction_type: PredictionType
) -> torch.Tensor:
    """Weight of each sample's loss, `(B,)` fp32: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    Args:
        timesteps: `(B,)` int64.
        signal: `alphas_cumprod`, `(T,)`.
        gamma: Cap of the signal-to-noise ratio; 0 gives weights of 1.
        prediction_type: What the UNet predicts.

    Source: min-SNR, arXiv:2303.09556, section 3.4; gamma = 5 there.
    """
    if gamma == 0:
        return torch.ones(len(timesteps), device=signal.device)
    share = signal[timesteps]
    snr = share / (1 - share)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
