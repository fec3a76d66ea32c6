"""What an image says of itself, parsed back by a reader of our own of the UIs' form."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training.buckets.geometry import Size
from training.config.evaluation import LoraConfig, SamplingConfig, SecondPassConfig
from training.sampling.png_parameters import lora_hash, parameters, write_png

PAIR = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def read(text):
    """Prompt, negative and settings: the last line has the settings, as `key: value` or `key: "JSON
    string"`."""
    *lines, last = text.split("\n")
    settings = {
        key: json.loads(value) if value.startswith('"') else value
        for key, value in PAIR.findall(last)
    }
    begins = next(
        (n for n, line in enumerate(lines) if line.startswith("Negative prompt: ")), len(lines)
    )
    negative = "\n".join(lines[begins:]).removeprefix("Negative prompt: ")
    return "\n".join(lines[:begins]), negative, settings


def test_a_plain_image_is_read_back():
    config = SamplingConfig(sampler="euler_a", schedule="plain", num_steps=28, guidance_scale=7.5)
    text = parameters(
        "a cat, (red)",
        "blurry,\nbad",
        seed=3,
        size=Size(1216, 832),
        model="run@12",
        config=config,
    )
    prompt, negative, settings = read(text)
    assert (prompt, negative) == ("a cat, (red)", "blurry,\nbad")
    assert settings == {
        "Steps": "28", "Sampler": "Euler a", "Schedule type": "Normal", "CFG scale": "7.5", "Seed": "3",
        "Size": "832x1216", "Model": "run@12", "Emphasis": "None", "Precision": "fp32", "RNG": "CPU",
        "Prompt syntax": "a1111", "SGM noise multiplier": "True",
    }  # fmt: skip


def test_all_that_was_done_is_read_back():
    config = SamplingConfig(
        sampler="dpmpp_3m_sde", schedule="ays", pag_scale=3.0, prompt_weights="plain",
        second_pass=SecondPassConfig(scale=1.5, strength=0.45, num_steps=12, enlarge="latent_bicubic"),
        loras=(LoraConfig(path="a/ink.safetensors", weight=0.75), LoraConfig(path="b/soft.safetensors")),
        precision="bf16",
    )  # fmt: skip
    hashes = {"ink": "0123456789ab", "soft": "ba9876543210"}
    text = parameters(
        "cat", "", seed=9, size=Size(1024, 1024), model="my: model, v2", config=config, clip_skip=2,
        lora_hashes=hashes,
    )  # fmt: skip
    prompt, negative, settings = read(text)
    assert (prompt, negative) == ("cat <lora:ink:0.75> <lora:soft:1>", "")
    assert settings["Model"] == "my: model, v2"
    assert settings["Lora hashes"] == "ink: 0123456789ab, soft: ba9876543210"
    wanted = {
        "Sampler": "DPM++ 3M SDE", "Schedule type": "Align Your Steps", "Clip skip": "2", "Denoising strength": "0.45",
        "Hires upscale": "1.5", "Hires steps": "12", "Hires upscaler": "Latent (bicubic antialiased)",
        "PAG scale": "3.0", "Emphasis": "No norm", "Size": "1024x1024", "Precision": "bf16",
        "Align Your Steps": "ComfyUI",
    }  # fmt: skip
    assert wanted.items() <= settings.items()


@pytest.mark.parametrize(
    ("mode", "said"), [("off", "None"), ("plain", "No norm"), ("mean_restored", "Original")]
)
def test_emphasis_is_named_as_a1111_names_it(mode, said):
    config = SamplingConfig(prompt_weights=mode)
    assert (
        read(parameters("x", "", seed=0, size=Size(8, 8), model="m", config=config))[2]["Emphasis"]
        == said
    )


@pytest.mark.parametrize(("how", "said"), [("latent", "Latent"), ("pixels", "Lanczos")])
def test_upscalers_are_named_as_a1111_names_them(how, said):
    config = SamplingConfig(second_pass=SecondPassConfig(enlarge=how))
    assert (
        read(parameters("x", "", seed=0, size=Size(8, 8), model="m", config=config))[2][
            "Hires upscaler"
        ]
        == said
    )


def test_ddim_has_no_type_of_schedule_and_one_start_everywhere():
    config = SamplingConfig(sampler="ddim", schedule="plain")
    settings = read(parameters("x", "", seed=0, size=Size(8, 8), model="m", config=config))[2]
    assert settings["Sampler"] == "DDIM"
    assert "Schedule type" not in settings
    assert "SGM noise multiplier" not in settings


def test_how_prompts_are_read_is_said_in_a1111s_words_where_it_has_some():
    """`Old prompt editing timelines` is what A1111 1.6 and later writes and reads; it has no exact
    ends."""
    prompt = "by [(a:0.9):b \\(c\\):0.15], [d|e]"
    config = SamplingConfig(
        prompt_syntax="strict", prompt_times="old", prompt_ends="exact", prompt_weights="plain"
    )
    text, negative, settings = read(
        parameters(prompt, "[x:3]", seed=0, size=Size(8, 8), model="m", config=config)
    )
    assert (text, negative) == (prompt, "[x:3]")
    wanted = {
        "Prompt syntax": "strict",
        "Old prompt editing timelines": "True",
        "Prompt ends": "exact",
    }
    assert wanted.items() <= settings.items()
    settings = read(
        parameters(prompt, "", seed=0, size=Size(8, 8), model="m", config=SamplingConfig())
    )[2]
    assert settings.keys().isdisjoint(
        {"Old prompt editing timelines", "Prompt ends", "Align Your Steps"}
    )


def test_a_lora_is_known_by_its_tensors_and_not_by_its_metadata(tmp_path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    tensor = torch.arange(6.0).reshape(2, 3)
    save_file({"w": tensor}, one)
    save_file({"w": tensor}, other, metadata={"ss_output_name": "x"})
    assert one.read_bytes() != other.read_bytes()
    assert (
        lora_hash(one)
        == lora_hash(other)
        == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:12]
    )


@pytest.mark.parametrize("text", ["plain\nSteps: 1", "日本, é\nSteps: 1"])
def test_the_text_is_in_the_file(tmp_path, text):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    write_png(tmp_path / "x.png", picture, text)
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["parameters"] == text
        assert np.array_equal(np.asarray(image), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
