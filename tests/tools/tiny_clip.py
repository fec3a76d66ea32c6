"""A tiny CLIP and aesthetic head with random weights, as folders of the real layout."""

import json

import pytest


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tiny_sdxl):
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    torch.manual_seed(3)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
    }
    config = CLIPConfig(
        text_config={**tower, **words, "pad_token_id": len(tokenizer) - 1},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def aesthetic_folder(tmp_path_factory):
    import torch

    from training.annotators import aesthetic

    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("aesthetic")
    aesthetic.save(folder, aesthetic.AestheticHead(12))
    return folder
