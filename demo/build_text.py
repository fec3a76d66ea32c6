"""The demo's text encoders, taught what words mean before any image: prompts are matched with
scene descriptions.

One becomes SDXL's first encoder and CLIP's text side, the other SDXL's second. All later models
read them as they are.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from demo import build_tokenizer
from demo.corpus import SEED, wording
from demo.progress import steps
from demo.prompts import training_prompt
from demo.saving import clip_preprocessor, save_half, write_json
from demo.scenes import COLOURS, PATTERNS, SHAPES, Scene, mutate, sample_scene
from training.seeds import Purpose, integer

SIDE = 64
"""CLIP's input, pixels."""
WIDTH_1, WIDTH_2 = 64, 96
NUM_STEPS = 1500
BATCH = 96


def text_config(width: int, projection: int, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """CLIP text settings of demo size; ids and pooling as the tokenizer has them."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "projection_dim": projection,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": build_tokenizer.MAX_LENGTH,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of the demo's size."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": 64,
        "hidden_act": "gelu",
    }
    return CLIPModel(
        CLIPConfig(
            text_config=text_config(64, 64, tokenizer), vision_config=vision, projection_dim=64
        )
    )


def describe(scene: Scene) -> list[float]:
    """The scene as zeros and ones: what the words should tell."""
    kinds, colours = list(SHAPES), list(COLOURS)
    vector = [0.0] * (2 * (len(kinds) + len(colours)))
    for place, shape in enumerate(scene.shapes):
        offset = place * (len(kinds) + len(colours))
        vector[offset + kinds.index(shape.kind)] = 1.0
        vector[offset + len(kinds) + colours.index(shape.colour)] = 1.0
    vector += [float(scene.background == name) for name in colours]
    vector += [float(scene.pattern == name) for name in PATTERNS]
    vector += [
        float(len(scene.shapes) == 2),
        float(scene.large and len(scene.shapes) == 1),
        float(bool(scene.watermark)),
    ]
    return vector + [float(scene.quality >= level) for level in range(2, 10)]


def contrast(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss over (N, d) and (2N, d): of `second`, the first half is true, the other wrong in
    one word."""
    count = len(first)
    logits = scale.exp().clamp(max=50) * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    truth = torch.arange(count)
    hard = torch.stack([logits.diagonal(), logits[:, count:].diagonal()], dim=1)
    wrong = F.cross_entropy(hard, torch.zeros(count, dtype=torch.long))
    return (
        F.cross_entropy(logits, truth) / 2 + F.cross_entropy(logits[:, :count].T, truth) / 2 + wrong
    )


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Ids padded to the longest text; a causal encoder's pooled output does not see the padding."""
    return tokenizer(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    ).input_ids


class SceneMatch(nn.Module):
    """Maps scene descriptions into a text encoder's projected space; thrown away after training."""

    def __init__(self, projection: int) -> None:
        super().__init__()
        count = len(describe(sample_scene(SEED, "width")))
        self.scenes = nn.Sequential(nn.Linear(count, 192), nn.GELU(), nn.Linear(192, projection))
        self.facts = nn.Linear(projection, count)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, text: torch.Tensor, truth: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        """Loss of (2N, d) text of which the first half is true of `truth` (N, facts), the second of
        `wrong`."""
        count = len(truth)
        both = torch.cat([truth, wrong])
        scenes = self.scenes(both)
        known = F.binary_cross_entropy_with_logits(self.facts(F.normalize(text, dim=-1) * 8), both)
        return (
            contrast(scenes[:count], text, self.scale)
            + contrast(text[:count], scenes, self.scale)
            + 5 * known
        )


def build(models: Path, num_steps: int = NUM_STEPS) -> None:
    """Train both encoders; writes base/text_encoder{,_2}, base/tokenizer{,_2} and clip (images
    untrained)."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "text"))
    tokenizer = build_tokenizer.build(models / "base" / "tokenizer")
    build_tokenizer.build(models / "base" / "tokenizer_2", padding="!")
    clip = new_clip(tokenizer)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(WIDTH_2, WIDTH_2, tokenizer)))
    matches = [SceneMatch(clip.config.projection_dim), SceneMatch(WIDTH_2)]
    modules = [clip.text_model, clip.text_projection, second, *matches]
    parameters = [weight for module in modules for weight in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    for step in (bar := steps(num_steps, "text encoders")):
        scenes, texts = _batch(step)
        truth = torch.tensor([describe(scene) for scene in scenes])
        ids = tokens_of(tokenizer, texts)
        outputs = [
            clip.get_text_features(input_ids=ids).pooler_output,
            second(input_ids=ids).text_embeds,
        ]
        losses = [
            match(text, truth[:BATCH], truth[BATCH:])
            for match, text in zip(matches, outputs, strict=True)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        bar.note(first=float(losses[0].detach()), second=float(losses[1].detach()))
    first = CLIPTextModel(CLIPTextConfig(**text_config(WIDTH_1, WIDTH_1, tokenizer)))
    first.load_state_dict(clip.text_model.state_dict())
    save_half(first, models / "base" / "text_encoder")
    save_half(second, models / "base" / "text_encoder_2")
    save_half(clip, models / "clip")
    build_tokenizer.build(models / "clip")
    write_json(models / "clip" / "preprocessor_config.json", clip_preprocessor(SIDE))


def _batch(step: int) -> tuple[list[Scene], list[str]]:
    """BATCH scenes and their words, then the same with one thing changed, worded alike."""
    true, wrong, texts = [], [], []
    for number in range(BATCH):
        rng = wording("text", number, step)
        scene = sample_scene(SEED, "text", step, number, star_share=0.18)
        true.append(scene)
        wrong.append(mutate(scene, rng))
        state = rng.getstate()
        for one in (true[-1], wrong[-1]):
            rng.setstate(state)
            texts.append(training_prompt(one, rng, drop=0.1))
    return [*true, *wrong], [*texts[0::2], *texts[1::2]]
