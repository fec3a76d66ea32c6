"""A model folder that cannot be used says which files, from where and how to fetch them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from training.errors import ModelError
from training.models import weights

ORIGIN = {"name": "tagger", "source": "https://hub/x", "command": "hf download x --local-dir m"}


def test_missing_files_are_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="tagger") as caught:
        weights.require(tmp_path, ["config.json", "model.safetensors", "sub/tags.txt"], **ORIGIN)
    message = str(caught.value)
    for part in ("model.safetensors, sub/tags.txt", str(tmp_path), "https://hub/x", "hf download x", "preset demo"):
        assert part in message
    assert "config.json" not in message
    assert "\n" not in message


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        weights.require(tmp_path / "nowhere", ["config.json"], **ORIGIN)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path, pickle):
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=f"{pickle}: pickles can run code"):
        weights.require(tmp_path, ["model.safetensors"], **ORIGIN)
    with pytest.raises(ModelError, match="pickle"):
        weights.read_tensors(tmp_path / pickle)


def test_git_lfs_pointers_are_no_weights(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=r"model.safetensors .* Git LFS pointers"):
        weights.require(tmp_path, ["model.safetensors"], **ORIGIN)


def test_a_complete_folder_passes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    weights.require(tmp_path, ["a/model.safetensors"], **ORIGIN)


def test_the_digest_follows_contents_and_names_and_nothing_else(tmp_path):
    folder = tmp_path / "a"
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "unet" / "w.safetensors").write_bytes(bytes(3 << 20))
    first = weights.model_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "b")
    (copy / "README.md").write_text("hello")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x.json").write_text("1")
    assert weights.model_digest(copy) == first
    (copy / "unet" / "w.safetensors").rename(copy / "unet" / "v.safetensors")
    assert weights.model_digest(copy) != first
    (copy / "unet" / "v.safetensors").rename(copy / "unet" / "w.safetensors")
    assert weights.model_digest(copy) == first
    with (copy / "unet" / "w.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert weights.model_digest(copy) != first
    with pytest.raises(ModelError, match="holds no"):
        weights.model_digest(copy / ".cache" / "none")


def test_state_must_match_one_to_one(tmp_path):
    module = torch.nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}
    with pytest.raises(
        ModelError, match=r"missing \(bias\).*unknown \(extra\).*\(weight \[3, 4\] instead of \[3, 2\]\)"
    ):
        weights.load_state(module, state, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shape", "cut"])
def test_a_library_model_is_never_filled_with_random_numbers(sd1_folder, tmp_path, damage):
    folder = shutil.copytree(sd1_folder / "text_encoder", tmp_path / "text_encoder")
    file = folder / "model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        value = state.pop(key)
        save_file(state | ({"shape": {key: value[:-1]}, "missing": {}}[damage]), file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="CLIPTextModel cannot" if damage == "cut" else "token_embedding"):
        weights.from_pretrained(CLIPTextModel, folder, "cpu")


def test_broken_json_and_safetensors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config.json holds a list"):
        weights.read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        weights.read_config(tmp_path / "config.json")
    (tmp_path / "w.safetensors").write_bytes(b"123456789")
    with pytest.raises(ModelError, match=r"w.safetensors cannot be read"):
        weights.read_tensors(tmp_path / "w.safetensors")


def test_weights_do_not_lie_in_the_file_where_its_header_would_decide_their_last_bits(sd1_folder):
    model = weights.from_pretrained(CLIPTextModel, sd1_folder / "text_encoder", "cpu")
    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}
