"""AutoencoderKL: pixels to scaled latents and back, in fp32.

Latents are `(posterior mean - shift) * scaling`: for SD and SDXL shift is 0 and scaling 0.18215 or 0.13025, read from
the VAE's config, never assumed. A bad image is reported in its own row; it does not end its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.errors import ModelError
from training.models import pixels, weights

_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """One image behind the VAE's encoder."""

    latents: np.ndarray
    """Scaled posterior mean, `(C, H/8, W/8)` fp32."""
    log_variance: np.ndarray | None
    """Log-variance of the *scaled* latents, same shape: a draw is `latents + exp(log_variance / 2) * noise`."""
    finite: bool
    """False when a value is NaN or infinite: such an image is rejected, never trained on."""


class Vae:
    """The adapter: batches of images of one size to rows of latents, and latents to images.

    The model given must be in fp32: SDXL's own VAE overflows in half precision.
    """

    def __init__(self, model: AutoencoderKL, device: str | torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.scale = 2 ** (len(model.config.block_out_channels) - 1)
        """Pixels per latent along a side."""
        channels = model.config.latent_channels
        scaling = model.config.scaling_factor
        if not scaling or scaling <= 0:
            raise ModelError(f"VAE: scaling_factor={scaling!r} in its config, but it must be positive")
        mean = model.config.get("latents_mean") or [model.config.get("shift_factor") or 0.0] * channels
        std = model.config.get("latents_std") or [1.0] * channels
        self.latents_mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, channels, 1, 1)
        self.factor = scaling / torch.tensor(std, dtype=torch.float32, device=device).view(1, channels, 1, 1)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Vae":
        """Load `AutoencoderKL` from a folder in diffusers layout.

        Raises:
            ModelError: Files are missing or do not belong together.
        """
        weights.require(
            folder,
            _FILES,
            name="VAE AutoencoderKL",
            source="https://huggingface.co/madebyollin/sdxl-vae-fp16-fix",
            command=f"hf download madebyollin/sdxl-vae-fp16-fix {' '.join(_FILES)} --local-dir {folder}",
        )
        return cls(weights.from_pretrained(AutoencoderKL, folder, device), device)

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` uint8 to `(3, H, W)` fp32 in [-1, 1]; both sides must be multiples of `scale`."""
        pixels.check_rgb(image)
        assert image.shape[0] % self.scale == 0, (image.shape, self.scale)
        assert image.shape[1] % self.scale == 0, (image.shape, self.scale)
        return pixels.normalise(image, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled mean and log-variance, each `(B, C, H/8, W/8)` fp32, of images `(B, 3, H, W)` in [-1, 1]."""
        with torch.inference_mode():
            posterior = self.model.encode(batch.to(self.device)).latent_dist
            latents = (posterior.mean - self.latents_mean) * self.factor
            return latents, posterior.logvar + 2 * self.factor.log()

    def postprocess(
        self, latents: torch.Tensor, log_variance: torch.Tensor, *, with_log_variance: bool
    ) -> list[EncodedImage]:
        """One row per image of what `forward` returned; non-finite images are marked, not raised."""
        finite = torch.isfinite(latents).flatten(1).all(1)
        if with_log_variance:
            finite = finite & torch.isfinite(log_variance).flatten(1).all(1)
        means = latents.float().cpu().numpy()
        spreads = log_variance.float().cpu().numpy()
        return [
            EncodedImage(
                latents=means[row], log_variance=spreads[row] if with_log_variance else None, finite=bool(good)
            )
            for row, good in enumerate(finite.tolist())
        ]

    def __call__(self, images: Sequence[np.ndarray], *, with_log_variance: bool = False) -> list[EncodedImage]:
        """Encode `(H, W, 3)` uint8 images of one size; one row per image."""
        batch = torch.stack([self.preprocess(image) for image in images])
        return self.postprocess(*self.forward(batch), with_log_variance=with_log_variance)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images `(B, H, W, 3)` uint8 of scaled latents `(B, C, H/8, W/8)`.

        Raises:
            ModelError: A latent or a decoded pixel is not finite: there is no picture to show.
        """
        with torch.inference_mode():
            unscaled = latents.to(self.device, torch.float32) / self.factor + self.latents_mean
            decoded = self.model.decode(unscaled).sample  # (B, 3, H, W)
        broken = (~torch.isfinite(decoded).flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            raise ModelError(f"VAE: decoding gave non-finite pixels for images {broken} of a batch of {len(decoded)}")
        levels = (decoded.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()
