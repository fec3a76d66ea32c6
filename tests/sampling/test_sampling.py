"""Images follow from prompt, seed and weights alone, and equal those of diffusers' own
pipeline."""

import contextlib
import copy
import dataclasses
import shutil
import warnings
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import AysSchedules
from PIL import Image
from safetensors.torch import save_file
from tiny_sampling import (
    CONFIG,
    COPY,
    assert_equal_but_for_rounding,
    changed,
    latents_of,
    prompt_frame,
)

from resources.engine.processes import ProcessPool
from training.config.evaluation import LoraConfig, Sampler, SecondPassConfig
from training.errors import EvaluationError, ModelError
from training.evaluation.prompt_sets import seed_of
from training.models.saving import save_diffusers_folder
from training.models.text_encoders import load_tokenizer
from training.models.unet import PipelineParts, load_pipeline_parts
from training.runs import run_folder
from training.sampling import sampling
from training.sampling.png_parameters import lora_hash
from training.sampling.prompt_encoding import cut_prompts
from training.tables.schemas import TABLES

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


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_image_does_not_depend_on_its_batch(parts, sampler):
    same = PROMPTS.filter(pl.col("prompt_id").is_in(["a", "b", "f", "g"]))
    together = latents_of(parts, same, sampler=sampler)
    for place, key in enumerate(same["prompt_id"]):
        alone = latents_of(parts, same.filter(pl.col("prompt_id") == key), sampler=sampler)
        assert_equal_but_for_rounding(together[place], alone[0])
    shuffled = latents_of(parts, same.reverse(), sampler=sampler)
    assert_equal_but_for_rounding(together, shuffled)


def test_every_prompt_gets_its_image_in_its_size_whatever_the_batches(parts):
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
def test_a_image_equals_that_of_diffusers_pipeline_on_77_tokens(tiny_sdxl, parts, zeros):
    tokenizer = load_tokenizer(tiny_sdxl / "tokenizer")
    text = "z" * 74 + " y"
    assert len(tokenizer(text)["input_ids"]) > 70
    while len(tokenizer(text)["input_ids"]) != 77:
        text = text[1:] if len(tokenizer(text)["input_ids"]) > 77 else "z" + text
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, force_zeros_for_empty_prompt=zeros
    )
    pipeline.set_progress_bar_config(disable=True)
    config = {
        key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")
    }
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


def test_files_hold_the_images_and_their_parameters(tiny_sdxl, parts, tmp_path):
    frame = prompt_frame(
        ("../e\nvil", "a cat, 猫", "bad, <b>", 32, 48), ("p02", "plain", "", 48, 32)
    )
    seen = []
    table = sampling.sample_folder(
        tiny_sdxl,
        "run@12",
        frame,
        CONFIG,
        tmp_path / "out",
        progress=lambda *counts: seen.append(counts),
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
        assert lines[-1].startswith(
            "Steps: 6, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: "
        )
        assert (
            f"Seed: {row['seed']}, Size: {row['width']}x{row['height']}, Model: run@12" in lines[-1]
        )
        assert (lines[1] == f"Negative prompt: {row['negative']}") == bool(row["negative"])
    assert seen[-1] == (2, 2)


def test_a_size_that_the_vae_cannot_draw_is_refused(parts):
    frame = prompt_frame(("a", "x", "", 36, 32))
    with pytest.raises(EvaluationError, match="size 36x32 must be a multiple of 8"):
        draw(parts, frame)


def break_second_image(unet):
    """Makes the UNet answer NaN for the second image, the first time that it is asked."""

    def forget(module, arguments, output):
        hook.remove()
        output.sample[1] = torch.nan

    hook = unet.register_forward_hook(forget)


@pytest.mark.parametrize("how", [None, "latent", "pixels"])
def test_a_image_that_is_not_finite_is_a_row_without_a_file_and_the_others_stay_as_they_are(
    tiny_sdxl, parts, tmp_path, monkeypatch, how
):
    frame = prompt_frame(("a", "red cat", "", 32, 32), ("b", "a dog", "", 32, 32))
    config = changed(
        guidance_scale=1.0,
        second_pass=how and SecondPassConfig(scale=1.5, enlarge=how, num_steps=3),
    )
    whole = sampling.sample_folder(tiny_sdxl, "x", frame, config, tmp_path)
    expected = pixels(tmp_path, whole)[0]
    monkeypatch.setattr(sampling, "load_checkpoint", lambda *_: parts)
    break_second_image(parts.unet)
    table = sampling.sample_folder(tiny_sdxl, "x", frame, config, tmp_path)
    assert table.drop("file", "sha256").equals(whole.drop("file", "sha256"))
    assert table.select("file", "sha256").rows() == [
        whole.select("file", "sha256").row(0),
        (None, None),
    ]
    assert np.array_equal(pixels(tmp_path, table[:1])[0], expected)
    assert [path.name for path in tmp_path.iterdir()] == [whole["file"][0]]


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match="model_index"):
        sampling.sample_folder(tmp_path, "run@1", PROMPTS, CONFIG, tmp_path / "out")


