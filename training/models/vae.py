"""AutoencoderKL: pixels to scaled latents and back. Encoding is in the precision asked for,
decoding never in 16 bits.

Latents are `(posterior mean - shift) * scaling`: for SD and SDXL shift is 0 and scaling 0.18215 or
0.13025, read from the VAE's config, never assumed. A bad image is reported in its own row; it does
not end its batch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.errors import ModelError
from training.models import pixels, weights

Precision = Literal["tf32", "fp32", "bf16"]

_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_BF16_SLACK = 0.25
"""Levels of 255 by which a reconstruction through bf16 may be worse than one through fp32, beside 5
% of the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """One image behind the VAE's encoder."""

    latents: np.ndarray
    """Scaled posterior mean, `(C, H/8, W/8)` fp32."""
    log_variance: np.ndarray | None
    """Log-variance of the *scaled* latents, same shape: a draw is `latents + exp(log_variance / 2)
    * noise`."""
    finite: bool
    """False when a value is NaN or infinite: such an image is rejected, never trained on."""


class Vae:
    """The adapter: batches of images of one size to rows of latents, and latents to images.

    The model given must be in fp32: SDXL's own VAE overflows in fp16.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        device: str | torch.device,
        *,
        precision: Precision = "fp32",
        tile_above_px: int | None = None,
    ) -> None:
        """Take a model to a device.

        Args:
            model: In fp32.
            device: Where it works.
            precision: Of encoding, and of decoding unless it is bf16, which decodes in fp32. `tf32`
                is fp32 on a device without TF32.
            tile_above_px: Images of more pixels are encoded in overlapping tiles; None for never.

        Raises:
            ModelError: the config's scaling factor is not positive.
        """
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        if self.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        self.precision: Precision = (
            "fp32" if precision == "tf32" and self.device.type != "cuda" else precision
        )
        """What encoding really uses."""
        self.tile_above_px = tile_above_px
        self.scale = scale_of(model)
        """Pixels per latent along a side."""
        channels = model.config.latent_channels
        scaling = model.config.scaling_factor
        if not scaling or scaling <= 0:
            raise ModelError(
                f"VAE: scaling_factor={scaling!r} in its config, but it must be positive"
            )
        self.scaling_factor = float(scaling)
        """What the posterior is multiplied by."""
        mean = (
            model.config.get("latents_mean") or [model.config.get("shift_factor") or 0.0] * channels
        )
        std = model.config.get("latents_std") or [1.0] * channels
        self.latents_mean = torch.tensor(mean, dtype=torch.float32, device=device).view(
            1, channels, 1, 1
        )
        self.factor = scaling / torch.tensor(std, dtype=torch.float32, device=device).view(
            1, channels, 1, 1
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str | torch.device,
        *,
        precision: Precision = "fp32",
        tile_above_px: int | None = None,
    ) -> "Vae":
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
        model = weights.from_pretrained(AutoencoderKL, folder, device)
        return cls(model, device, precision=precision, tile_above_px=tile_above_px)

    def preprocess(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """`(H, W, 3)` uint8 images of one size to `(B, 3, H, W)` fp32 in [-1, 1] on the device.

        They travel as bytes, a quarter of what fp32 would be; both sides must be multiples of
        `scale`.
        """
        for image in images:
            pixels.check_rgb(image)
            assert image.shape[0] % self.scale == 0, (image.shape, self.scale)
            assert image.shape[1] % self.scale == 0, (image.shape, self.scale)
        batch = (
            torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        )  # (B, 3, H, W) uint8
        return (
            batch.to(torch.float32, memory_format=torch.contiguous_format)
            .div(255)
            .sub(0.5)
            .div(0.5)
        )

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled mean and log-variance, each `(B, C, H/8, W/8)` fp32, of images `(B, 3, H, W)` in
        [-1, 1]."""
        self.model.use_tiling = (
            self.tile_above_px is not None and batch.shape[2] * batch.shape[3] > self.tile_above_px
        )
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            posterior = self.model.encode(batch.to(self.device)).latent_dist
        with torch.inference_mode():
            latents = (posterior.mean.float() - self.latents_mean) * self.factor
            return latents, posterior.logvar.float() + 2 * self.factor.log()

    def postprocess(
        self, latents: torch.Tensor, log_variance: torch.Tensor, *, with_log_variance: bool
    ) -> list[EncodedImage]:
        """One row per image of what `forward` returned; non-finite images are marked, not
        raised."""
        finite = torch.isfinite(latents).flatten(1).all(1)
        if with_log_variance:
            finite = finite & torch.isfinite(log_variance).flatten(1).all(1)
        means = latents.float().cpu().numpy()
        spreads = log_variance.float().cpu().numpy()
        return [
            EncodedImage(
                latents=means[row],
                log_variance=spreads[row] if with_log_variance else None,
                finite=bool(good),
            )
            for row, good in enumerate(finite.tolist())
        ]

    def __call__(
        self, images: Sequence[np.ndarray], *, with_log_variance: bool = False
    ) -> list[EncodedImage]:
        """Encode `(H, W, 3)` uint8 images of one size; one row per image."""
        return self.postprocess(
            *self.forward(self.preprocess(images)), with_log_variance=with_log_variance
        )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images `(B, H, W, 3)` uint8 of scaled latents `(B, C, H/8, W/8)`.

        Raises:
            ModelError: A latent or a decoded pixel is not finite: there is no image to show.
        """
        images = self.decode_each(latents)
        broken = [place for place, image in enumerate(images) if image is None]
        if broken:
            raise ModelError(
                f"VAE: decoding gave non-finite pixels for images {broken} of a batch of {len(images)}"
            )
        return np.stack([image for image in images if image is not None])

    def decode_each(self, latents: torch.Tensor) -> list[np.ndarray | None]:
        """Images `(H, W, 3)` uint8 of scaled latents `(B, C, H/8, W/8)`; None where a pixel is not
        finite."""
        with (
            torch.inference_mode(),
            arithmetic(self.device, "tf32" if self.precision == "tf32" else "fp32"),
        ):
            unscaled = latents.to(self.device, torch.float32) / self.factor + self.latents_mean
            decoded = self.model.decode(unscaled).sample  # (B, 3, H, W)
            finite = torch.isfinite(decoded).flatten(1).all(1).tolist()
            levels = (decoded.nan_to_num().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
        images = levels.permute(0, 2, 3, 1).cpu().numpy()
        return [image if good else None for image, good in zip(images, finite, strict=True)]

    def free_memory(self) -> None:
        """Give back what a batch that was too large has left behind."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check_bf16(self, images: Sequence[np.ndarray]) -> None:
        """Refuse bf16 where it costs quality: encode images both ways, decode both, compare with
        the images.

        Raises:
            ModelError: the reconstruction through bf16 is worse than through fp32 by more than 5 %
                and a quarter of a level, or not finite. The message gives both errors.
        """
        batch, errors = self.preprocess(images), {}
        asked = self.precision
        both: tuple[Precision, ...] = ("fp32", asked)
        for precision in both:
            self.precision = precision
            latents = self.forward(batch)[0]
            self.precision = asked
            finite = bool(torch.isfinite(latents).all())
            decoded = (
                self.decode(latents).astype(np.int16)
                if finite
                else np.full_like(np.stack(images), 255, np.int16)
            )
            errors[precision] = float(np.abs(decoded - np.stack(images)).mean())
        limit = errors["fp32"] * 1.05 + _BF16_SLACK
        if errors[asked] > limit:
            raise ModelError(
                f"VAE in {asked}: mean reconstruction error {errors[asked]:.2f} of 255, in fp32 {errors['fp32']:.2f}, "
                f'limit {limit:.2f}; set precision = "tf32" in the encoding'
            )


def scale_of(model: AutoencoderKL) -> int:
    """Pixels per latent along a side."""
    return int(2 ** (len(model.config.block_out_channels) - 1))


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Matrix products and convolutions in the precision; what was set before is set again
    afterwards."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32
    try:
        cuda.matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before
