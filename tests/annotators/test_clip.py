"""CLIP's two embeddings equal transformers' own; pixels and text equal OpenAI's."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.annotators.clip import Clip, clean_text
from training.errors import ModelError
from training.models.pixels import CLIP_MEAN, CLIP_STD


@pytest.fixture(scope="module")
def clip(clip_folder):
    return Clip.load(clip_folder, "cpu")


# Sizes whose overhang is even: there transformers crops where OpenAI does.
@pytest.mark.parametrize(
    "size", [(224, 224), (1024, 1024), (300, 224), (896, 1152), (100, 100), (64, 68)]
)
def test_pixels_equal_transformers_where_it_is_right(clip, noise_image, size):
    image = noise_image(*size)
    expected = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(clip.preprocess(image), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "top", "left"), [((1216, 832), 52, 0), ((832, 1216), 0, 52), ((227, 224), 2, 0)]
)
def test_an_odd_overhang_is_rounded_to_even_as_by_openai(clip, noise_image, size, top, left):
    image = noise_image(*size)
    scale = 224 / min(size)
    height, width = int(size[0] * scale), int(size[1] * scale)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    crop = np.asarray(resized, np.float64)[top : top + 224, left : left + 224]
    expected = ((crop / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(clip.preprocess(image).numpy(), expected, atol=1e-5)


def test_one_pass_gives_both_embeddings_of_transformers(clip, clip_folder, noise_image):
    images = [noise_image(224, 224, seed=1), noise_image(300, 500, seed=2)]
    rows = clip(images)
    reference = CLIPModel.from_pretrained(clip_folder).eval()
    batch = torch.stack([clip.preprocess(image) for image in images])
    with torch.inference_mode():
        states = reference.vision_model(batch, output_hidden_states=True).hidden_states
        features = reference.get_image_features(pixel_values=batch).pooler_output
    expected = (features / features.norm(dim=1, keepdim=True)).numpy()
    for i, row in enumerate(rows):
        assert row.cls.shape == (32,)
        assert row.embedding.shape == (24,)
        np.testing.assert_allclose(row.cls, states[-1][i, 0].numpy(), atol=1e-6)
        np.testing.assert_allclose(row.embedding, expected[i], atol=1e-6)
        # Pooled by transformers means after the final norm: the class token must be before it.
        assert (
            abs(row.cls - reference.vision_model(batch).pooler_output[i].detach().numpy()).max()
            > 1e-3
        )


def test_text_equals_transformers_and_ends_with_eot(clip, clip_folder, monkeypatch):
    reference = CLIPModel.from_pretrained(clip_folder).eval()
    prompts = ["red cat", "a dog &amp; a cat", "x " * 200]
    seen = []
    forward = clip.model.text_model.forward
    monkeypatch.setattr(
        clip.model.text_model, "forward", lambda ids, **kw: seen.append(ids) or forward(ids, **kw)
    )
    result = clip.encode_text(prompts)
    assert seen[0].shape == (3, 77)
    assert seen[0][2, -1] == clip.tokenizer.eos_token_id
    assert seen[0][2, -2] != clip.tokenizer.eos_token_id
    monkeypatch.undo()
    cleaned = ["red cat", "a dog & a cat", "x " * 200]
    inputs = clip.tokenizer(
        cleaned, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        features = reference.get_text_features(**inputs).pooler_output
    np.testing.assert_allclose(
        result, (features / features.norm(dim=1, keepdim=True)).numpy(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  cat\n\tand\r\na dog ", "a cat and a dog"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt; it&#x27;s", "<b> it's"),
        (
            "a <b> &amp;amp;amp; c",
            "a <b> &amp; c",
        ),  # ftfy leaves entities alone beside markup; two rounds remain
        ("“curly” ‘quotes’ don’t", "\"curly\" 'quotes' don't"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ！", "Full width!"),
        ("ｶﾀｶﾅ ﬁre ﬂow oﬃce", "カタカナ fire flow office"),
        ("\ufeffa\x00b\x07 \x1b[31mred\x1b[0m", "ab red"),
        ("cafe\u0301", "café"),
        ("it\x92s", "it's"),
        ("½ … — « © 🦓", "½ … — « © 🦓"),
        ("", ""),
    ],
)
def test_texts_are_cleaned_as_ftfy_and_the_reference_do(text, cleaned):
    # The expected values are ftfy 6.3's followed by the reference's double unescape.
    assert clean_text(text) == cleaned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": 200}, "crops to 200"),
        ({"size": None}, "size=None"),
        ({"resample": 2}, "resample=2"),
    ],
)
def test_a_preprocessor_of_another_model_is_refused(clip_folder, tmp_path, change, message):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        Clip.load(folder, "cpu")


def test_missing_weights_say_where_they_come_from(tmp_path):
    with pytest.raises(ModelError, match="hf download openai/clip-vit-large-patch14"):
        Clip.load(tmp_path, "cpu")
