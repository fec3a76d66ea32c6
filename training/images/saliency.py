"""Which parts of an image stand out: what a crop had better keep, where no box says so."""

import numpy as np
from PIL import Image

_SIDE_PX = 64
_HEADROOM = 0.25
_FLAT = 2.0


def importance(pixels: np.ndarray) -> np.ndarray:
    """A map of what stands out, by the spectral residual of a small grey copy.

    The logarithm of a natural image's spectrum is smooth; what is left after smoothing is taken
    away belongs to what is unlike the rest. The upper part counts up to a quarter more and the
    lower as much less: a crop that must cut feet or heads cuts feet.

    Args:
        pixels: `(H, W, 3)` uint8, upright.

    Returns:
        `(h, w)` fp32 of sum 1, the longer side 64 or less; even where the image is flat.

    Source: Hou and Zhang, Saliency Detection: A Spectral Residual Approach, CVPR 2007, section 2.
    """
    from scipy import ndimage  # here: Dagster loads this module to draw the graph

    scale = _SIDE_PX / max(pixels.shape[:2])
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    small = np.asarray(
        Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BOX), dtype=np.float64
    )
    if small.std() < _FLAT:
        return np.full(small.shape, 1 / small.size, dtype=np.float32)
    spectrum = np.fft.fft2(small)
    log_amplitude = np.log(np.abs(spectrum) + 1e-8)
    residual = log_amplitude - ndimage.uniform_filter(log_amplitude, 3, mode="wrap")
    standing_out = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    smooth = ndimage.gaussian_filter(standing_out, 2.5, mode="nearest")
    smooth = (smooth - np.median(smooth)).clip(
        0
    ) + 1e-3 * smooth.max()  # half of an image is background
    weighted = smooth * np.linspace(1 + _HEADROOM, 1 - _HEADROOM, len(small))[:, None]
    return (weighted / weighted.sum()).astype(np.float32)
