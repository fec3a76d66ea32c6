"""Latents go out as kohya's files and come in again bit for bit; what does not fit is counted,
foreign ones refused."""

import csv
import gzip
import shutil
import struct

import numpy as np
import polars as pl
import pytest
from graph_tools import foundry

from training.latents.files import from_bfloat16
from training.latents.generations import read_generation


def generation(home, number):
    return read_generation(home / "latents" / "sdxl" / "s000000", number)


def values(found):
    files = found.open_files()
    return {
        row["image_id"]: files[row["file"]].gather([row["row"]])[0]
        for row in found.table().iter_rows(named=True)
    }


@pytest.fixture
def centred(small_copy):
    """The small workspace with centred crops, which kohya's trainers make."""
    config = small_copy / "foundry.toml"
    config.write_text(config.read_text().replace('crop = "random"', 'crop = "centre"'))
    foundry("run", "--home", small_copy, "--select", "latents")
    return small_copy


def test_what_went_out_comes_in_again_and_the_rest_is_encoded(centred, tmp_path):
    before = generation(centred, 2)
    was = values(before)
    arguments = (
        "latents",
        "import",
        str(tmp_path / "files" / "pictures"),
        "--encoding",
        "sdxl",
        "--home",
        centred,
    )
    done = foundry(
        "latents", "export", str(tmp_path / "files"), "--encoding", "sdxl", "--home", centred
    )
    assert f"wrote {before.manifest.rows} files" in done.stdout
    refused = foundry(*arguments, check=False)
    assert refused.returncode == 2
    assert "has latents already" in refused.stderr
    shutil.rmtree(centred / "latents")
    paths = sorted((tmp_path / "files" / "pictures").rglob("*.npz"))
    paths[0].unlink()
    paths[1].write_bytes(b"no archive")
    with np.load(paths[2]) as archive:
        other = {name: archive[name] for name in archive.files}
    np.savez(paths[2], **{**other, "original_size": other["original_size"] + 1})
    done = foundry(*arguments)
    assert f"imported {before.manifest.rows - 3} images into 1 shards" in done.stdout
    for reason in ("1 no_file", "1 unreadable", "1 other_original_size"):
        assert f"not imported: {reason}" in done.stdout
    foundry("run", "--home", centred, "--select", "latents")
    after = generation(centred, 2)
    assert (
        after.manifest.report["numbers"]["copied from the generation before"]
        == before.manifest.rows - 3
    )
    assert sorted(after.table()["encoded_in"].value_counts().rows()) == [
        (1, before.manifest.rows - 3),
        (2, 3),
    ]
    now = values(after)
    assert was.keys() == now.keys()
    assert sum((was[key] == now[key]).all() for key in was) >= before.manifest.rows - 3


def test_foreign_latents_are_refused_by_what_they_decode_to(centred, tmp_path):
    files = tmp_path / "files"
    foundry("latents", "export", str(files), "--encoding", "sdxl", "--home", centred)
    shutil.rmtree(centred / "latents")
    for path in (files / "pictures").rglob("*.npz"):
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        np.savez(path, **{**arrays, "latents": arrays["latents"][:, ::-1, ::-1] * 3})
    refused = foundry(
        "latents",
        "import",
        str(files / "pictures"),
        "--encoding",
        "sdxl",
        "--home",
        centred,
        check=False,
    )
    assert refused.returncode == 2
    assert "another VAE, another scale or other images" in refused.stderr
    assert not list((centred / "latents").glob("*/*/*.json"))


def test_bigasps_files_come_in_with_their_random_crops(small_copy, tmp_path):
    before = generation(small_copy, 1)
    bits = values(before)
    named = foundry(
        "sql",
        "--home",
        small_copy,
        "--format",
        "csv",
        "select image_id, source_id from selected_images",
    )
    names = dict(csv.reader(named.stdout.splitlines()[1:]))
    folder = tmp_path / "vaes"
    folder.mkdir()
    index = ["file,source_id"]
    for number, row in enumerate(before.table().iter_rows(named=True)):
        latents = from_bfloat16(bits[row["image_id"]][0])
        header = struct.pack(
            "<7I", number, row["original_height"], row["original_width"], row["crop_top"], row["crop_left"],
            *latents.shape[1:],
        )  # fmt: skip
        (folder / f"{number}.bin.gz").write_bytes(
            gzip.compress(header + latents.astype("<f2").tobytes())
        )
        index.append(f"{number}.bin.gz,{names[row['image_id']]}")
    (tmp_path / "index.csv").write_text("\n".join(index) + "\n")
    table = before.table()
    shutil.rmtree(small_copy / "latents")
    arguments = (
        "latents",
        "import",
        str(folder),
        "--encoding",
        "sdxl",
        "--format",
        "bigasp",
        "--home",
        small_copy,
    )
    refused = foundry(*arguments, check=False)
    assert refused.returncode == 2
    assert "--index CSV" in refused.stderr
    foundry(*arguments, "--index", str(tmp_path / "index.csv"))
    after = generation(small_copy, 1)
    columns = ["image_id", "crop_top", "crop_left", "resized_height", "resized_width"]
    assert (
        after.table()
        .select(columns)
        .sort("image_id")
        .equals(table.select(columns).sort("image_id"))
    )
    assert after.table().select(pl.col("encoded_in").unique()).rows() == [(1,)]
