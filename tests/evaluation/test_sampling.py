"""Pictures follow from prompt, seed and weights alone, and equal those of diffusers' own pipeline."""

import copy
import dataclasses
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from training.data.tables import TABLES
from training.errors import EvaluationError, ModelError
from training.evaluation import sampling
from training.evaluation.prompt_sets import seed_of
from training.evaluation.prompt_encoding import PromptEncoder
from training.evaluation_config import LoraConfig, Sampler, SamplingConfig, SecondPassConfig
from training.models.text_encoders import load_tokenizer
from training.models.unet import PipelineParts, load_pipeline_parts, save_diffusers_folder
from training.models.vae import Vae

# diffusers' own pipelines and schedulers under NumPy 2; ours keeps it quiet itself.
COPY = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

CONFIG = SamplingConfig(num_steps=6, guidance_scale=5.0, batch_size=4)


def prompt_frame(*rows):
    """Rows of `(prompt_id, text, negative, height, width)`."""
    full = [
        {"prompt_id": key, "text": text, "negative": negative, "group": "g", "height": height, "width": width,
         "seed": seed_of(key)}
        for key, text, negative, height, width in rows
    ]  # fmt: skip
    return pl.DataFrame(full, schema=TABLES["prompt_sets"].schema)


LONG = ", ".join(f"tag number {n}" for n in range(14))
PROMPTS = prompt_frame(
    ("a", "red cat", "", 32, 48),
    ("b", "a dog", "blurry", 32, 48),
    ("c", LONG, "", 32, 48),
    ("d", "tree", "", 48, 32),
    ("e", "red cat", LONG, 32, 48),
    ("f", "house", "", 32, 48),
    ("g", "", "", 32, 48),
)


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    return load_pipeline_parts(tiny_sdxl, "cpu")


def draw(parts, prompts, **changes):
    return dict(sampling.sample(parts, prompts, changed(**changes)))


def latents_of(parts, frame, clip_skip=1, **changes):
    prompts, config = sampling._prompts(frame), changed(**changes)
    texts = [text for prompt in prompts for text in (prompt.text, prompt.negative)]
    encoder = PromptEncoder(parts, texts, config, clip_skip=clip_skip, device="cpu")
    return sampling.draw(parts, Vae(parts.vae, "cpu"), encoder, prompts, config)


def changed(**changes):
    """The config of these tests with changes; DDIM comes with the only schedule that it takes."""
    if changes.get("sampler") == "ddim":
        changes["schedule"] = "plain"
    return dataclasses.replace(CONFIG, **changes)


