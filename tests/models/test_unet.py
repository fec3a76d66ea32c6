"""A model folder goes round unchanged, diffusers reads what we write, and mixed folders are
refused."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from training.errors import ConfigError, ModelError
from training.loop.noise import alphas_cumprod
from training.models.saving import save_diffusers_folder
from training.models.unet import load_pipeline_parts, read_weights, with_schedule

FAMILIES = [("sdxl", StableDiffusionXLPipeline), ("sd1", StableDiffusionPipeline)]


@pytest.fixture
def folder_of(sdxl_folder, sd1_folder):
    return {"sdxl": sdxl_folder, "sd1": sd1_folder}


def states(parts):
    modules = {"unet": parts.unet, "vae": parts.vae}
    modules |= {f"text_encoder_{n}": encoder for n, encoder in enumerate(parts.text_encoders)}
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("family", "pipeline"), FAMILIES)
def test_a_folder_goes_round_unchanged(folder_of, tmp_path, family, pipeline):
    parts = load_pipeline_parts(folder_of[family], "cpu")
    assert parts.family == family
    assert len(parts.text_encoders) == len(parts.tokenizers) == (2 if family == "sdxl" else 1)
    save_diffusers_folder(parts, tmp_path / "saved", torch.float32)
    again = load_pipeline_parts(tmp_path / "saved", "cpu")
    assert_equal_states(states(parts), states(again))
    assert again.noise_scheduler_config == parts.noise_scheduler_config
    for before, after in zip(parts.tokenizers, again.tokenizers, strict=True):
        assert (
            after("a red cat", padding="max_length").input_ids
            == before("a red cat", padding="max_length").input_ids
        )


@pytest.mark.parametrize(("family", "pipeline"), FAMILIES)
def test_diffusers_draws_the_same_from_the_saved_folder(folder_of, tmp_path, family, pipeline):
    save_diffusers_folder(load_pipeline_parts(folder_of[family], "cpu"), tmp_path, torch.float32)
    pictures = []
    for folder in (folder_of[family], tmp_path):
        pipe = pipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(
            pipe(
                "red cat",
                height=32,
                width=32,
                num_inference_steps=2,
                generator=generator,
                output_type="np",
            ).images
        )
    assert (pictures[0] == pictures[1]).all()


def test_half_precision_halves_the_file_and_leaves_the_model_as_it_is(sdxl_folder, tmp_path):
    parts = load_pipeline_parts(sdxl_folder, "cpu")
    before = {key: value.clone() for key, value in states(parts).items()}
    save_diffusers_folder(parts, tmp_path, torch.float16)
    assert_equal_states(before, states(parts))
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    again = states(load_pipeline_parts(tmp_path, "cpu"))
    assert all(torch.equal(before[key].half().float(), again[key]) for key in before)
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path).text_encoder.dtype == torch.float16


def test_text_encoders_are_written_under_the_names_that_all_readers_know(sdxl_folder, tmp_path):
    save_diffusers_folder(load_pipeline_parts(sdxl_folder, "cpu"), tmp_path, torch.float32)
    first = load_file(tmp_path / "text_encoder" / "model.safetensors")
    second = load_file(tmp_path / "text_encoder_2" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in first)
    assert {key for key in second if not key.startswith("text_model.")} == {
        "text_projection.weight"
    }


def test_loaded_parts_are_frozen(sd1_folder):
    parts = load_pipeline_parts(sd1_folder, "cpu")
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_weights_beyond_half_precision_are_not_saved_as_infinity(sd1_folder, tmp_path):
    parts = load_pipeline_parts(sd1_folder, "cpu")
    parts.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ModelError, match=r"conv_in.weight .*leaves the range of torch.float16"):
        save_diffusers_folder(parts, tmp_path, torch.float16)


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ("text_encoder", "cross_attention_dim=48 but text encoders' widths=64"),
        ("vocabulary", "tokenizer has 520 words but its encoder 100"),
        ("prediction", "prediction_type='sample'"),
        ("second", "has two text encoders|neither SDXL"),
    ],
)
def test_mixed_folders_are_refused_before_use(sdxl_folder, tmp_path, swap, message):
    folder = shutil.copytree(sdxl_folder, tmp_path / "mixed")
    if swap == "text_encoder":
        shutil.copytree(folder / "text_encoder_2", folder / "text_encoder", dirs_exist_ok=True)
        shutil.copy(without_projection(folder), folder / "text_encoder" / "model.safetensors")
    elif swap == "vocabulary":
        shrink_vocabulary(folder / "text_encoder", 100)
    elif swap == "prediction":
        change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    else:
        change(folder / "model_index.json", text_encoder_2=None)
    with pytest.raises(ModelError, match=message):
        load_pipeline_parts(folder, "cpu")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_projection(folder):
    from safetensors.torch import save_file

    state = load_file(folder / "text_encoder_2" / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "cut.safetensors", metadata={"format": "pt"})
    return folder / "cut.safetensors"


def shrink_vocabulary(folder, size):
    from safetensors.torch import save_file

    change(folder / "config.json", vocab_size=size)
    state = load_file(folder / "model.safetensors")
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    state[key] = state[key][:size].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_part_says_which_file_and_how_to_fetch_it(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "cut")
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"missing text_encoder_2/model.safetensors in .*hf download"
    ):
        load_pipeline_parts(folder, "cpu")
    with pytest.raises(ModelError, match="no such folder"):
        load_pipeline_parts(tmp_path / "nowhere", "cpu")


def test_zero_terminal_snr_is_algorithm_1_and_recorded_for_samplers(sd1_folder, tmp_path):
    parts = load_pipeline_parts(sd1_folder, "cpu")
    before = alphas_cumprod(parts.noise_scheduler_config).double().sqrt()
    changed = with_schedule(parts, "base", zero_terminal_snr=True)
    # arXiv:2305.08891, algorithm 1: shift so that the last is 0, scale so that the first stays.
    expected = ((before - before[-1]) * before[0] / (before[0] - before[-1])).square()
    torch.testing.assert_close(
        alphas_cumprod(changed.noise_scheduler_config).double(), expected, rtol=1e-4, atol=1e-7
    )
    assert alphas_cumprod(changed.noise_scheduler_config)[-1] == 0
    save_diffusers_folder(changed, tmp_path, torch.float32)
    config = StableDiffusionPipeline.from_pretrained(tmp_path).scheduler.config
    assert (config.rescale_betas_zero_snr, config.prediction_type, config.timestep_spacing) == (
        True, "v_prediction", "trailing",
    )  # fmt: skip
    again = load_pipeline_parts(tmp_path, "cpu")
    assert (
        with_schedule(again, "base", zero_terminal_snr=True).noise_scheduler_config
        == again.noise_scheduler_config
    )
    assert "rescale_betas_zero_snr" not in parts.noise_scheduler_config or (
        not parts.noise_scheduler_config["rescale_betas_zero_snr"]
    )


def test_a_sampler_that_does_not_know_the_option_is_replaced(sd1_folder):
    parts = load_pipeline_parts(sd1_folder, "cpu")
    parts.noise_scheduler_config["_class_name"] = "PNDMScheduler"
    assert (
        with_schedule(parts, "base", zero_terminal_snr=False).noise_scheduler_config["_class_name"]
        == "PNDMScheduler"
    )
    assert (
        with_schedule(parts, "base", zero_terminal_snr=True).noise_scheduler_config["_class_name"]
        == "DDIMScheduler"
    )


def test_another_prediction_type_is_recorded(sdxl_folder, tmp_path):
    parts = load_pipeline_parts(sdxl_folder, "cpu")
    assert (
        with_schedule(parts, "base", zero_terminal_snr=False).noise_scheduler_config
        == parts.noise_scheduler_config
    )
    save_diffusers_folder(
        with_schedule(parts, "v_prediction", zero_terminal_snr=False), tmp_path, torch.float32
    )
    assert (
        StableDiffusionXLPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type
        == "v_prediction"
    )
    # A v-prediction model is trained on to predict the noise, too.
    back = with_schedule(load_pipeline_parts(tmp_path, "cpu"), "epsilon", zero_terminal_snr=False)
    assert back.noise_scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("own", "prediction_type", "asked", "message"),
    [
        ("epsilon", "base", True, "^zero_terminal_snr=true"),
        ("epsilon", "epsilon", True, "^zero_terminal_snr=true"),
        ("zero", "base", False, "^the base model's schedule has zero terminal SNR"),
        ("zero", "epsilon", False, "^the base model's schedule has zero terminal SNR"),
    ],
)
def test_the_noise_cannot_be_predicted_where_there_is_no_signal(
    sdxl_folder, own, prediction_type, asked, message
):
    parts = load_pipeline_parts(sdxl_folder, "cpu")
    parts.noise_scheduler_config["rescale_betas_zero_snr"] = own == "zero"
    with pytest.raises(ConfigError, match=message):
        with_schedule(parts, prediction_type, zero_terminal_snr=asked)
    with_schedule(parts, "v_prediction", zero_terminal_snr=asked)


def test_weights_of_a_part_that_is_not_there_are_refused_by_its_folder(tmp_path):
    with pytest.raises(ModelError, match=r"unet has 0 \.safetensors files, must have one"):
        read_weights(tmp_path, ["unet.conv_in.weight"])
