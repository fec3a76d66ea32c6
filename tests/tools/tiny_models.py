"""Tiny models with random weights, of the real classes, written once per session as folders of the
real layout."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY_SIZE = 520
BOS, EOS = 518, 519
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def make_tokenizer(pad_token="<|endoftext|>"):
    letters = list(bytes_to_unicode().values())
    merges = [
        ("r", "e"),
        ("re", "d</w>"),
        ("a", "t</w>"),
        ("c", "at</w>"),
        ("d", "o"),
        ("do", "g</w>"),
    ]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
    ]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == VOCABULARY_SIZE
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def text_config(width, act="quick_gelu", **extra):
    return CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=24, hidden_act=act, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=EOS, **extra,
    )  # fmt: skip


def make_vae(**extra):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, sample_size=32, **extra,
    )  # fmt: skip


def make_unet(cross_attention_dim, **extra):
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        cross_attention_dim=cross_attention_dim, use_linear_projection=True, **extra,
    )  # fmt: skip


def save_parts(folder, parts, pipeline):
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = type(part).__module__.split(".")[0]
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    torch.manual_seed(1)
    parts = {
        "unet": make_unet(
            16 + 32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        "vae": make_vae(scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(text_config(16)),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(32, "gelu")),
        "tokenizer": make_tokenizer(),
        "tokenizer_2": make_tokenizer("!"),
        "scheduler": DDPMScheduler(beta_schedule="scaled_linear", steps_offset=1),
    }  # fmt: skip
    return save_parts(tmp_path_factory.mktemp("sdxl"), parts, "StableDiffusionXLPipeline")


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    torch.manual_seed(2)
    parts = {
        "unet": make_unet(16),
        "vae": make_vae(),
        "text_encoder": CLIPTextModel(text_config(16)),
        "tokenizer": make_tokenizer(),
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
    }
    return save_parts(tmp_path_factory.mktemp("sd1"), parts, "StableDiffusionPipeline")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("clip")
    vision = TOWER | {"image_size": 224}
    config = CLIPConfig(
        text_config=text_config(16).to_dict(),
        vision_config={**vision, "patch_size": 56},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    preprocessor = {"size": 224, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def owlv2_folder(tmp_path_factory):
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("owlv2")
    config = Owlv2Config(
        text_config={**TOWER, "vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 16},
        vision_config={**TOWER, "image_size": 96, "patch_size": 16},
        projection_dim=32,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    make_tokenizer("!").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 96, "width": 96}})
    )
    return folder


@pytest.fixture
def noise_image():
    """Draws `(height, width, 3)` noise, the hardest image for any resampling."""

    def draw(height, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(
            0, 256, (height, width, 3), generator=generator, dtype=torch.uint8
        ).numpy()

    return draw