# --- which model is drawn with
# ---------------------------------------------------------------------------------------


def pixels(folder, table):
    return [np.asarray(Image.open(folder / file)) for file in table["file"]]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_averaged_weights_are_drawn_with_where_they_are_asked_for(unbroken, tmp_path, weights):
    checkpoint = run_folder.checkpoints(unbroken.folder)[-1]
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    table = sampling.sample_folder(checkpoint, "run@48", frame, changed(weights=weights), tmp_path)
    raw, ema = (
        draw(load_pipeline_parts(model, "cpu"), frame)["a"]
        for model in (checkpoint, checkpoint / "ema")
    )
    assert not np.array_equal(raw, ema)
    picture = pixels(tmp_path, table)[0]
    assert np.array_equal(picture, {"raw": raw, "ema": ema}[weights])
    text = Image.open(tmp_path / table["file"][0]).text["parameters"]
    assert f"Model: {'run@48' if weights == 'raw' else 'run@48 ema'}, " in text


def test_a_model_without_averages_draws_with_its_own(tiny_sdxl, parts, tmp_path):
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    table = sampling.sample_folder(tiny_sdxl, "base", frame, changed(weights="ema"), tmp_path)
    assert np.array_equal(pixels(tmp_path, table)[0], draw(parts, frame)["a"])


def test_clip_skip_is_that_of_the_run_unless_told_otherwise(sd1_folder, unbroken, tmp_path):
    checkpoint = tmp_path / "samples_000000048"
    shutil.copytree(sd1_folder, checkpoint)
    ready = run_folder.read_ready(run_folder.checkpoints(unbroken.folder)[-1])
    run_folder.write_ready(
        checkpoint, dataclasses.replace(ready, config=ready.config | {"clip_skip": 2})
    )
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    sd1 = load_pipeline_parts(sd1_folder, "cpu")
    first, second = (
        dict(sampling.sample(sd1, frame, CONFIG, clip_skip=skip))["a"] for skip in (1, 2)
    )
    assert not np.array_equal(first, second)
    for folder, config, wanted in (
        (checkpoint, CONFIG, second), (checkpoint, changed(clip_skip=1), first),
        (sd1_folder, CONFIG, first), (sd1_folder, changed(clip_skip=2), second),
    ):  # fmt: skip
        table = sampling.sample_folder(folder, "x", frame, config, tmp_path / "out")
        assert np.array_equal(pixels(tmp_path / "out", table)[0], wanted)
        text = Image.open(tmp_path / "out" / table["file"][0]).text["parameters"]
        assert ("Clip skip: 2" in text) == (wanted is second)


def test_both_passes_take_the_tables_of_the_models_family(sd1_folder, monkeypatch):
    made, make = [], sampling.make_scheduler

    def record(*arguments, **options):
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sampling, "make_scheduler", record)
    config = changed(
        schedule="ays", num_steps=10, second_pass=SecondPassConfig(strength=0.5, num_steps=5)
    )
    dict(
        sampling.sample(
            load_pipeline_parts(sd1_folder, "cpu"), prompt_frame(("a", "x", "", 32, 32)), config
        )
    )
    table = AysSchedules["StableDiffusionSigmas"]
    assert made[0].sigmas.tolist() == pytest.approx(table)
    assert made[1].sigmas.tolist() == pytest.approx(table[5:])


