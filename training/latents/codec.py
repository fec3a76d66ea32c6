"""`split-zstd`: bfloat16 without loss in about two thirds of its bytes.

Rotated left by one bit, a bfloat16 is one byte of exponent and one of mantissa and sign. The latter
is noise and is kept as it is; exponents of latents have about 2.5 bits of entropy, which is what
zstd's Huffman stage leaves of them.
"""

from collections.abc import Sequence

import numpy as np
import zstandard

# Matches of exponents are chance: a long shortest match leaves the entropy coder alone, which is
# faster and smaller (benchmarks/bench_latents.py: 0.665 of raw and 1.5 GB/s, against 0.69 and 0.5
# GB/s of zstd's level 3).
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, strategy=zstandard.STRATEGY_FAST, hash_log=6, chain_log=6, window_log=17
)


def encode(bits: np.ndarray) -> tuple[np.ndarray, bytes]:
    """One image's bfloat16 bits as its mantissa plane and its compressed exponent plane.

    Args:
        bits: uint16, any shape.

    Returns:
        uint8 of that shape, mantissa in the high seven bits and sign in the lowest; and a zstd
        frame of as many bytes.
    """
    rotated = (bits << np.uint16(1)) | (bits >> np.uint16(15))
    exponent = (rotated >> np.uint16(8)).astype(np.uint8)
    return rotated.astype(np.uint8), zstandard.ZstdCompressor(
        compression_params=_PARAMETERS
    ).compress(exponent.tobytes())


def decode(mantissa: np.ndarray, frames: Sequence[bytes | memoryview]) -> np.ndarray:
    """The bits that `encode` took apart.

    Args:
        mantissa: `(B, ...)` uint8.
        frames: B compressed exponent planes.

    Returns:
        `(B, ...)` uint16.

    Raises:
        ValueError: a frame is no zstd frame, or holds another number of exponents than its mantissa
            plane.
    """
    decompressor, size = zstandard.ZstdDecompressor(), mantissa[0].size if len(mantissa) else 0
    planes = np.empty((len(mantissa), size), dtype=np.uint8)
    for row, frame in enumerate(frames):
        try:
            plane = decompressor.decompress(frame, max_output_size=size)
        except zstandard.ZstdError as error:
            raise ValueError(f"row {row} of the batch has no whole zstd frame ({error})") from None
        if len(plane) != size:
            raise ValueError(
                f"row {row} of the batch holds {len(plane)} exponents for {size} values"
            )
        planes[row] = np.frombuffer(plane, dtype=np.uint8)
    rotated = (planes.reshape(mantissa.shape).astype(np.uint16) << np.uint16(8)) | mantissa
    return (rotated >> np.uint16(1)) | (rotated << np.uint16(15))
