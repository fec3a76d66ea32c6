"""One chunk equals diffusers' own prompt encoding; more chunks equal it chunk by chunk."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel

from training.errors import ModelError
from training.models.text_encoders import encode_sd1, encode_sdxl, ids_tensor, load_tokenizer
from training.models.tokens import tokenize

PROMPTS = ["", "red cat", "a dog, watermark, score_9"]


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sd1(sd1_folder):
    return StableDiffusionPipeline.from_pretrained(sd1_folder)


def tokenize_batch(prompts, tokenizers):
    num_chunks = max(prompt.num_chunks for prompt in tokenize(prompts, tokenizers[0]))
    return [
        ids_tensor(tokenize(prompts, tokenizer, min_chunks=num_chunks), "cpu")
        for tokenizer in tokenizers
    ]


def encode(pipeline, prompts):
    ids = tokenize_batch(prompts, (pipeline.tokenizer, pipeline.tokenizer_2))
    with torch.inference_mode():
        return encode_sdxl(pipeline.text_encoder, pipeline.text_encoder_2, *ids)


def test_sdxl_at_77_tokens_equals_diffusers(sdxl):
    result = encode(sdxl, PROMPTS)
    with torch.inference_mode():
        states, _, pooled, _ = sdxl.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert result.hidden_states.shape == (3, 77, 48)
    assert torch.equal(result.hidden_states, states)
    assert torch.equal(result.pooled, pooled)


def test_long_prompts_are_encoded_chunk_by_chunk_and_pooled_from_the_first(sdxl):
    words = [("red", "cat", "dog")[n % 3 if n < 100 else n % 2] for n in range(200)]
    result = encode(sdxl, [" ".join(words), "red cat"])
    assert result.hidden_states.shape == (2, 3 * 77, 48)
    for chunk in range(3):
        part = " ".join(words[75 * chunk : 75 * chunk + 75])
        with torch.inference_mode():
            states, _, pooled, _ = sdxl.encode_prompt(part, do_classifier_free_guidance=False)
        torch.testing.assert_close(result.hidden_states[:1, 77 * chunk : 77 * chunk + 77], states)
        if chunk == 0:
            torch.testing.assert_close(result.pooled[:1], pooled)
        else:
            assert not torch.allclose(result.pooled[:1], pooled)
    short = encode(sdxl, ["red cat"])
    torch.testing.assert_close(result.hidden_states[1:, :77], short.hidden_states)
    torch.testing.assert_close(result.pooled[1:], short.pooled)


def test_each_encoder_gets_its_own_pads(sdxl):
    first, second = tokenize_batch(["red cat"], (sdxl.tokenizer, sdxl.tokenizer_2))
    eos = sdxl.tokenizer.eos_token_id
    assert first.shape == second.shape == (1, 1, 77)
    assert first[0, 0, 3:].tolist() == [eos] * 74
    assert second[0, 0, 3:].tolist() == [eos] + [0] * 73
    assert first[0, 0, :3].tolist() == second[0, 0, :3].tolist()


def test_sd1_equals_diffusers(sd1):
    (ids,) = tokenize_batch(PROMPTS, (sd1.tokenizer,))
    with torch.inference_mode():
        result = encode_sd1(sd1.text_encoder, ids)
        expected = [sd1.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS]
    assert result.pooled is None
    torch.testing.assert_close(result.hidden_states, torch.cat(expected))


def test_clip_skip_2_equals_an_encoder_without_its_last_layer(sd1):
    # diffusers' own clip_skip for SD 1.x does not run with transformers >= 5.6 (it asks for
    # `.text_model`).
    config = copy.deepcopy(sd1.text_encoder.config)
    config.num_hidden_layers -= 1
    shorter = CLIPTextModel(config).eval()
    shorter.load_state_dict(sd1.text_encoder.state_dict(), strict=False)
    (ids,) = tokenize_batch(PROMPTS, (sd1.tokenizer,))
    with torch.inference_mode():
        skipped = encode_sd1(sd1.text_encoder, ids, clip_skip=2).hidden_states
        assert not torch.allclose(skipped, encode_sd1(sd1.text_encoder, ids).hidden_states)
        torch.testing.assert_close(skipped, shorter(ids.flatten(0, 1)).last_hidden_state)


def test_gradients_reach_the_encoders(sdxl):
    ids = tokenize_batch(["red cat"], (sdxl.tokenizer, sdxl.tokenizer_2))
    embedding = sdxl.text_encoder.get_input_embeddings().weight
    embedding.requires_grad_(True)
    encode_sdxl(sdxl.text_encoder, sdxl.text_encoder_2, *ids).hidden_states.sum().backward()
    assert embedding.grad.abs().sum() > 0
    embedding.grad = None


def test_a_batch_has_one_number_of_chunks(sdxl):
    prompts = tokenize(["red", "cat " * 100], sdxl.tokenizer)
    with pytest.raises(AssertionError, match="share a number of chunks"):
        ids_tensor(prompts, "cpu")


def test_a_folder_without_vocabulary_is_no_tokenizer(sdxl_folder, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        (sdxl_folder / "tokenizer/tokenizer_config.json").read_text()
    )
    with pytest.raises(ModelError, match=r"neither tokenizer.json nor vocab.json and merges.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_the_old_pair_of_vocabulary_files_loads_too(sdxl, tmp_path):
    sdxl.tokenizer.backend_tokenizer.model.save(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded("a red cat!").input_ids == sdxl.tokenizer("a red cat!").input_ids
