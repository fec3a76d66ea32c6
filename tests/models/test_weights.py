"""A model folder that cannot be used says which files, from where and how to fetch them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Owlv2ForObjectDetection,
)

from training.errors import ModelError
from training.models import weights

ORIGIN = {"name": "tagger", "source": "https://hub/x", "command": "hf download x --local-dir m"}


def test_missing_files_are_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="tagger") as caught:
        weights.require(tmp_path, ["config.json", "model.safetensors", "sub/tags.txt"], **ORIGIN)
    message = str(caught.value)
    for part in (
        "model.safetensors, sub/tags.txt",
        str(tmp_path),
        "https://hub/x",
        "hf download x",
        "preset demo",
    ):
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
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
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
        ModelError,
        match=r"missing \(bias\).*unknown \(extra\).*\(weight \[3, 4\] instead of \[3, 2\]\)",
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
        save_file(
            state | ({"shape": {key: value[:-1]}, "missing": {}}[damage]),
            file,
            metadata={"format": "pt"},
        )
    with pytest.raises(
        ModelError, match="CLIPTextModel cannot" if damage == "cut" else "token_embedding"
    ):
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


@pytest.fixture
def folder_of(sdxl_folder, sd1_folder, clip_folder, owlv2_folder):
    return {
        UNet2DConditionModel: sdxl_folder / "unet", AutoencoderKL: sd1_folder / "vae",
        CLIPTextModel: sd1_folder / "text_encoder", CLIPTextModelWithProjection: sdxl_folder / "text_encoder_2",
        CLIPModel: clip_folder, Owlv2ForObjectDetection: owlv2_folder,
    }  # fmt: skip


MODELS = [
    UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, CLIPModel, Owlv2ForObjectDetection,
]  # fmt: skip


def assert_same(ours, theirs):
    mine, its = (model.state_dict() | dict(model.named_buffers()) for model in (ours, theirs))
    assert list(mine) == list(its)
    for name, value in its.items():
        assert torch.equal(mine[name], value), name
        assert (mine[name].dtype, mine[name].stride()) == (value.dtype, value.stride())


@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_is_what_its_library_loads(folder_of, model_class):
    folder = folder_of[model_class]
    ours, theirs = (
        weights.from_pretrained(model_class, folder, "cpu"),
        model_class.from_pretrained(folder),
    )
    assert_same(ours, theirs)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    mine, its = (
        model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
        for model in (ours, theirs)
    )
    assert mine | {"_name_or_path": ""} == its | {"_name_or_path": ""}
    assert getattr(ours.config, "_attn_implementation", None) == getattr(
        theirs.config, "_attn_implementation", None
    )


@pytest.mark.parametrize("model_class", MODELS)
def test_half_precision_becomes_single_whatever_the_configuration_says(
    folder_of, tmp_path, model_class
):
    folder = shutil.copytree(folder_of[model_class], tmp_path / "half")
    (file,) = folder.glob("*.safetensors")
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(file).items()
    }
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts if "_class_name" not in config else ():
        part["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    whole = weights.from_pretrained(model_class, folder_of[model_class], "cpu").state_dict()
    for loaded in (
        weights.from_pretrained(model_class, folder, "cpu"),
        weights.build(model_class, folder),
    ):
        assert {
            value.dtype for value in loaded.state_dict().values() if value.is_floating_point()
        } == {torch.float32}
    for name, value in weights.from_pretrained(model_class, folder, "cpu").state_dict().items():
        assert torch.equal(value, whole[name].half().float())


def test_names_of_earlier_versions_are_read(folder_of, tmp_path):
    # SD 1.x's VAE as it was published, and a text encoder with and without the prefix that
    # transformers dropped.
    new = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    for model_class, patterns in (
        (
            AutoencoderKL,
            {rf"(attentions\.0)\.{name}\.": rf"\1.{old}." for name, old in new.items()},
        ),
        (CLIPTextModel, {r"^text_model\.": ""}),
        (CLIPTextModel, {r"^(text_model\.)?": "text_model."}),
    ):
        folder = shutil.copytree(
            folder_of[model_class], tmp_path / model_class.__name__, dirs_exist_ok=True
        )
        (file,) = folder.glob("*.safetensors")
        state = load_file(file)
        for pattern, replacement in patterns.items():
            state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
        save_file(
            state | {"text_model.embeddings.position_ids": torch.arange(77)},
            file,
            metadata={"format": "pt"},
        )
        theirs = model_class.from_pretrained(
            folder, **({"low_cpu_mem_usage": False} if len(patterns) > 1 else {})
        )
        assert_same(weights.from_pretrained(model_class, folder, "cpu"), theirs)


def test_a_model_that_is_built_has_no_memory_for_its_weights_and_all_else(folder_of):
    for model_class in MODELS:
        model = weights.build(model_class, folder_of[model_class])
        large = {
            name
            for name, value in model.named_parameters()
            if not value.is_meta and value.numel() > 100
        }
        assert not large
        assert not any(value.is_meta for value in model.buffers())
    with pytest.raises(ModelError, match=r"CLIPTextModel cannot be loaded from .*nowhere"):
        weights.build(CLIPTextModel, Path("/nowhere"))


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_goes_into_a_model_tensor_by_tensor(tmp_path, dtype):
    path, sizes = tmp_path / "model.safetensors", [(1024, 1024)] * 40  # 168 MB in fp32
    save_file(
        {f"{number}.weight": torch.ones(size, dtype=dtype) for number, size in enumerate(sizes)},
        path,
    )
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    with weights.Unfilled():
        model = torch.nn.Sequential(*(torch.nn.Linear(*size, bias=False) for size in sizes))
    state = weights.read_tensors(path)
    weights.load_state(model, state, path)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert num_bytes > 160e6
    assert resident("VmHWM") - before < 1.1 * num_bytes
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    assert all(bool((value == 1).all()) for value in state.values()), (
        "pages come back from the file"
    )
