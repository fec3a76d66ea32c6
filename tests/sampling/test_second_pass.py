"""Two passes: sizes, the ways to enlarge, and the whole against diffusers' two pipelines one after
the other."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_sampling import (
    CONFIG,
    COPY,
    assert_equal_but_for_rounding,
    changed,
    latents_of,
    prompt_frame,
)
from torch.nn import functional

from training.buckets.geometry import Size
from training.config.evaluation import SecondPassConfig
from training.errors import ConfigError
from training.evaluation.prompt_sets import seed_of
from training.models.unet import load_pipeline_parts
from training.models.vae import Vae
from training.sampling import sampling
from training.sampling.second_pass import enlarge, final_size

FRAME = prompt_frame(("a", "red cat", "blurry", 32, 48), ("b", "dog", "", 32, 48))


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    return load_pipeline_parts(tiny_sdxl, "cpu")


@given(
    height=st.integers(1, 256), width=st.integers(1, 256), vae_scale=st.sampled_from([4, 8]), scale=st.floats(1, 4)
)  # fmt: skip
def test_sizes_are_whole_latents_near_the_scale(height, width, vae_scale, scale):
    size = Size(height * vae_scale, width * vae_scale)
    final = final_size(size, SecondPassConfig(scale=scale), vae_scale)
    for before, after in zip(size, final, strict=True):
        assert after % vae_scale == 0
        assert abs(after - before * scale) <= vae_scale / 2 + 1e-6
    assert final_size(size, None, vae_scale) == size


@pytest.mark.parametrize("how", ["latent", "latent_bicubic"])
def test_latents_are_enlarged_without_shift(parts, how):
    ramp = torch.arange(8.0)[None, None, :, None] * 2 + torch.arange(12.0) * 3  # (1, 1, 8, 12)
    large = enlarge(ramp.expand(2, 4, 8, 12), Size(16 * 8, 18 * 8), how, Vae(parts.vae, "cpu"))
    assert large.shape == (2, 4, 16, 18)
    rows, columns = (torch.arange(16.0) + 0.5) / 2 - 0.5, (torch.arange(18.0) + 0.5) / 1.5 - 0.5
    wanted = rows[:, None] * 2 + columns * 3
    torch.testing.assert_close(large[1, 2, 4:-4, 4:-4], wanted[4:-4, 4:-4], atol=1e-4, rtol=0)


def test_pixels_are_enlarged_between_decoding_and_encoding(parts):
    vae = Vae(parts.vae, "cpu")
    latents = torch.randn((2, 4, 4, 6), generator=torch.Generator().manual_seed(0))
    pictures = [
        Image.fromarray(picture).resize((72, 48), Image.Resampling.LANCZOS)
        for picture in vae.decode(latents)
    ]
    wanted = [row.latents for row in vae([np.asarray(picture) for picture in pictures])]
    np.testing.assert_allclose(
        enlarge(latents, Size(48, 72), "pixels", vae).numpy(), wanted, atol=1e-6
    )


@COPY
@pytest.mark.parametrize(
    ("how", "strength", "steps"), [("latent", 0.5, 4), ("latent_bicubic", 0.75, 9)]
)
def test_two_passes_equal_diffusers_pipelines_one_after_the_other(
    tiny_sdxl, parts, how, strength, steps
):
    frame = FRAME[:1]
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny_sdxl, force_zeros_for_empty_prompt=False
    )
    pipeline.set_progress_bar_config(disable=True)
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        **{key: parts.noise_scheduler_config[key] for key in keep}, use_karras_sigmas=True
    )
    mode = {"latent": "bilinear", "latent_bicubic": "bicubic"}[how]
    first = latents_of(parts, frame)  # test_sampling.py compares it with the other pipeline
    large = functional.interpolate(first, (6, 9), mode=mode, antialias=how == "latent_bicubic")
    theirs = pipeline(
        "red cat", negative_prompt="blurry", image=large, strength=strength, num_inference_steps=int(steps / strength),
        guidance_scale=5.0, output_type="latent", generator=torch.Generator().manual_seed(seed_of("a")),
    ).images  # fmt: skip
    second = SecondPassConfig(scale=1.5, strength=strength, num_steps=steps, enlarge=how)
    assert_equal_but_for_rounding(latents_of(parts, frame, second_pass=second), theirs)


@pytest.mark.parametrize("how", ["latent", "latent_bicubic", "pixels"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpmpp_sde", "ddim"])
def test_a_image_does_not_depend_on_its_batch(parts, how, sampler):
    second = SecondPassConfig(scale=1.3, strength=0.6, num_steps=3, enlarge=how)
    together = latents_of(parts, FRAME, sampler=sampler, second_pass=second)
    assert together.shape == (2, 4, 5, 8)
    for place in range(2):
        alone = latents_of(parts, FRAME[place : place + 1], sampler=sampler, second_pass=second)[0]
        # Through pixels, what rounds to the next level differs by a 255th.
        tolerance = 0.05 if how == "pixels" else 1e-5
        torch.testing.assert_close(
            alone, together[place], atol=tolerance * together.abs().max().item(), rtol=0
        )


def test_a_stronger_pass_leaves_less_of_the_first(parts):
    first = functional.interpolate(latents_of(parts, FRAME), (6, 9), mode="bilinear")
    away = [
        (latents_of(parts, FRAME, second_pass=SecondPassConfig(strength=strength)) - first)
        .abs()
        .mean()
        .item()
        for strength in (0.02, 0.2, 1.0)
    ]
    assert away == sorted(away)
    assert away[0] < away[2] / 4


def test_files_and_rows_have_the_final_size(tiny_sdxl, tmp_path):
    config = changed(second_pass=SecondPassConfig(scale=1.5, strength=0.4, num_steps=3))
    table = sampling.sample_folder(tiny_sdxl, "run@1", FRAME, config, tmp_path)
    assert table.select("height", "width").unique().rows() == [(48, 72)]
    for file in table["file"]:
        with Image.open(tmp_path / file) as image:
            assert image.size == (72, 48)
            settings = image.text["parameters"].split("\n")[-1]
        assert "Size: 48x32," in settings
        assert (
            "Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 3, Hires upscaler: Latent,"
            in settings
        )


def test_it_is_off_unless_asked_for_and_its_limits_are_checked():
    assert CONFIG.second_pass is None
    wrong = (
        ({"scale": 0.9}, "scale=0.9 must be at least 1"),
        ({"strength": 1.1}, "at most 1"),
        ({"strength": 0.0}, "strength=0.0 must be greater"),
        ({"num_steps": 0}, "num_steps=0"),
    )
    for change, rule in wrong:
        with pytest.raises(ConfigError, match=rule):
            SecondPassConfig(**change)
