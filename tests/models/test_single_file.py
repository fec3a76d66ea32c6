"""A model that comes as one file is the same model, bit for bit, as its folder."""

import json
import shutil

import pytest
import torch
from original_names import original_tensors, write_single_file
from safetensors.torch import save_file

from training.errors import ModelError
from training.models.base_model import inspect
from training.models.text_encoders import encode_sdxl
from training.models.unet import load_pipeline_parts
from training.models.weights import model_digest

FAMILIES = ["sdxl", "sd1"]


@pytest.fixture
def folder_of(sdxl_folder, sd1_folder):
    return {"sdxl": sdxl_folder, "sd1": sd1_folder}


@pytest.fixture
def write(tmp_path, folder_of):
    """`write(family)`: a single file beside a folder that has configurations and tokenizers
    only."""

    def make(family, **extra):
        path = tmp_path / "photo-1.0.safetensors"
        write_single_file(load_pipeline_parts(folder_of[family], "cpu"), path, **extra)
        skip = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(folder_of[family], tmp_path / "photo-1.0", ignore=skip, dirs_exist_ok=True)
        return path

    return make


def states(parts):
    modules = [parts.unet, parts.vae, *parts.text_encoders]
    return {
        f"{number}.{key}": value
        for number, m in enumerate(modules)
        for key, value in m.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_the_folder_bit_for_bit(folder_of, write, family):
    theirs, ours = (
        load_pipeline_parts(folder_of[family], "cpu"),
        load_pipeline_parts(write(family), "cpu"),
    )
    before, after = states(theirs), states(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ours.family == family
    assert ours.noise_scheduler_config == theirs.noise_scheduler_config
    assert [len(tokenizer) for tokenizer in ours.tokenizers] == [
        len(tokenizer) for tokenizer in theirs.tokenizers
    ]
    assert ours.unet.config.cross_attention_dim == theirs.unet.config.cross_attention_dim
    for module in (ours.unet, ours.vae, *ours.text_encoders):
        assert not module.training
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float32, False)}


def test_the_pooled_text_is_multiplied_by_the_files_projection_as_openclip_does(write):
    path = write("sdxl")
    parts = load_pipeline_parts(path, "cpu")
    ids = torch.full((2, 1, 77), 519)
    ids[:, 0, :5] = torch.tensor([[518, 3, 4, 5, 519], [518, 9, 8, 519, 519]])
    pooled = encode_sdxl(*parts.text_encoders, ids, ids).pooled
    encoder = parts.text_encoders[1]
    last = encoder.text_model.final_layer_norm(
        encoder.text_model(ids[:, 0], output_hidden_states=True).hidden_states[-1]
    )
    projection = original_tensors(parts)[
        "conditioner.embedders.1.model.text_projection"
    ]  # (width, projection)
    at_the_end = torch.stack([last[0, 4], last[1, 3]])
    torch.testing.assert_close(pooled, at_the_end @ projection)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_of_the_headers_is_what_the_folder_says(folder_of, write, family):
    assert inspect(write(family)) == inspect(folder_of[family])


def test_markers_of_the_schedule_are_read(write):
    path = write("sdxl", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    config = load_pipeline_parts(path, "cpu").noise_scheduler_config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert inspect(path)["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_files_are_loaded_in_single(write, folder_of, family):
    parts = load_pipeline_parts(folder_of[family], "cpu")
    path = write(family)
    for config in path.with_suffix("").glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    halves = {
        name: v.half().contiguous() if v.is_floating_point() else v
        for name, v in original_tensors(parts).items()
    }
    save_file(halves, path)
    for key, value in states(load_pipeline_parts(path, "cpu")).items():
        assert value.dtype == states(parts)[key].dtype
        assert torch.equal(value, states(parts)[key].half().float())


def test_the_digest_follows_weights_and_configurations_and_not_the_name(write, tmp_path):
    path = write("sd1")
    first = model_digest(path)
    path.rename(tmp_path / "other.safetensors")
    (tmp_path / "photo-1.0").rename(tmp_path / "other")
    assert model_digest(tmp_path / "other.safetensors") == first
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text("{}")
    changed = model_digest(tmp_path / "other.safetensors")
    assert changed != first
    with (tmp_path / "other.safetensors").open("ab") as file:
        file.write(b"\0")
    assert model_digest(tmp_path / "other.safetensors") not in (first, changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"missing \(.*conv_in"), ("family", "of family sdxl, but the configurations .* are of sd1"),
        ("configs", "photo-1.0 with its configurations and tokenizers is missing: run `hf download"),
        ("gone", "does not exist"), ("other", "no whole SDXL or SD 1.x model"), ("text", "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_say_why(write, folder_of, damage, message):
    path = write("sdxl")
    tensors = original_tensors(load_pipeline_parts(folder_of["sdxl"], "cpu"))
    if damage == "cut":
        del tensors["model.diffusion_model.input_blocks.0.0.weight"]
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    elif damage == "family":
        shutil.rmtree(path.with_suffix(""))
        shutil.copytree(folder_of["sd1"], path.with_suffix(""))
    elif damage == "configs":
        shutil.rmtree(path.with_suffix(""))
    elif damage == "gone":
        path.unlink()
    elif damage == "other":
        save_file({"lora_unet_mid.alpha": torch.zeros(1)}, path)
    else:
        path.write_text("<!doctype html>")
    with pytest.raises(ModelError, match=message):
        load_pipeline_parts(path, "cpu")
    if damage != "cut":
        with pytest.raises(ModelError) if damage != "family" else pytest.MonkeyPatch.context():
            inspect(path)
