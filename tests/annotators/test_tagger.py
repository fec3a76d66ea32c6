"""JoyTag's published shape, and our pixels and rows around it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from training.annotators import tagger
from training.annotators.tagger import JOYTAG_STEM, Tagger, build, sine_positions
from training.errors import ModelError
from training.models.pixels import CLIP_MEAN, CLIP_STD

TINY = {
    "class": "ViT", "n_tags": 5, "image_size": 32, "num_blocks": 2, "patch_size": 16, "d_model": 16, "mlp_dim": 32,
    "num_heads": 2, "cnn_stem": "conv:c=8;ln;relu;conv:c=8;ln;relu;conv:c=16,s=1,k=1,p=0", "use_sine": True,
    "stochdepth_rate": 0.05, "loss_type": "focal2",
}  # fmt: skip
TAGS = ["zebra", "cat", "red_dress", "1girl", "sky"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tagger.save(tmp_path, build(TINY), TAGS)
    return tmp_path


def test_the_full_size_network_has_the_published_parameters():
    with torch.device("meta"):
        model = build(TINY | {
            "n_tags": 5813, "image_size": 448, "num_blocks": 12, "d_model": 768, "mlp_dim": 3072, "num_heads": 12,
            "cnn_stem": JOYTAG_STEM,
        })  # fmt: skip
        assert model(torch.empty(1, 3, 448, 448)).shape == (1, 5813)
    assert sum(parameter.numel() for parameter in model.parameters()) == 91_491_509
    names = set(model.state_dict())
    stem = {
        f"patch_embeddings.conv.{i}.{kind}" for i in (0, 3, 6, 9, 12) for kind in ("weight", "bias")
    }
    stem |= {
        f"patch_embeddings.conv.{i}.norm.{kind}"
        for i in (1, 4, 7, 10)
        for kind in ("weight", "bias")
    }
    layers = ("norm1", "qkv_proj", "out_proj", "norm2", "mlp.linear1", "mlp.linear2")
    blocks = {
        f"blocks.{i}.{layer}.{kind}"
        for i in range(12)
        for layer in layers
        for kind in ("weight", "bias")
    }
    blocks |= {f"blocks.{i}.skip_init{j}.skip" for i in range(12) for j in (1, 2)}
    assert names == stem | blocks | {
        f"{layer}.{kind}" for layer in ("norm", "head") for kind in ("weight", "bias")
    }


def test_positions_by_hand():
    table = sine_positions(2, 3, 8)
    assert table.shape == (6, 8)
    row = table[1 * 3 + 2]  # y = 1, x = 2; frequencies 1 and 1 / 10000
    expected = [f(v) for f, v in ((math.sin, 2), (math.sin, 2e-4), (math.cos, 2), (math.cos, 2e-4))]
    expected += [
        f(v) for f, v in ((math.sin, 1), (math.sin, 1e-4), (math.cos, 1), (math.cos, 1e-4))
    ]
    torch.testing.assert_close(row, torch.tensor(expected))


def test_a_block_equals_torch_multi_head_attention_and_exact_gelu():
    torch.manual_seed(0)
    block = build(TINY).blocks[0]
    x = torch.randn(2, 4, 16)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.in_proj_weight.data, attention.in_proj_bias.data = (
        block.qkv_proj.weight.data,
        block.qkv_proj.bias.data,
    )
    attention.out_proj.load_state_dict(block.out_proj.state_dict())
    normed = block.norm1(x)
    middle = x + 0.1 * attention(normed, normed, normed)[0]
    hidden = block.mlp.linear1(block.norm2(middle))
    expected = middle + 0.1 * block.mlp.linear2(
        hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    )
    torch.testing.assert_close(block(x), expected)


def test_pixels_are_centred_on_white(folder):
    model = Tagger.load(folder, "cpu")
    image = np.zeros((10, 32, 3), np.uint8)
    pixels = model.preprocess(image) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(
        CLIP_MEAN
    ).view(3, 1, 1)
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(pixels[:, :11], torch.ones(3, 11, 32))  # (32 - 10) // 2 rows above
    torch.testing.assert_close(pixels[:, 11:21], torch.zeros(3, 10, 32), atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, 21:], torch.ones(3, 11, 32))


def test_pixels_are_resized_bicubic_by_pillow(folder, noise_image):
    image = noise_image(50, 50)
    resized = np.asarray(
        Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), np.float64
    )
    expected = ((resized / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(
        Tagger.load(folder, "cpu").preprocess(image).numpy(), expected, atol=1e-5
    )


def test_rows_are_sorted_tags_above_the_floor(folder):
    model = Tagger.load(folder, "cpu")
    logits = torch.logit(
        torch.tensor([[0.9, 0.06, 0.04, 0.5, 0.0499], [0.01, 0.01, 0.01, 0.01, 0.01]])
    )
    rows = model.postprocess(logits)
    assert [name for name, _ in rows[0]] == ["1girl", "cat", "zebra"]
    assert [p for _, p in rows[0]] == pytest.approx([0.5, 0.06, 0.9], abs=1e-6)
    assert rows[1] == []


def test_a_batch_equals_its_images_one_by_one(folder, noise_image):
    model = Tagger.load(folder, "cpu")
    images = [noise_image(20, 40, seed=1), noise_image(64, 30, seed=2)]
    together, alone = model(images), [model([image])[0] for image in images]
    for row, other in zip(together, alone, strict=True):
        assert dict(row) == pytest.approx(dict(other), abs=1e-6)
    assert together[0] != together[1]


def test_old_files_with_nine_more_head_rows_are_cut(folder, noise_image):
    before = Tagger.load(folder, "cpu")([noise_image(32, 32)])
    state = load_file(folder / "model.safetensors")
    state["head.weight"] = torch.cat([state["head.weight"], torch.ones(9, 16)])
    state["head.bias"] = torch.cat([state["head.bias"], torch.ones(9)])
    save_file(state, folder / "model.safetensors")
    assert Tagger.load(folder, "cpu")([noise_image(32, 32)]) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "CLIP"}, "class='CLIP'"),
        ({"use_sine": False}, "use_sine"),
        ({"surprise": 1}, "unknown .'surprise'."),
        ({"num_heads": 3}, "num_heads=3"),
        ({"cnn_stem": "conv:c=8;bn"}, "word 'bn'"),
        ({"cnn_stem": "conv:c=8"}, "8 channels"),
        ({"n_tags": 6}, "another architecture"),
    ],
)
def test_configs_that_cannot_be_used_name_the_key(folder, change, message):
    (folder / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ModelError, match=message):
        Tagger.load(folder, "cpu")


def test_as_many_names_as_outputs(folder):
    (folder / "top_tags.txt").write_text("cat\ndog\n")
    with pytest.raises(ModelError, match="2 names for n_tags=5"):
        Tagger.load(folder, "cpu")


def test_missing_weights_say_where_they_come_from(tmp_path):
    with pytest.raises(ModelError, match="hf download fancyfeast/joytag"):
        Tagger.load(tmp_path, "cpu")