def test_layers_that_are_not_there_are_refused(sd1_folder, parts):
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    with pytest.raises(EvaluationError, match=r"clip_skip=4: the text encoder has 3 layers"):
        dict(
            sampling.sample(
                load_pipeline_parts(sd1_folder, "cpu"), frame, changed(clip_skip=4), clip_skip=4
            )
        )
    with pytest.raises(
        EvaluationError, match="clip_skip=2: SDXL always reads the layer before the last"
    ):
        draw(parts, frame, clip_skip=2)
    latents = latents_of(
        parts, frame, clip_skip=2
    )  # of a run whose recipe named one: SDXL's encoders have no choice
    assert torch.equal(latents, latents_of(parts, frame))


def test_loras_are_drawn_with_and_named_in_the_image(tiny_sdxl, parts, tmp_path):
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    generator, key = torch.Generator().manual_seed(0), "lora_unet_conv_in"
    up, down = (
        torch.randn((8, 2, 1, 1), generator=generator),
        torch.randn((2, 4, 3, 3), generator=generator),
    )
    (tmp_path / "loras").mkdir()
    save_file(
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down},
        tmp_path / "loras" / "ink.safetensors",
    )
    config = changed(loras=(LoraConfig(path="loras/ink.safetensors", weight=0.5),))
    table = sampling.sample_folder(tiny_sdxl, "x", frame, config, tmp_path / "out", home=tmp_path)
    moved = copy.deepcopy(parts)
    moved.unet.conv_in.weight.data += 0.5 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    wanted = draw(moved, frame)["a"]
    assert not np.array_equal(wanted, draw(parts, frame)["a"])
    assert np.abs(pixels(tmp_path / "out", table)[0].astype(int) - wanted).max() <= 1
    lines = Image.open(tmp_path / "out" / table["file"][0]).text["parameters"].split("\n")
    assert lines[0] == "red cat <lora:ink:0.5>"
    assert f'Lora hashes: "ink: {lora_hash(tmp_path / "loras" / "ink.safetensors")}"' in lines[1]


# --- what is warned of
# -----------------------------------------------------------------------------------------------


