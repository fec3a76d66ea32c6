import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from training import commit
from training.data.geometry import Size
from training.data.latent_files import (
    BucketWriter,
    LatentFile,
    choose_generation,
    from_bfloat16,
    generations,
    to_bfloat16,
)
from training.data.tables import TABLES
from training.errors import DamageError, DataError

BUCKET = Size(48, 32)
SHAPE = (4, 6, 4)


def write(folder, count, *, max_bytes=1_000_000, log_variance=True, generation=3):
    writer = BucketWriter(folder=folder, generation=generation, bucket=BUCKET, max_bytes=max_bytes)
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


@given(st.integers(0, 0x7F7E), st.booleans(), st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]))
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
    entry = commit.Entry(name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size)
    file = LatentFile(tmp_path, entry)
    assert not file.has_log_variance
    rows, nothing = file.gather([2, 0, 2])
    assert nothing is None
    assert np.array_equal(rows, latents[[2, 0, 2]].view(torch.uint16).numpy())


def test_no_file_is_larger_than_the_limit_and_equal_input_gives_equal_bytes(tmp_path):
    limit = 3000
    writer, values = write(tmp_path / "a", 20, max_bytes=limit)
    again, _ = write(tmp_path / "b", 20, max_bytes=limit)
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
    path.write_bytes(path.read_bytes().replace(b'"latents"', b'"lalents"'))


@pytest.mark.parametrize("damage", [damage_cut, damage_grown, damage_gone, damage_foreign, damage_shape, damage_name])
def test_damage_is_named_at_open(tmp_path, damage):
    writer, _ = write(tmp_path, 5)
    damage(tmp_path / writer.entries[0].name)
    with pytest.raises(DamageError, match=writer.entries[0].name):
        LatentFile(tmp_path, writer.entries[0])


def test_a_file_whose_header_does_not_account_for_its_size_is_damage(tmp_path):
    writer, _ = write(tmp_path, 5)
    path = tmp_path / writer.entries[0].name
    damage_grown(path)
    entry = commit.Entry(name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size)
    with pytest.raises(DamageError, match="bytes by its header"):
        LatentFile(tmp_path, entry)


def test_a_flipped_bit_is_noticed_before_the_first_row_is_used(tmp_path):
    writer, _ = write(tmp_path, 5)
    path = tmp_path / writer.entries[0].name
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    file = LatentFile(tmp_path, writer.entries[0])
    with pytest.raises(DamageError, match="SHA-256"):
        file.gather([0])


def test_a_row_that_is_not_there_is_damage(tmp_path):
    writer, _ = write(tmp_path, 5)
    with pytest.raises(DamageError, match="rows 0 to 5 by the table"):
        LatentFile(tmp_path, writer.entries[0]).gather([0, 5])


def commit_generation(folder, number, image_ids):
    rows = [
        {"image_id": image_id, "file": "f", "row": 0, "flip": False}
        | {name: 1 for name, column in TABLES["latents"].columns.items() if column.dtype == pl.Int32}
        for image_id in image_ids
    ]
    entry = commit.write_parquet(folder, f"g{number:04d}", pl.DataFrame(rows, schema=TABLES["latents"].schema))
    manifest = commit.Manifest(
        table="latents", part="s", version=1, files=(entry,), rows=len(rows), digest=f"d{number}"
    )
    commit.commit_manifest(folder / f"g{number:04d}.json", manifest)


def test_the_highest_generation_that_holds_all_images_is_chosen(tmp_path):
    commit_generation(tmp_path, 1, ["a", "b", "c"])
    commit_generation(tmp_path, 2, ["a", "b"])
    commit_generation(tmp_path, 10, ["b"])
    (tmp_path / "g0011-abcdefgh.parquet").write_bytes(b"no manifest names me")
    assert generations(tmp_path) == [1, 2, 10]
    chosen = {}
    for wanted in ("b", "ab", "abc"):
        generation, missing = choose_generation(tmp_path, list(wanted))
        assert missing == 0
        chosen[wanted] = generation.number
    assert chosen == {"b": 10, "ab": 2, "abc": 1}
    assert choose_generation(tmp_path, ["a", "x", "y"]) == (None, 2)
    assert choose_generation(tmp_path / "nowhere", ["a", "b"]) == (None, 2)


def test_a_generation_whose_table_was_changed_is_damage(tmp_path):
    commit_generation(tmp_path, 1, ["a"])
    manifest = json.loads((tmp_path / "g0001.json").read_text())
    path = tmp_path / manifest["files"][0]["name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=path.name):
        choose_generation(tmp_path, ["a"])
