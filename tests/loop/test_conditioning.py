import dataclasses

import pytest
import torch

from training.errors import ConfigError
from training.loop.conditioning import make_time_ids, predict
from training.models.full_model import trained_parameters
from training.models.unet import load_pipeline_parts


def test_time_ids_of_a_hand_worked_image():
    # A photograph of 3000 x 4000 (height x width) shrunk by 0.224 to 672 x 896 for the bucket 640 x
    # 896: 32 rows of slack, of which 11 lie above the crop.
    ids = make_time_ids(
        torch.tensor([[3000.0, 4000.0]]),
        torch.tensor([[11.0, 0.0]]),
        torch.tensor([[640.0, 896.0]]),
    )
    assert ids.tolist() == [[3000, 4000, 11, 0, 640, 896]]
    assert ids.dtype == torch.float32


def test_time_ids_are_the_pipelines(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    theirs = pipeline._get_add_time_ids(
        (3000, 4000), (11, 7), (640, 896), dtype=torch.float32,
        text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    ours = make_time_ids(*(torch.tensor([pair]) for pair in ((3000, 4000), (11, 7), (640, 896))))
    assert torch.equal(ours, theirs)


def test_prediction_is_the_librarys_with_the_pipelines_own_text_encoding(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    prompt = ["a b c", ""]
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    noised, steps = torch.randn(2, 4, 4, 6), torch.tensor([3, 900])
    time_ids = torch.tensor([[64.0, 80, 0, 8, 32, 48]] * 2)
    theirs = pipeline.unet(
        noised,
        steps,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    ids = [
        tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[:, None]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    torch.testing.assert_close(predict(parts, noised, steps, ids, time_ids), theirs)
    moved = predict(parts, noised, steps, ids, time_ids + torch.tensor([0, 0, 5.0, 0, 0, 0]))
    assert not torch.allclose(moved, theirs)


def test_every_trained_parameter_gets_a_gradient_and_no_other_wants_one(tiny_sdxl):
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    trained = trained_parameters(parts, text_encoder=True, text_encoder_2=True)
    ids = [torch.full((2, 1, 77), 5)] * 2
    predict(
        parts, torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), ids, torch.ones(2, 6)
    ).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    wanting = {
        id(parameter)
        for module in (parts.unet, parts.vae, *parts.text_encoders)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    assert wanting == {id(parameter) for parameter in trained.values()}


@pytest.fixture
def sd1(tiny_sdxl):
    """A tiny SD 1.x: the first text encoder alone, and a UNet that is told nothing else."""
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    config = dict(parts.unet.config) | {
        "cross_attention_dim": parts.text_encoders[0].config.hidden_size, "addition_embed_type": None,
        "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None,
    }  # fmt: skip
    torch.manual_seed(0)
    return dataclasses.replace(
        parts, family="sd1", unet=type(parts.unet).from_config(config).eval(), text_encoders=parts.text_encoders[:1],
        tokenizers=parts.tokenizers[:1],
    )  # fmt: skip


def batch(seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(3, 4, 4, 4),
        torch.tensor([3, 500, 900]),
        torch.randint(0, 200, (3, 2, 77)),
        torch.ones(3, 6),
    )


@pytest.mark.parametrize("family", ["sdxl", "sd1"])
def test_zeroed_samples_read_zeros_and_the_others_their_text(tiny_sdxl, sd1, family):
    parts = sd1 if family == "sd1" else load_pipeline_parts(tiny_sdxl, "cpu")
    noised, steps, ids, time_ids = batch()
    ids = [ids] * len(parts.text_encoders)
    zeroed = torch.tensor([False, True, False])
    with torch.no_grad():
        plain, some = (
            predict(parts, noised, steps, ids, time_ids, zeroed=flags) for flags in (None, zeroed)
        )
        text = torch.zeros(3, 2 * 77, parts.unet.config.cross_attention_dim)
        added = (
            {"text_embeds": torch.zeros(3, 8), "time_ids": time_ids} if family == "sdxl" else None
        )
        nothing = parts.unet(
            noised, steps, encoder_hidden_states=text, added_cond_kwargs=added
        ).sample
        others = predict(parts, noised, steps, [i.flip(-1) for i in ids], time_ids, zeroed=zeroed)
        moved = predict(parts, noised, steps, ids, time_ids * 3, zeroed=zeroed)
    torch.testing.assert_close(some[1], nothing[1])
    torch.testing.assert_close(some[0::2], plain[0::2])
    torch.testing.assert_close(some[1], others[1])
    assert not torch.allclose(some[1], plain[1])
    assert torch.allclose(some[1], moved[1]) == (family == "sd1"), (
        "size conditioning is never dropped"
    )


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_reads_an_earlier_layer_and_trains_none_behind_it(sd1, clip_skip):
    noised, steps, ids, time_ids = batch()
    trained = trained_parameters(sd1, text_encoder=True, text_encoder_2=False, clip_skip=clip_skip)
    prediction = predict(sd1, noised, steps, [ids], time_ids, clip_skip=clip_skip)
    prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    encoder = sd1.text_encoders[0]
    with torch.no_grad():
        # As kohya-ss/sd-scripts and naifu-diffusion do for SD 1.x: hidden states of that layer,
        # through the final norm.
        states = encoder(ids.flatten(0, 1), output_hidden_states=True).hidden_states[-clip_skip]
        text = encoder.final_layer_norm(states).reshape(3, 154, -1)
        expected = sd1.unet(noised, steps, encoder_hidden_states=text).sample
    torch.testing.assert_close(prediction, expected)
    layers = {
        name.split(".")[3] for name in trained if name.startswith("text_encoder.encoder.layers")
    }
    assert layers == {str(number) for number in range(3 - clip_skip + 1)}


def test_clip_skip_beyond_the_encoder_is_refused(sd1):
    with pytest.raises(ConfigError, match="clip_skip=4: the text encoder has 3 layers"):
        trained_parameters(sd1, text_encoder=True, text_encoder_2=False, clip_skip=4)


def test_frozen_embeddings_stay_while_the_rest_of_the_encoders_trains(tiny_sdxl):
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    whole, rest = (
        trained_parameters(parts, text_encoder=True, text_encoder_2=True, freeze_embeddings=frozen)
        for frozen in (False, True)
    )
    assert whole.keys() - rest.keys() == {
        "text_encoder.embeddings.token_embedding.weight", "text_encoder.embeddings.position_embedding.weight",
        "text_encoder_2.text_model.embeddings.token_embedding.weight",
        "text_encoder_2.text_model.embeddings.position_embedding.weight",
    }  # fmt: skip
    assert not parts.text_encoders[0].embeddings.token_embedding.weight.requires_grad
    assert parts.text_encoders[0].encoder.layers[0].layer_norm1.weight.requires_grad


def test_sd1_has_no_second_encoder_to_train(sd1):
    trained = trained_parameters(sd1, text_encoder=True, text_encoder_2=True)
    assert {name.split(".")[0] for name in trained} == {"unet", "text_encoder"}
