import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from training.latents.codec import decode, encode


@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))))
def test_every_bit_comes_back(batch):
    """All of bfloat16: both zeros, subnormals, infinities and NaNs with their payloads."""
    mantissas, frames = zip(*(encode(bits) for bits in batch), strict=True)
    assert np.array_equal(decode(np.stack(mantissas), frames), batch)


def test_the_planes_are_what_the_format_says():
    # 1.5 = 0x3FC0: sign 0, exponent 127, mantissa 0b1000000; -1.5 has the sign in the lowest bit.
    mantissa, frame = encode(np.array([0x3FC0, 0xBFC0], dtype=np.uint16))
    assert mantissa.tolist() == [0b10000000, 0b10000001]
    assert zstandard.ZstdDecompressor().decompress(frame) == bytes([127, 127])


def test_exponents_of_latents_shrink_to_a_third():
    values = np.random.default_rng(0).normal(0, 0.8, (4, 128, 128)).astype(np.float32)
    mantissa, frame = encode((values.view(np.uint32) >> 16).astype(np.uint16))
    assert mantissa.nbytes == values.size
    # The entropy of a normal variable's exponent is about 2.5 bits of eight.
    assert 0.28 < len(frame) / values.size < 0.36


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (b"", "row 1 of the batch has no whole zstd frame"),
        (b"zstd?", "row 1 of the batch has no whole zstd frame"),
        (
            encode(np.zeros(5, dtype=np.uint16))[1][:-2],
            "row 1 of the batch has no whole zstd frame",
        ),
        (
            encode(np.zeros(4, dtype=np.uint16))[1],
            "row 1 of the batch holds 4 exponents for 5 values",
        ),
        (encode(np.zeros(50, dtype=np.uint16))[1], "row 1 of the batch"),
    ],
)
def test_a_frame_that_does_not_fit_is_an_error(frame, match):
    mantissa, good = encode(np.zeros(5, dtype=np.uint16))
    with pytest.raises(ValueError, match=match):
        decode(np.stack([mantissa, mantissa]), [good, frame])