def test_sdxl_on_the_plain_schedule_is_warned_of(parts, sd1_folder):
    frame = prompt_frame(("a", "red cat", "", 32, 32))
    with pytest.warns(
        UserWarning, match='schedule="plain" often draws garbage with SDXL; take "karras"'
    ):
        draw(parts, frame, schedule="plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(parts, frame, schedule="exponential")
        draw(parts, frame, sampler="ddim")
        draw(load_pipeline_parts(sd1_folder, "cpu"), frame, schedule="plain")
        zero = {
            **parts.noise_scheduler_config,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        }
        draw(dataclasses.replace(parts, noise_scheduler_config=zero), frame, schedule="plain")


# --- precision
# -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_parts(parts):
    """A model that may be rounded."""
    return dataclasses.replace(parts, unet=copy.deepcopy(parts.unet))


def test_bf16_is_the_unets_alone(own_parts, monkeypatch):
    seen = {}

    def watch(name, module, found):
        def hook(_, arguments, keywords, output):
            seen[name] = found(arguments, keywords, output)

        return module.register_forward_hook(hook, with_kwargs=True)

    unet, vae = own_parts.unet, own_parts.vae
    hooks = [
        watch(
            "sizes",
            unet.add_time_proj,
            lambda arguments, keywords, output: (arguments[0].dtype, output.dtype),
        ),
        watch("timestep", unet.time_proj, lambda arguments, keywords, output: output.dtype),
        watch(
            "unet",
            unet,
            lambda arguments, keywords, output: (arguments[0].dtype, output.sample.dtype),
        ),
        watch(
            "text",
            own_parts.text_encoders[1],
            lambda arguments, keywords, output: output.text_embeds.dtype,
        ),
        watch(
            "vae",
            vae.decoder,
            lambda arguments, keywords, output: (arguments[0].dtype, output.dtype),
        ),
    ]
    step = DPMSolverMultistepScheduler.step

    def watched(self, prediction, timestep, latents, **keywords):
        seen["step"] = (prediction.dtype, latents.dtype)
        return step(self, prediction, timestep, latents, **keywords)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", watched)
    draw(own_parts, prompt_frame(("a", "red cat", "", 32, 32)), precision="bf16")
    for hook in hooks:
        hook.remove()
    whole, half = torch.float32, torch.bfloat16
    assert seen == {
        "sizes": (whole, whole), "timestep": whole, "unet": (half, half), "text": whole, "vae": (whole, whole),
        "step": (whole, whole),
    }  # fmt: skip
    assert {parameter.dtype for parameter in unet.parameters()} == {half}


def test_bf16_draws_nearly_the_image_of_fp32(parts, own_parts):
    frame = prompt_frame(("a", "red cat", "blurry", 32, 48), ("b", "a dog", "", 32, 48))
    whole = draw(parts, frame, guidance_scale=1.5)
    half, again = (draw(own_parts, frame, guidance_scale=1.5, precision="bf16") for _ in range(2))
    for key, picture in half.items():
        away = np.abs(picture.astype(int) - whole[key]).mean()
        assert 0 < away < 0.1 * np.abs(whole["a"].astype(int) - whole["b"]).mean()
        assert np.array_equal(picture, again[key])


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_torchs_own_settings_do_not_loosen_fp32(parts, monkeypatch, precision):
    seen, forward, backends = set(), UNet2DConditionModel.forward, torch.backends

    def watched(self, *arguments, **keywords):
        seen.add((backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32))
        return forward(self, *arguments, **keywords)

    frame = prompt_frame(("a", "x", "", 32, 32))
    picture = draw(parts, frame)["a"]
    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    monkeypatch.setattr(backends.cudnn, "allow_tf32", True)  # as torch starts
    assert np.array_equal(draw(parts, frame, precision=precision)["a"], picture)
    assert seen == {(False, False)}  # also with "tf32", which a CPU does not have
    assert backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_all_precisions_draw_nearly_the_same_image_on_a_gpu(parts):
    frame, pictures = prompt_frame(("a", "red cat", "blurry", 32, 48)), {}
    for precision in ("fp32", "tf32", "bf16"):  # the last one rounds the model
        own = copy.deepcopy(parts)
        for module in (own.unet, *own.text_encoders):
            module.to("cuda")
        config = changed(guidance_scale=1.5, precision=precision)
        pictures[precision] = dict(sampling.sample(own, frame, config, device="cuda"))["a"].astype(
            int
        )
    for precision in ("tf32", "bf16"):
        assert np.abs(pictures[precision] - pictures["fp32"]).mean() < 5


def test_what_no_chunk_holds_of_a_prompt_is_told_by_id_and_tokens(parts):
    long = "y" * 224
    frame = prompt_frame(
        ("a", f"{long} z", "", 32, 32), ("b", f"{long} z x", f"({long}:1.2) x z", 32, 32), ("c", "x", "", 32, 32)
    )  # fmt: skip
    said = r"^2 prompts or negatives have more than 225 tokens, .*: prompt of 'b' 226, negative of 'b' 232$"
    with (
        pytest.warns(UserWarning, match=said),
        pytest.warns(UserWarning, match="negative of 'b': ':1.2\\)' is read as"),
    ):
        draw(parts, frame)
    weighted = cut_prompts(frame, parts.tokenizers[1], changed(prompt_weights="plain"))
    assert weighted == [
        {"prompt_id": "b", "text": "prompt", "tokens": 226, "not read": 1},
        {"prompt_id": "b", "text": "negative", "tokens": 226, "not read": 1},
    ]


def test_two_devices_draw_what_one_draws(tiny_sdxl, tmp_path):
    frame = prompt_frame(*((f"p{n}", f"a cat {n}", "", 32, 48) for n in range(5)))
    config = changed(batch_size=2)
    one = sampling.sample_folder(tiny_sdxl, "x", frame, config, tmp_path / "one")
    with contextlib.closing(
        ProcessPool("evaluate", sampling.ImageSampler, (), ["cpu", "cpu"], print)
    ) as pool:
        two = sampling.sample_folder(
            tiny_sdxl, "x", frame, config, tmp_path / "two", map_batches=pool.map
        )
    assert two.equals(one)
    assert all(
        (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
        for file in one["file"]
    )
