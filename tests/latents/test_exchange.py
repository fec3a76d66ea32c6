"""Files of other trainers, written here byte by byte as their tools write them, and what does not
fit an image."""

import gzip
import io
import struct

import numpy as np
import pytest

from training.buckets.geometry import Placement, Size
from training.errors import DataError
from training.latents.exchange import (
    Refusal,
    fit,
    kohya_name,
    kohya_stem,
    read_bigasp,
    read_kohya,
    write_kohya,
)

FACTOR = 0.13025
# 300 high, 500 wide, into 128 x 192: resized to 128 x 213, cut by ten columns on the left.
PLACEMENT = Placement(Size(300, 500), Size(128, 213), 0, 10, Size(128, 192), False)
LATENTS = np.random.default_rng(0).normal(0, 0.9, (4, 16, 24)).astype(np.float32)


def test_a_kohya_file_has_width_first_and_unscaled_values(tmp_path):
    buffer = io.BytesIO()
    write_kohya(buffer, LATENTS, PLACEMENT, FACTOR)
    path = tmp_path / "x.npz"
    path.write_bytes(buffer.getvalue())
    with np.load(path) as archive:
        assert archive["original_size"].tolist() == [500, 300]
        assert archive["crop_ltrb"].tolist() == [10, 0, 202, 128]
        assert archive["latents"].dtype == np.float32
        np.testing.assert_allclose(archive["latents"] * FACTOR, LATENTS, rtol=1e-6)
    foreign = read_kohya(path, FACTOR)
    assert foreign.original == Size(300, 500)
    assert (foreign.crop_top, foreign.crop_left) == (None, None), (
        "its crop_ltrb is of no use (sd-scripts issue 1443)"
    )
    np.testing.assert_allclose(foreign.latents, LATENTS, rtol=1e-6)


def test_a_mirrored_images_file_has_the_crop_that_is_seen():
    buffer = io.BytesIO()
    write_kohya(buffer, LATENTS, PLACEMENT._replace(flip=True), FACTOR)
    buffer.seek(0)
    with np.load(buffer) as archive:  # 213 wide, of which 10 and 192 leave 11 on the other side
        assert archive["crop_ltrb"].tolist() == [11, 0, 203, 128]


def test_names_lead_to_images_and_back():
    assert kohya_name("a/b", Size(1216, 832), sdxl=True) == "a/b_0832x1216_sdxl.npz"
    for name in ("a/b_0832x1216_sdxl.npz", "a/b_0832x1216_sd.npz", "a/b.npz"):
        assert kohya_stem(name) == "a/b"
    assert kohya_stem("a/b_12x9_sdxl.npz") == "a/b_12x9_sdxl"
    assert kohya_stem("a/b.png") is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mended", [False, True])
def test_bigasps_header_calls_the_height_its_width(tmp_path, version, mended):
    placed = (500, 300, 10, 0) if mended else (300, 500, 0, 10)
    header = struct.pack("<6I", *placed, 16, 24)
    path = tmp_path / "1.bin.gz"
    front = struct.pack("<I", 77) if version == 1 else b""
    path.write_bytes(gzip.compress(front + header + LATENTS.astype("<f2").tobytes()))
    foreign = read_bigasp(path, Size(300, 500))
    assert (foreign.original, foreign.crop_top, foreign.crop_left) == (Size(300, 500), 0, 10)
    np.testing.assert_array_equal(foreign.latents, LATENTS.astype(np.float16).astype(np.float32))
    assert fit(foreign, PLACEMENT._replace(crop_left=11), 8) == PLACEMENT


JUNK = [
    b"", b"PK\x03\x04 not whole", gzip.compress(b"too short"),
    gzip.compress(struct.pack("<7I", *range(7)) + bytes(99)),
]  # fmt: skip


@pytest.mark.parametrize("content", JUNK)
def test_what_is_no_such_file_is_named(tmp_path, content):
    path = tmp_path / "strange.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"strange\.npz"):
        read_kohya(path, FACTOR)
    with pytest.raises(DataError, match=r"strange\.npz"):
        read_bigasp(path, Size(1, 1))
    np.savez(
        tmp_path / "evil.npz",
        latents=np.array([{"a": 1}], dtype=object),
        original_size=np.array([1, 1]),
    )
    with pytest.raises(DataError, match=r"evil\.npz"):
        read_kohya(tmp_path / "evil.npz", FACTOR)


def test_every_misfit_has_its_reason(tmp_path):
    path = tmp_path / "x.npz"
    with path.open("wb") as file:
        write_kohya(file, LATENTS, PLACEMENT, FACTOR)
    foreign = read_kohya(path, FACTOR)
    centred = PLACEMENT._replace(crop_left=10)
    assert fit(foreign, centred, 8) == centred
    assert fit(foreign, centred._replace(flip=True), 8) is Refusal.MIRRORED_OR_PADDED
    assert fit(foreign, centred._replace(original=Size(500, 300)), 8) is Refusal.OTHER_SIZE
    assert (
        fit(foreign, centred._replace(bucket=Size(192, 128), resized=Size(192, 320)), 8)
        is Refusal.OTHER_BUCKET
    )
    assert fit(foreign, centred._replace(resized=Size(100, 192)), 8) is Refusal.MIRRORED_OR_PADDED
    broken = type(foreign)(
        latents=foreign.latents * np.nan, original=foreign.original, crop_top=0, crop_left=0
    )
    assert fit(broken, centred, 8) is Refusal.NOT_FINITE
    beyond = type(foreign)(
        latents=foreign.latents, original=foreign.original, crop_top=0, crop_left=22
    )
    assert fit(beyond, centred, 8) is Refusal.OTHER_CROP
