"""The second pass of two-pass sampling: how large the image becomes, and what its first pass is
enlarged by.

Latents enlarged as they are blur and need a strength of 0.5 and more to recover; through pixels
they stay sharp. A1111's upscalers "Latent" and "Latent (bicubic antialiased)" are the first way,
its "Lanczos" and the upscaling networks the second; ComfyUI has both as LatentUpscale and as
decode, ImageScale and encode.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from training.buckets.geometry import Size
from training.config.evaluation import Enlarge, SecondPassConfig
from training.models.vae import Vae


def final_size(size: Size, config: SecondPassConfig | None, vae_scale: int) -> Size:
    """Size of the finished image, pixels: each side times the scale, rounded to whole latents.

    Args:
        size: Of the first pass, multiples of `vae_scale`.
        config: None for one pass alone.
        vae_scale: Pixels per latent along a side.
    """
    if config is None:
        return size
    return Size(*(max(round(side * config.scale / vae_scale), 1) * vae_scale for side in size))


def enlarge(latents: torch.Tensor, size: Size, how: Enlarge, vae: Vae) -> torch.Tensor:
    """Scaled latents of the enlarged images.

    Args:
        latents: `(B, C, h, w)` fp32, scaled.
        size: Wanted, pixels; multiples of `vae.scale`.
        how: In latents or through pixels.
        vae: Decodes and encodes; the mean of what it encodes is taken, so that nothing is drawn.
            Latents of an image that is not finite become NaN.
    """
    height, width = size.height // vae.scale, size.width // vae.scale
    if how == "latent":
        return functional.interpolate(latents, (height, width), mode="bilinear")
    if how == "latent_bicubic":
        return functional.interpolate(latents, (height, width), mode="bicubic", antialias=True)
    images = vae.decode_each(latents)
    large = [
        np.zeros((*size, 3), dtype=np.uint8)
        if image is None
        else np.asarray(
            Image.fromarray(image).resize((size.width, size.height), Image.Resampling.LANCZOS)
        )
        for image in images
    ]
    broken = torch.tensor([image is None for image in images], device=vae.device)
    encoded = vae.forward(vae.preprocess(large))[0]
    return encoded.masked_fill(broken[:, None, None, None], torch.nan)
