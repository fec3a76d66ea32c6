"""Prompts that change while an image is drawn: what the UNet is shown at each call, and what comes
of it."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from tiny_sampling import (
    COPY,
    assert_equal_but_for_rounding,
    changed,
    encoder_of,
    latents_of,
    prompt_frame,
)

from training.config.evaluation import Sampler, SecondPassConfig
from training.errors import EvaluationError
from training.evaluation.prompt_sets import seed_of
from training.models.unet import load_pipeline_parts
from training.sampling import sampling

BPMODEL = json.loads(Path(__file__).with_name("bpmodel_prompts.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    return load_pipeline_parts(tiny_sdxl, "cpu")


@pytest.fixture
def shown(parts):
    """What the UNet attended to, call by call: hidden states and pooled text of all readings."""
    seen = []

    def note(module, arguments, keywords):
        added = keywords["added_cond_kwargs"]
        seen.append((keywords["encoder_hidden_states"].clone(), added["text_embeds"].clone()))

    handle = parts.unet.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def alone(parts, text, negative="", **changes):
    """Conditioning of one plain prompt and its negative, negative first."""
    (made,) = encoder_of(parts, prompt_frame(("x", text, negative, 32, 32)), **changes).encode(
        [negative], [text]
    )
    return made.at(0)


def words(parts, shown, row, texts, **changes):
    """Which of the texts each call had in a row of its batch."""
    known = {text: alone(parts, text, **changes) for text in texts}
    found = []
    for hidden_states, pooled in shown:
        fits = [
            text
            for text, one in known.items()
            if torch.allclose(hidden_states[row], one.hidden_states[1], atol=1e-5)
            and torch.allclose(pooled[row], one.pooled[1], atol=1e-5)
        ]
        assert len(fits) == 1
        found += fits
    return found


# Calls of the UNet at 6 steps, by hand; dpmpp_sde counts 12 and has 11.
CALLS = {
    "[cat:dog:0.5]": (["cat"] * 4 + ["dog"] * 2, ["cat"] * 7 + ["dog"] * 4),
    "[cat:dog:4]": (["cat"] * 5 + ["dog"], ["cat"] * 5 + ["dog"] * 6),
    "[cat|dog]": (["cat", "cat", "dog", "cat", "dog", "cat"], ["cat"] + ["cat", "dog"] * 5),
}


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize("prompt", CALLS)
def test_every_sampler_shows_each_text_at_its_calls_to_both_halves(parts, shown, sampler, prompt):
    twice = sampler == "dpmpp_sde"
    latents_of(parts, prompt_frame(("a", prompt, "tree", 32, 32)), sampler=sampler)
    assert len(shown) == (11 if twice else 6)
    assert words(parts, shown, 1, ("cat", "dog")) == CALLS[prompt][twice]
    assert words(parts, shown, 0, ("cat", "dog", "tree")) == ["tree"] * len(shown)
    shown.clear()
    latents_of(parts, prompt_frame(("a", "tree", prompt, 32, 32)), sampler=sampler)
    assert words(parts, shown, 0, ("cat", "dog")) == CALLS[prompt][twice]
    assert words(parts, shown, 1, ("cat", "dog", "tree")) == ["tree"] * len(shown)


def test_exact_ends_are_those_that_the_prompt_says(parts, shown):
    latents_of(parts, prompt_frame(("a", "[cat:dog:0.5]", "", 32, 32)), prompt_ends="exact")
    assert words(parts, shown, 1, ("cat", "dog")) == ["cat"] * 3 + ["dog"] * 3


@pytest.mark.parametrize(
    ("times", "prompt", "first", "second"),
    [
        # Six steps, then four: what lies in the first pass is over in the second.
        ("new", "[cat:dog:0.5]", "ccccdd", "dddd"),
        ("new", "[cat:dog:1.5]", "cccccc", "cccd"),
        ("new", "[cat:dog:7]", "cccccc", "ccdd"),
        ("new", "[cat|dog]", "ccdcdc", "ccdc"),
        # The schedule of the first pass, again from its start.
        ("old", "[cat:dog:0.5]", "ccccdd", "cccc"),
        ("old", "[cat:dog:2]", "cccddd", "cccd"),
    ],
)
def test_a_second_pass_has_its_times_by_the_rules_that_are_named(
    parts, shown, times, prompt, first, second
):
    second_pass = SecondPassConfig(scale=1.0, strength=0.5, num_steps=4)
    latents_of(
        parts, prompt_frame(("a", prompt, "", 32, 32)), second_pass=second_pass, prompt_times=times
    )
    found = "".join(word[0] for word in words(parts, shown, 1, ("cat", "dog")))
    assert (found[:6], found[6:]) == (first, second)


def test_more_calls_than_the_old_rules_count_begin_anew(parts, shown):
    """Two steps and then six: ends 1 and 2, calls 3 to 5 lie beyond and have the first text."""
    second_pass = SecondPassConfig(scale=1.0, strength=0.5, num_steps=6)
    latents_of(
        parts,
        prompt_frame(("a", "[cat:dog:1]", "", 32, 32)),
        num_steps=2,
        second_pass=second_pass,
        prompt_times="old",
    )
    assert "".join(word[0] for word in words(parts, shown, 1, ("cat", "dog"))) == "ccccdccc"


@COPY
def test_a_image_equals_that_of_diffusers_pipeline_whose_prompt_is_exchanged(tiny_sdxl, parts):
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, force_zeros_for_empty_prompt=False
    )
    pipeline.set_progress_bar_config(disable=True)
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        **{key: parts.noise_scheduler_config[key] for key in keep}, use_karras_sigmas=True
    )
    words_, negatives = ("red cat", "a dog"), ("blurry", "tree")
    embedded = [
        pipeline.encode_prompt(prompt=word, negative_prompt=negative, device="cpu")
        for word, negative in zip(words_, negatives, strict=True)
    ]  # prompt, negative, pooled prompt, pooled negative

    def exchange(pipe, step, timestep, tensors):
        """After the fourth call the prompt, after the second the negative: [..:0.5] and [..:1] of 6
        steps."""
        prompt, pooled = embedded[step + 1 > 3][0], embedded[step + 1 > 3][2]
        negative, pooled_negative = embedded[step + 1 > 1][1], embedded[step + 1 > 1][3]
        return {
            **tensors, "prompt_embeds": torch.cat([negative, prompt]),
            "add_text_embeds": torch.cat([pooled_negative, pooled]),
        }  # fmt: skip

    theirs = pipeline(
        prompt_embeds=embedded[0][0], negative_prompt_embeds=embedded[0][1], pooled_prompt_embeds=embedded[0][2],
        negative_pooled_prompt_embeds=embedded[0][3], height=32, width=48, num_inference_steps=6, guidance_scale=5.0,
        output_type="latent", generator=torch.Generator().manual_seed(seed_of("a")), callback_on_step_end=exchange,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "add_text_embeds"],
    ).images  # fmt: skip
    frame = prompt_frame(("a", "[red cat:a dog:0.5]", "[blurry:tree:1]", 32, 48))
    assert_equal_but_for_rounding(latents_of(parts, frame), theirs)


def test_a_schedule_that_changes_nothing_draws_what_its_text_draws(parts):
    plain = latents_of(parts, prompt_frame(("a", "a red cat", "bad", 32, 32)))
    for prompt in (
        "a [red:red:0.5] cat",
        "a [blue:red:0] cat",
        "a [red:blue:1.0] cat",
        "a [red|red] cat",
    ):
        assert torch.equal(latents_of(parts, prompt_frame(("a", prompt, "bad", 32, 32))), plain)
    for prompt in ("a [blue:red:0.5] cat", "a [red|blue] cat", "a [red:blue:4] cat"):
        assert (
            latents_of(parts, prompt_frame(("a", prompt, "bad", 32, 32))) - plain
        ).abs().max() > 2e-4


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde", "euler_a"])
def test_a_image_does_not_depend_on_its_batch(parts, sampler):
    frame = prompt_frame(
        ("a", "[cat:dog:0.5] x", "[bad|worse]", 32, 32), ("b", "tree", "", 32, 32), ("c", "[c|d|e]", "bad", 32, 32),
        ("d", "tree:2", "", 32, 32),
    )  # fmt: skip
    second = SecondPassConfig(scale=1.5, num_steps=3)
    together = latents_of(parts, frame, sampler=sampler, second_pass=second)
    for place in range(4):
        alone_ = latents_of(parts, frame[place : place + 1], sampler=sampler, second_pass=second)
        assert_equal_but_for_rounding(together[place], alone_[0])


def test_each_distinct_text_is_encoded_once(parts):
    encoded = []
    hooks = [
        encoder.register_forward_pre_hook(lambda module, arguments, keywords: encoded.append(
            len((arguments or tuple(keywords.values()))[0])), with_kwargs=True)
        for encoder in parts.text_encoders
    ]  # fmt: skip
    frame = prompt_frame(
        ("a", "[cat:dog:0.5] [x|y]", "bad", 32, 32), ("b", "[dog|cat] x", "[bad:worse:2]", 32, 32)
    )  # fmt: skip
    # cat x, cat y, dog x, dog y; bad, worse: six texts for 2 images, 12 calls and two passes.
    latents_of(parts, frame, second_pass=SecondPassConfig(num_steps=6))
    for hook in hooks:
        hook.remove()
    assert encoded == [6, 6]


def test_the_weight_at_the_end_strengthens_the_guidance(parts):
    """Of one image of a batch: uncond + weight * scale * (cond - uncond), as A1111 adds its
    parts."""
    frame = prompt_frame(("a", "red cat:1.5", "bad", 32, 32), ("b", "red cat", "bad", 32, 32))
    together = latents_of(parts, frame, guidance_scale=4.0)
    wanted = latents_of(parts, prompt_frame(("a", "red cat", "bad", 32, 32)), guidance_scale=6.0)
    assert_equal_but_for_rounding(together[0], wanted[0])
    plain = latents_of(parts, prompt_frame(("b", "red cat", "bad", 32, 32)), guidance_scale=4.0)
    assert_equal_but_for_rounding(together[1], plain[0])


def test_a_break_begins_a_chunk_that_the_unet_attends_to(parts, shown):
    latents_of(
        parts, prompt_frame(("a", "red cat BREAK a dog", "", 32, 32)), prompt_weights="plain"
    )
    hidden_states = shown[0][0]
    assert hidden_states.shape[1] == 2 * 77
    for chunk, text in enumerate(("red cat", "a dog")):
        part = hidden_states[1, chunk * 77 : (chunk + 1) * 77]
        torch.testing.assert_close(part, alone(parts, text).hidden_states[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(shown[0][1][1], alone(parts, "red cat").pooled[1], atol=1e-5, rtol=0)


def test_an_empty_negative_is_zeros_only_where_it_is_always_empty(parts):
    zeroing = dataclasses.replace(parts, force_zeros_for_empty_prompt=True)
    for negative, is_zero in (("", True), ("[:0.5]", True), ("[:bad:0.5]", False)):
        encoder = encoder_of(zeroing, prompt_frame(("a", "", negative, 32, 32)))
        (made,) = encoder.encode([negative], [""])
        now = made.at(0)
        assert (now.hidden_states[0].abs().max() == 0) == is_zero
        assert (now.pooled[0].abs().max() == 0) == is_zero
        assert now.hidden_states[1].abs().max() > 0


# --- through the whole of sampling
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(BPMODEL)))
@pytest.mark.parametrize("weights", ["mean_restored", "off"])
def test_bpmodels_published_prompts_are_drawn(parts, number, weights):
    """With the samplers and steps that it names, in two passes; nothing is refused, not even by
    strict."""
    sample = BPMODEL[number]
    settings = dict(part.split(": ", 1) for part in sample["settings"].split(", "))
    sampler = {"Euler a": "euler_a", "Euler": "euler", "DDIM": "ddim"}[settings["Sampler"]]
    config = changed(
        sampler=sampler, num_steps=int(settings["Steps"]) // 4, guidance_scale=float(settings["CFG scale"]),
        prompt_weights=weights, prompt_syntax="a1111" if weights == "off" else "strict",
        second_pass=SecondPassConfig(scale=1.5, strength=0.7, num_steps=4),
    )  # fmt: skip
    frame = prompt_frame(("a", sample["prompt"], sample["negative"], 32, 48))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ((_, image),) = sampling.sample(parts, frame, config)
    assert image.shape == (48, 72, 3)
    letters = [str(one.message) for one in told if "read as letters" in str(one.message)]
    assert len(letters) <= (2 if weights == "off" else 0)


def test_remarks_are_warned_of_once_a_prompt(parts):
    frame = prompt_frame(
        ("a", "a | b", "bad)", 32, 32), ("b", "[x:y:9]", "bad)", 32, 32), ("c", "tree", "", 32, 32)
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pictures = dict(sampling.sample(parts, frame, changed(num_steps=2)))
    assert set(pictures) == {"a", "b", "c"}
    assert [str(one.message).split(": ")[0] for one in told] == [
        "prompt of 'a'",
        "negative of 'a'",
        "prompt of 'b'",
    ]


def test_a_bad_prompt_is_refused_before_a_model_is_loaded(tmp_path):
    frame = prompt_frame(("a", "tree", "", 32, 32), ("b", "[cat:dog:9]", "", 32, 32))
    with pytest.raises(
        EvaluationError,
        match=r"prompt 'b' cannot be drawn: the time 9 lies beyond the last of 6 calls",
    ):
        sampling.sample_folder(
            tmp_path / "no model", "x", frame, changed(prompt_syntax="strict"), tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())
