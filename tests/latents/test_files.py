import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training import commit, manifests
from training.buckets.geometry import Size
from training.errors import DamageError, DataError
from training.latents.files import BucketWriter, LatentFile, from_bfloat16, to_bfloat16
from training.tables.schemas import TABLES

BUCKET = Size(48, 32)
SHAPE = (4, 6, 4)


@pytest.fixture(params=["raw", "split-zstd"])
def codec(request):
    return request.param


def write(folder, count, *, max_bytes=1_000_000, log_variance=True, generation=3, codec="raw"):
    writer = BucketWriter(
        folder=folder,
        generation=generation,
        bucket=BUCKET,
        max_bytes=max_bytes,
        codec=codec,
        metadata={"vae": "v"},
    )
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, 2, *SHAPE), dtype=np.float32)
    for number, (latents, spread) in enumerate(values):
        writer.add(f"image{number}", latents, spread if log_variance else None)
    writer.finish()
    return writer, values


def check_rounding(array):
    expected = torch.tensor(array).to(torch.bfloat16)
    bits = to_bfloat16(array)
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(from_bfloat16(bits), expected.float().numpy())


@given(
    st.integers(0, 0x7F7E), st.booleans(), st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
)
def test_bfloat16_rounds_halves_to_even_as_torch_does(upper, negative, lower):
    bits = negative << 31 | upper << 16 | lower
    check_rounding(np.array([bits], dtype=np.uint32).view(np.float32))


