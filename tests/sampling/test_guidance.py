"""Perturbed-attention guidance equals that of diffusers' pipeline, and costs nothing where it is
off."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPAGPipeline
from tiny_sampling import COPY, assert_equal_but_for_rounding, changed, latents_of, prompt_frame

from training.config.evaluation import SamplingConfig
from training.errors import ConfigError, EvaluationError
from training.evaluation.prompt_sets import seed_of
from training.models.unet import load_pipeline_parts
from training.sampling.guidance import guide, perturbed

FRAME = prompt_frame(("a", "red cat", "blurry", 32, 48))


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    return load_pipeline_parts(tiny_sdxl, "cpu")


@pytest.fixture
def batches(parts):
    """Sizes of the batches that the UNet is shown."""
    seen = []
    handle = parts.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


@COPY
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_image_equals_that_of_diffusers_pipeline(tiny_sdxl, parts, scale):
    pipeline = StableDiffusionXLPAGPipeline.from_pretrained(
        tiny_sdxl, force_zeros_for_empty_prompt=False, pag_applied_layers=["mid"]
    )
    pipeline.set_progress_bar_config(disable=True)
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        **{key: parts.noise_scheduler_config[key] for key in keep}, use_karras_sigmas=True
    )
    theirs = pipeline(
        "red cat", negative_prompt="blurry", height=32, width=48, num_inference_steps=6, guidance_scale=5.0,
        pag_scale=scale, output_type="latent", generator=torch.Generator().manual_seed(seed_of("a")),
    ).images  # fmt: skip
    assert_equal_but_for_rounding(latents_of(parts, FRAME, pag_scale=scale), theirs)


def test_it_is_a_third_reading_that_only_a_scale_costs(parts, batches):
    plain = latents_of(parts, FRAME)
    assert batches == [2] * 6
    batches.clear()
    guided = latents_of(parts, FRAME, pag_scale=3.0)
    assert batches == [3] * 6
    assert (plain - guided).abs().max() > 1e-3
    # The processors are as they were: nothing of it is left in the model.
    assert torch.equal(latents_of(parts, FRAME), plain)


def test_images_do_not_see_each_other(parts):
    frame = prompt_frame(
        ("a", "red cat", "blurry", 32, 48), ("b", "dog", "", 32, 48), ("c", "tree", "x", 32, 48)
    )
    together = latents_of(parts, frame, pag_scale=2.0)
    for place in range(3):
        assert_equal_but_for_rounding(
            latents_of(parts, frame[place : place + 1], pag_scale=2.0)[0], together[place]
        )


def test_readings_are_added_up_as_the_papers_say():
    without, with_text, perturbed_text = torch.randn(
        3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    config = changed(guidance_scale=4.0, pag_scale=3.0)
    guided = guide(torch.cat([without, with_text, perturbed_text]), config)
    torch.testing.assert_close(
        guided, 7 * with_text - 3 * without - 3 * perturbed_text, atol=1e-5, rtol=0
    )


def test_a_unet_without_attention_in_the_middle_is_refused():
    unet = SimpleNamespace(named_modules=lambda: iter(()))
    with (
        pytest.raises(
            EvaluationError, match=r"pag_scale=2.0: the UNet's middle block has no self-attention"
        ),
        perturbed(unet, changed(pag_scale=2.0)),
    ):
        pass


def test_a_scale_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"pag_scale=-1.0 .* must be >= 0"):
        dataclasses.replace(SamplingConfig(), pag_scale=-1.0)