def assert_equal_but_for_rounding(one, other):
    """To 2e-6 of the largest value: guidance of random weights drives latents to 50 and more."""
    torch.testing.assert_close(one, other, atol=2e-6 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_picture_does_not_depend_on_its_batch(parts, sampler):
    same = PROMPTS.filter(pl.col("prompt_id").is_in(["a", "b", "f", "g"]))
    together = latents_of(parts, same, sampler=sampler)
    for place, key in enumerate(same["prompt_id"]):
        alone = latents_of(parts, same.filter(pl.col("prompt_id") == key), sampler=sampler)
        assert_equal_but_for_rounding(together[place], alone[0])
    shuffled = latents_of(parts, same.reverse(), sampler=sampler)
    assert_equal_but_for_rounding(together, shuffled)


def test_every_prompt_gets_its_picture_in_its_size_whatever_the_batches(parts):
    eight, one = draw(parts, PROMPTS), draw(parts, PROMPTS, batch_size=1)
    assert set(eight) == set(PROMPTS["prompt_id"])
    for key, height, width in PROMPTS.select("prompt_id", "height", "width").iter_rows():
        assert eight[key].shape == (height, width, 3)
        assert eight[key].dtype == np.uint8
        assert np.abs(eight[key].astype(int) - one[key]).max() <= 1
    assert not np.array_equal(eight["a"], eight["f"])


def test_repeated_runs_are_equal_bit_for_bit(parts):
    for sampler in ("euler_a", "dpmpp_sde"):
        first, second = draw(parts, PROMPTS, sampler=sampler), draw(parts, PROMPTS, sampler=sampler)
        assert all(np.array_equal(first[key], second[key]) for key in first)


def test_all_of_a_prompt_matters(parts):
    base = latents_of(parts, prompt_frame(("a", "red cat", "", 32, 32)))
    negative = latents_of(parts, prompt_frame(("a", "red cat", "blue", 32, 32)))
    other_seed = latents_of(parts, prompt_frame(("b", "red cat", "", 32, 32)))
    end = latents_of(parts, prompt_frame(("a", LONG + " x", "", 32, 32)))
    other_end = latents_of(parts, prompt_frame(("a", LONG + " y", "", 32, 32)))
    for other in (
        negative,
        other_seed,
        latents_of(parts, prompt_frame(("a", "red cat", "", 32, 32)), guidance_scale=2.0),
    ):
        assert (base - other).abs().max() > 1e-3
    # Beyond token 77: what diffusers' own pipeline would cut off.
    assert (end - other_end).abs().max() > 1e-6


@COPY
@pytest.mark.parametrize("zeros", [False, True])
def test_a_picture_equals_that_of_diffusers_pipeline_on_77_tokens(tiny_sdxl, parts, zeros):
    tokenizer = load_tokenizer(tiny_sdxl / "tokenizer")
    text = "z" * 74 + " y"
    assert len(tokenizer(text)["input_ids"]) > 70
    while len(tokenizer(text)["input_ids"]) != 77:
        text = text[1:] if len(tokenizer(text)["input_ids"]) > 77 else "z" + text
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, force_zeros_for_empty_prompt=zeros)
    pipeline.set_progress_bar_config(disable=True)
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        **{key: config[key] for key in keep}, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )
    frame = prompt_frame(("a", text, "", 32, 48))
    theirs = pipeline(
        text, height=32, width=48, num_inference_steps=6, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(seed_of("a")),
    ).images  # fmt: skip
    own = dataclasses.replace(parts, force_zeros_for_empty_prompt=zeros)
    assert_equal_but_for_rounding(latents_of(own, frame), theirs)
    image = pipeline(
        text, height=32, width=48, num_inference_steps=6, guidance_scale=5.0, output_type="np",
        generator=torch.Generator().manual_seed(seed_of("a")),
    ).images[0]  # fmt: skip
    assert np.abs(draw(own, frame)["a"] - image * 255).max() <= 0.51


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory, parts):
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
    )  # fmt: skip
    sd1 = PipelineParts(
        family="sd1", unet=unet, vae=parts.vae, text_encoders=parts.text_encoders[:1], tokenizers=parts.tokenizers[:1],
        noise_scheduler_config=parts.noise_scheduler_config, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "sd1"
    save_diffusers_folder(sd1, folder, torch.float32)
    return folder


@COPY
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_sd1_is_sampled_without_size_conditioning_and_from_its_layer(sd1_folder, parts, clip_skip):
    sd1 = load_pipeline_parts(sd1_folder, "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(sd1_folder)
    # diffusers 0.42 looks for the final norm where transformers had it before 5.6.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        **{key: parts.noise_scheduler_config[key] for key in keep}, use_karras_sigmas=True
    )
    # Both encoded as prompts: diffusers does not skip layers of the negative, the UIs do.
    prompt, negative = (
        pipeline.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip - 1 or None)[0]
        for text in ("a red cat", "blurry")
    )
    theirs = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=negative, height=32, width=48, num_inference_steps=6,
        guidance_scale=5.0, output_type="latent", generator=torch.Generator().manual_seed(seed_of("a")),
    ).images  # fmt: skip
    own = latents_of(sd1, prompt_frame(("a", "a red cat", "blurry", 32, 48)), clip_skip=clip_skip)
    assert_equal_but_for_rounding(own, theirs)


def test_files_hold_the_pictures_and_their_parameters(tiny_sdxl, parts, tmp_path):
    frame = prompt_frame(("../e\nvil", "a cat, 猫", "bad, <b>", 32, 48), ("p02", "plain", "", 48, 32))
    seen = []
    table = sampling.sample_folder(
        tiny_sdxl, "run@12", frame, CONFIG, tmp_path / "out", progress=lambda *counts: seen.append(counts)
    )
    assert table.schema == TABLES["sample_images"].schema
    assert table["prompt_id"].to_list() == frame["prompt_id"].to_list()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(table["file"])
    pictures = draw(parts, frame)
    for row in table.iter_rows(named=True):
        with Image.open(tmp_path / "out" / row["file"]) as image:
            assert np.array_equal(np.asarray(image), pictures[row["prompt_id"]])
            assert image.size == (row["width"], row["height"])
            lines = image.text["parameters"].split("\n")
        assert lines[0] == row["text"]
        assert lines[-1].startswith("Steps: 6, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: ")
        assert f"Seed: {row['seed']}, Size: {row['width']}x{row['height']}, Model: run@12" in lines[-1]
        assert (lines[1] == f"Negative prompt: {row['negative']}") == bool(row["negative"])
    assert seen[-1] == (2, 2)


def test_a_size_that_the_vae_cannot_draw_is_refused(parts):
    frame = prompt_frame(("a", "x", "", 36, 32))
    with pytest.raises(EvaluationError, match="size 36x32 must be a multiple of 8"):
        draw(parts, frame)


def test_a_broken_checkpoint_names_the_prompts(parts):
    broken = dataclasses.replace(parts, unet=copy.deepcopy(parts.unet))
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    with pytest.raises(EvaluationError, match="pictures of prompts 'a' cannot be shown: VAE"):
        draw(broken, prompt_frame(("a", "x", "", 32, 32)))


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match="model_index"):
        sampling.sample_folder(tmp_path, "run@1", PROMPTS, CONFIG, tmp_path / "out")
