"""From 8-bit pixels to the normalised tensors that the vision models were trained on."""

from collections.abc import Sequence

import numpy as np
import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_rgb(image: np.ndarray) -> None:
    """Assert `(H, W, 3)` uint8 with at least one pixel: only a bug upstream can bring anything
    else."""
    assert image.dtype == np.uint8, image.dtype
    assert image.ndim == 3, image.shape
    assert image.shape[2] == 3, image.shape
    assert image.size > 0, image.shape


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """`(H, W, 3)` uint8 to `(3, H, W)` fp32: scaled to [0, 1], minus `mean`, divided by `std` per
    channel."""
    scaled = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    )  # (3, H, W)
    return (
        (scaled - torch.tensor(mean).view(3, 1, 1))
        .div(torch.tensor(std).view(3, 1, 1))
        .contiguous()
    )