@given(st.lists(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127), min_size=1))
def test_bfloat16_rounds_as_torch_does(values):
    check_rounding(np.array(values, dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_values_that_bfloat16_cannot_hold_are_refused(value):
    with pytest.raises(DataError, match="not finite in bfloat16"):
        to_bfloat16(np.array([0.0, value], dtype=np.float32))


def test_safetensors_reads_what_was_written(tmp_path):
    writer, values = write(tmp_path, 5)
    (entry,) = writer.entries
    assert entry.name == f"g0003-48x32-{entry.sha256[:8]}.safetensors"
    assert commit.sha256_file(tmp_path / entry.name) == entry.sha256
    tensors = load_file(tmp_path / entry.name)
    rounded = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(tensors["latents"], rounded[:, 0])
    assert torch.equal(tensors["log_variance"], rounded[:, 1])
    assert writer.places == {f"image{row}": (entry.name, row) for row in range(5)}


def test_files_written_by_safetensors_are_read(tmp_path):
    latents = torch.randn((3, *SHAPE)).to(torch.bfloat16)
    save_file({"latents": latents}, tmp_path / "foreign.safetensors")
    path = tmp_path / "foreign.safetensors"
    entry = manifests.Entry(
        name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size
    )
    file = LatentFile(tmp_path, entry)
    assert not file.has_log_variance
    rows, nothing = file.gather([2, 0, 2])
    assert nothing is None
    assert np.array_equal(rows, latents[[2, 0, 2]].view(torch.uint16).numpy())


def test_no_file_is_larger_than_the_limit_and_equal_input_gives_equal_bytes(tmp_path, codec):
    limit = 3000
    writer, values = write(tmp_path / "a", 20, max_bytes=limit, codec=codec)
    again, _ = write(tmp_path / "b", 20, max_bytes=limit, codec=codec)
    assert len(writer.entries) > 1
    assert all(entry.bytes <= max(limit, 1000) for entry in writer.entries)
    assert writer.entries == again.entries
    files = {entry.name: LatentFile(tmp_path / "a", entry) for entry in writer.entries}
    for number in range(20):
        name, row = writer.places[f"image{number}"]
        latents, spread = files[name].gather([row])
        assert np.array_equal(np.stack([latents[0], spread[0]]), to_bfloat16(values[number]))


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_grown(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_gone(path):
    path.unlink()


def damage_foreign(path):
    path.write_bytes(b"not a tensor in sight".ljust(path.stat().st_size, b"."))


def damage_shape(path):
    path.write_bytes(path.read_bytes().replace(b"[5,4,6,4]", b"[5,4,6,5]"))


def damage_name(path):
    path.write_bytes(path.read_bytes().replace(b'"latents', b'"lalents'))


def damage_codec(path):
    path.write_bytes(
        path.read_bytes().replace(b'"raw"', b'"zip"').replace(b'"split-zstd"', b'"split-bz-2"')
    )


def damage_header_length(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


DAMAGES = [
    damage_cut, damage_grown, damage_gone, damage_foreign, damage_shape, damage_name, damage_codec,
    damage_header_length,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_at_open(tmp_path, damage, codec):
    writer, _ = write(tmp_path, 5, codec=codec)
    damage(tmp_path / writer.entries[0].name)
    with pytest.raises(DamageError, match=writer.entries[0].name):
        LatentFile(tmp_path, writer.entries[0])


def test_a_file_whose_header_does_not_account_for_its_size_is_damage(tmp_path):
    writer, _ = write(tmp_path, 5)
    path = tmp_path / writer.entries[0].name
    damage_grown(path)
    entry = manifests.Entry(
        name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size
    )
    with pytest.raises(DamageError, match="bytes by its header"):
        LatentFile(tmp_path, entry)


def test_a_flipped_bit_is_noticed_before_the_first_row_is_used(tmp_path, codec):
    writer, _ = write(tmp_path, 5, codec=codec)
    path = tmp_path / writer.entries[0].name
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    file = LatentFile(tmp_path, writer.entries[0])
    with pytest.raises(DamageError, match="SHA-256"):
        file.gather([0])


def test_who_needs_a_file_while_it_is_checked_waits_for_that(tmp_path, monkeypatch):
    writer, _ = write(tmp_path, 5)
    file, whole = LatentFile(tmp_path, writer.entries[0]), commit.sha256_file
    asked, gate = [], threading.Event()

    def slow(path):
        asked.append(path.name)
        assert gate.wait(30)
        return whole(path)

    monkeypatch.setattr(commit, "sha256_file", slow)
    with ThreadPoolExecutor(2) as pool:
        checking = pool.submit(file.check)
        while not asked:
            time.sleep(0.001)
        reading = pool.submit(file.gather, [0])
        time.sleep(0.05)
        assert not reading.done()
        gate.set()
        checking.result()
        reading.result()
    assert asked == [writer.entries[0].name]
    assert LatentFile(tmp_path, writer.entries[0], checked=True).gather([1]) is not None
    assert len(asked) == 1


def test_a_row_that_is_not_there_is_damage(tmp_path):
    writer, _ = write(tmp_path, 5)
    with pytest.raises(DamageError, match="rows 0 to 5 by the table"):
        LatentFile(tmp_path, writer.entries[0]).gather([0, 5])


def commit_generation(folder, number, image_ids):
    rows = [
        {"image_id": image_id, "file": "f", "row": 0, "flip": False}
        | {
            name: 1
            for name, column in TABLES["latents"].columns.items()
            if column.dtype == pl.Int32
        }
        for image_id in image_ids
    ]
    entry = manifests.write_parquet(
        folder, f"g{number:04d}", pl.DataFrame(rows, schema=TABLES["latents"].schema)
    )
    manifest = manifests.Manifest(
        table="latents", part="s", version=1, files=(entry,), rows=len(rows), digest=f"d{number}"
    )
    manifests.commit_manifest(folder / f"g{number:04d}.json", manifest)


def test_two_files_that_changed_places_are_noticed(tmp_path, codec):
    writer, _ = write(tmp_path, 6, max_bytes=1200, codec=codec)
    a, b = (tmp_path / entry.name for entry in writer.entries[:2])
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(DamageError, match=writer.entries[0].name):
        LatentFile(tmp_path, writer.entries[0]).gather([0])


def rebuilt(path):
    """The file as it is now, under a manifest that agrees with it: only its content can be
    wrong."""
    return manifests.Entry(
        name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size
    )


def test_frames_and_offsets_that_are_wrong_though_the_digest_is_right_are_damage(tmp_path):
    writer, _ = write(tmp_path, 5, codec="split-zstd")
    path = tmp_path / writer.entries[0].name
    file = LatentFile(tmp_path, writer.entries[0])
    whole, header = path.read_bytes(), file._header
    for name, at, patch in (
        ("latents.exponent", 0, b"none"),  # no zstd frame
        ("latents.offsets", 8, (1 << 40).to_bytes(8, "little")),  # beyond the end
        ("latents.offsets", 8, (-5).to_bytes(8, "little", signed=True)),  # backwards
    ):
        start = file._start + header[name]["data_offsets"][0] + at
        path.write_bytes(whole[:start] + patch + whole[start + len(patch) :])
        with pytest.raises(DamageError, match=r"latents: (row|offsets)"):
            LatentFile(tmp_path, rebuilt(path)).gather([0])


def test_rows_are_copied_bit_for_bit_between_codecs(tmp_path, codec):
    writer, _ = write(tmp_path / "a", 4, codec="raw")
    means, spreads = LatentFile(tmp_path / "a", writer.entries[0]).gather([3, 1])
    copy = BucketWriter(
        folder=tmp_path / "b", generation=4, bucket=BUCKET, max_bytes=10_000, codec=codec
    )
    for number, image_id in enumerate(("image3", "image1")):
        copy.add_bits(image_id, means[number], spreads[number])
    copy.finish()
    file = LatentFile(tmp_path / "b", copy.entries[0])
    again = file.gather([0, 1])
    assert np.array_equal(again[0], means)
    assert np.array_equal(again[1], spreads)
    assert file.metadata == {"codec": codec}
    assert file.shape == (2, *SHAPE)


def test_the_header_says_what_the_writer_was_told(tmp_path, codec):
    writer, _ = write(tmp_path, 2, codec=codec, log_variance=False)
    file = LatentFile(tmp_path, writer.entries[0])
    assert file.metadata == {"codec": codec, "vae": "v"}
    assert not file.has_log_variance
    assert file.gather([1])[1] is None
    with safe_open(tmp_path / writer.entries[0].name, "np") as opened:
        assert opened.metadata() == file.metadata


def test_a_file_holds_nothing_open_until_its_first_row_is_asked_for(tmp_path):
    writer, _ = write(tmp_path, 300, max_bytes=1200)

    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    files = [LatentFile(tmp_path, entry) for entry in writer.entries]
    assert len(files) >= 100
    assert descriptors() == before
    files[0].gather([0])
    assert descriptors() == before + 1  # Python's mmap keeps one per map
