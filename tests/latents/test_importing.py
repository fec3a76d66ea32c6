"""Whose each latent file of another trainer is."""

import pytest

from training.errors import ConfigError
from training.latents.importing import find_files


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_kohyas_names_tell_the_image(tmp_path):
    touch(tmp_path, "a_1024x0768_sdxl.npz", "deep/b.c_0512x0512_sdxl.npz", "notes.txt", "d.npy")
    found = find_files(tmp_path, "kohya", None)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()} == {
        "a": "a_1024x0768_sdxl.npz",
        "deep/b.c": "deep/b.c_0512x0512_sdxl.npz",
    }


def test_an_index_tells_it_where_names_do_not(tmp_path):
    touch(tmp_path, "17.gz", "18.gz")
    index = tmp_path / "index.csv"
    index.write_text("file,source_id\n17.gz,x/one.jpg\n18.gz,two.png\n19.gz,three.png\n")
    found = find_files(tmp_path, "bigasp", index)
    assert {name: path.name for name, path in found.items()} == {
        "x/one.jpg": "17.gz",
        "two.png": "18.gz",
    }


def test_what_cannot_tell_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        find_files(tmp_path / "nowhere", "kohya", None)
    with pytest.raises(ConfigError, match="--index CSV with columns file,source_id"):
        find_files(tmp_path, "bigasp", None)
    index = tmp_path / "index.csv"
    index.write_text("path,id\n17.gz,one.jpg\n")
    with pytest.raises(ConfigError, match=r"index\.csv"):
        find_files(tmp_path, "bigasp", index)
