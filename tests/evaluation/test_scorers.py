"""PickScore, HPS and ImageReward on tiny random models of their classes, against the published
computations."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPModel

from training.annotators.aesthetic import AestheticHead
from training.annotators.image_reward import MEAN, STD, ImageReward
from training.annotators.open_clip import from_open_clip
from training.config.evaluation import ScoringConfig
from training.errors import ConfigError, ModelError
from training.evaluation import scorers
from training.evaluation.scorers import Hps, PickScore
from training.models.pixels import CLIP_MEAN, CLIP_STD

TEXTS = ["red cat", "a dog", "red cat"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (40, 56), (64, 30))
    ]


def as_open_clip(state):
    """The tensors of a `CLIPModel` under open_clip's names: the other way round than ours, written
    out."""
    found = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for ours, theirs in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
            for number in range(2):
                old, new = f"{ours}.encoder.layers.{number}", f"{theirs}.resblocks.{number}"
                joint = [state[f"{old}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{new}.attn.in_proj_{kind}"] = torch.cat(joint)
                found[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
                found[f"{new}.ln_1.{kind}"] = state[f"{old}.layer_norm1.{kind}"]
                found[f"{new}.ln_2.{kind}"] = state[f"{old}.layer_norm2.{kind}"]
                found[f"{new}.mlp.c_fc.{kind}"] = state[f"{old}.mlp.fc1.{kind}"]
                found[f"{new}.mlp.c_proj.{kind}"] = state[f"{old}.mlp.fc2.{kind}"]
    return {name: value.clone() for name, value in found.items()}


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory, clip_folder):
    folder = shutil.copytree(clip_folder, tmp_path_factory.mktemp("hps") / "model")
    (folder / "preprocessor_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"  # as H/14; OpenAI's own is quick_gelu
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        as_open_clip(load_file(clip_folder / "model.safetensors")), folder / "model.safetensors"
    )
    return folder


def open_clip_features(state, tokens, image):
    """open_clip's forward pass in plain torch: text features `(1, d)` and image features `(1,
    d)`."""

    def block(prefix, x, mask):
        def norm(name, value):
            return F.layer_norm(
                value,
                value.shape[-1:],
                state[f"{prefix}.{name}.weight"],
                state[f"{prefix}.{name}.bias"],
            )

        y = norm("ln_1", x)
        attended, _ = F.multi_head_attention_forward(
            y, y, y, y.shape[-1], 2, state[f"{prefix}.attn.in_proj_weight"], state[f"{prefix}.attn.in_proj_bias"],
            None, None, False, 0.0, state[f"{prefix}.attn.out_proj.weight"], state[f"{prefix}.attn.out_proj.bias"],
            training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended
        y = F.linear(
            norm("ln_2", x), state[f"{prefix}.mlp.c_fc.weight"], state[f"{prefix}.mlp.c_fc.bias"]
        )
        return x + F.linear(
            F.gelu(y), state[f"{prefix}.mlp.c_proj.weight"], state[f"{prefix}.mlp.c_proj.bias"]
        )

    x = (state["token_embedding.weight"][tokens] + state["positional_embedding"])[
        :, None
    ]  # (77, 1, d)
    mask = torch.full((77, 77), -math.inf).triu(1)
    for number in range(2):
        x = block(f"transformer.resblocks.{number}", x, mask)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    text = x[tokens.argmax(), 0] @ state["text_projection"]
    patches = F.conv2d(image[None], state["visual.conv1.weight"], stride=16).flatten(2)[0].T
    x = (
        torch.cat([state["visual.class_embedding"][None], patches])
        + state["visual.positional_embedding"]
    )
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])[
        :, None
    ]
    for number in range(2):
        x = block(f"visual.transformer.resblocks.{number}", x, None)
    x = F.layer_norm(
        x[0, 0], x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"]
    )
    return text, x @ state["visual.proj"]


def test_pickscore_is_the_published_scaled_cosine(clip_folder, images):
    found = PickScore.load(clip_folder, "cpu").score(images, TEXTS)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    scorer = PickScore.load(clip_folder, "cpu")
    tokens = scorer._clip.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(
            pixel_values=torch.stack([scorer._clip.preprocess(one) for one in images]), **tokens
        )
    np.testing.assert_allclose(found, logits.logits_per_image.diagonal().numpy(), atol=1e-5)


def test_hps_is_open_clips_cosine_of_the_whole_image_on_black(hps_folder, images):
    scorer = Hps.load(hps_folder, "cpu")
    found = scorer.score(images, TEXTS)
    state = load_file(hps_folder / "model.safetensors")
    for picture, text, value in zip(images, TEXTS, found, strict=True):
        height, width = picture.shape[:2]
        scale = 32 / max(height, width)
        small = Image.fromarray(picture).resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
        square = np.zeros((32, 32, 3))
        top, left = (32 - small.height) // 2, (32 - small.width) // 2
        square[top : top + small.height, left : left + small.width] = np.asarray(small)
        image = torch.from_numpy(((square / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)).float()
        tokens = scorer._clip.tokenizer(
            [text], padding="max_length", max_length=77, return_tensors="pt"
        )["input_ids"][0]
        words, seen = open_clip_features(state, tokens, image)
        assert value == pytest.approx(F.cosine_similarity(words, seen, dim=0).item(), abs=1e-5)


def test_weights_of_another_architecture_are_refused(hps_folder, tmp_path):
    folder = shutil.copytree(hps_folder, tmp_path / "hps")
    state = load_file(folder / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"visual\.trunk\.stem\.weight, which is no weight of an open_clip"
    ):
        from_open_clip(state | {"visual.trunk.stem.weight": torch.zeros(1)}, folder)
    save_file(
        {name: value for name, value in state.items() if name != "visual.proj"},
        folder / "model.safetensors",
    )
    with pytest.raises(ModelError, match=r"1 missing \(visual_projection\.weight\)"):
        Hps.load(folder, "cpu")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A tiny ImageReward as published: names of BLIP's own code, BERT's vocabulary."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "a", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=16, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(words), hidden_size=64, encoder_hidden_size=128, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=1, max_position_embeddings=40, bos_token_id=None, eos_token_id=None, sep_token_id=None,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    head = AestheticHead(64)
    state = {}
    for name, value in vision.state_dict().items():
        for new, old in (
            ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm"),
            ("encoder.layers", "blocks"), ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"),
            ("layer_norm", "norm"),
        ):  # fmt: skip
            name = name.replace(new, old)  # noqa: PLW2901
        state[f"blip.visual_encoder.{name}"] = value
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state |= {f"mlp.{name}": value for name, value in head.state_dict().items()}
    state |= {
        "blip.text_proj.weight": torch.zeros(4, 64),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40),
    }
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    return folder, vision.eval(), text.eval(), head.eval()


def test_image_reward_is_computed_as_published(reward_folder, images):
    folder, vision, text, head = reward_folder
    found = ImageReward.load(folder, "cpu").score(images, TEXTS)
    ids = {"red": 5, "cat": 6, "a": 7, "dog": 8}
    for picture, prompt, value in zip(images, TEXTS, found, strict=True):
        short = min(picture.shape[:2])
        height, width = (int(32 * side / short) for side in picture.shape[:2])
        small = np.asarray(
            Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), np.float64
        )
        top, left = round((height - 32) / 2), round((width - 32) / 2)
        crop = (small[top : top + 32, left : left + 32] / 255 - CLIP_MEAN) / CLIP_STD
        tokens = [2, *(ids[word] for word in prompt.split()), 3]
        with torch.no_grad():
            seen = vision(torch.from_numpy(crop.transpose(2, 0, 1)).float()[None]).last_hidden_state
            read = text(
                input_ids=torch.tensor([tokens]), encoder_hidden_states=seen, attention_mask=torch.ones(1, len(tokens)),
                encoder_attention_mask=torch.ones(seen.shape[:2]),
            ).last_hidden_state[0, 0]  # fmt: skip
            expected = (head(read[None]).item() - MEAN) / STD
        assert value == pytest.approx(expected, abs=1e-5)
    assert found[0] != found[2], "the image counts"


def test_the_published_towers_have_the_sizes_of_blip_large(reward_folder):
    from training.annotators import image_reward

    state = {"patch_embed.proj.weight": torch.empty(1024, 3, 16, 16), "pos_embed": torch.empty(1, 197, 1024),
             "blocks.0.mlp.fc1.weight": torch.empty(4096, 1024), "blocks.23.norm1.bias": torch.empty(1024)}  # fmt: skip
    config = image_reward._vision_config(state)
    assert (config.image_size, config.num_attention_heads, config.layer_norm_eps) == (224, 16, 1e-6)


def test_weights_that_are_not_image_rewards_are_refused(reward_folder, tmp_path):
    folder = shutil.copytree(reward_folder[0], tmp_path / "reward")
    save_file({"mlp.layers.0.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(
        ModelError,
        match=r"no weights under blip\.visual_encoder\., blip\.text_encoder\.: it is not",
    ):
        ImageReward.load(folder, "cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [("pickscore", ["hf download yuvalkirstain/PickScore_v1", "vocab.json"]),
     ("hps_v2", ["HPS_v2.1_compressed.pt", "weights_only=True", "['state_dict']"]),
     ("image_reward", ["zai-org/ImageReward", "ImageReward.pt", "vocab.txt"])],
)  # fmt: skip
def test_missing_weights_say_which_from_where_and_how(name, words, tmp_path):
    with pytest.raises(ModelError, match="missing") as error:
        scorers.load({name: tmp_path}, "cpu")
    for word in (*words, str(tmp_path), "model.safetensors"):
        assert word in str(error.value)


def test_scorers_are_chosen_by_name(clip_folder, hps_folder):
    assert set(scorers.SCORERS) == set(
        ScoringConfig.__annotations__["scorers"].__args__[0].__args__
    )
    loaded = scorers.load({"pickscore": clip_folder, "hps_v2": hps_folder}, "cpu")
    assert list(loaded) == ["pickscore", "hps_v2"]
    with pytest.raises(ConfigError, match="must name each scorer once"):
        ScoringConfig(scorers=("pickscore", "pickscore"))


def test_a_prompt_is_encoded_once(clip_folder, images, monkeypatch):
    scorer, read = PickScore.load(clip_folder, "cpu"), []
    encode = scorer._clip.encode_text
    monkeypatch.setattr(
        scorer._clip, "encode_text", lambda texts: read.extend(texts) or encode(texts)
    )
    scorer.score(images, TEXTS)
    scorer.score(images[:2], TEXTS[:2])
    assert read == ["red cat", "a dog"]
