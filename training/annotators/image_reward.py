"""ImageReward: BLIP reads prompt and image together, and five linear layers turn its class token
into a score.

Source: Xu et al., arXiv:2304.05977, and zai-org/ImageReward (Apache-2.0). transformers has both
towers of BLIP, so that only the names of the published weights have to be mapped.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from training.annotators import aesthetic
from training.annotators.clip import exact, openai_pixels
from training.annotators.published import pickle_command
from training.errors import ModelError
from training.models import pixels, weights

TEXT_LENGTH = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score on the authors' data; the score is told in these."""
_FILES = ("model.safetensors", "vocab.txt")
_HEAD_WIDTH = 64
"""Of an attention head, in both towers."""
_LEFT_OUT = re.compile(r"blip\.(vision_proj|text_proj)\.|position_ids$")
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageReward:
    """The adapter: images and their prompts to scores, about -2 to 2."""

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: aesthetic.AestheticHead, tokenizer: BertTokenizer,
        device: str | torch.device,
    ) -> None:  # fmt: skip
        for tower in (vision, text, head):
            tower.to(device, torch.float32).eval().requires_grad_(False)
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer = tokenizer
        self.device = torch.device(device)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "ImageReward":
        """Load the published weights, as safetensors under their own names, and BERT's vocabulary.

        Raises:
            ModelError: Files are missing, or the weights are of another model.
        """
        weights.require(
            folder,
            _FILES,
            name="ImageReward",
            source="https://huggingface.co/zai-org/ImageReward and google-bert/bert-base-uncased",
            command=f"hf download google-bert/bert-base-uncased vocab.txt --local-dir {folder} && "
            + pickle_command("zai-org/ImageReward", "ImageReward.pt", folder),
        )
        path = folder / "model.safetensors"
        state = {
            name: value
            for name, value in weights.read_tensors(path).items()
            if not _LEFT_OUT.search(name)
        }
        parts = {
            prefix: _under(state, prefix)
            for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        }
        if empty := [prefix for prefix, own in parts.items() if not own]:
            raise ModelError(
                f"{path} holds no weights under {', '.join(empty)}: it is not ImageReward's"
            )
        seen, read, scored = parts.values()
        with weights.Unfilled():
            vision = BlipVisionModel(_vision_config(seen))
            text = BlipTextModel(_text_config(read), add_pooling_layer=False)
        head = aesthetic.AestheticHead(text.config.hidden_size)
        renamed = {_vision_name(name): value for name, value in seen.items()}
        for module, own in ((vision, renamed), (text, read), (head, scored)):
            weights.load_state(module, own, path)
        return cls(
            vision, text, head, BertTokenizer.from_pretrained(folder, local_files_only=True), device
        )

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Scores `(B,)` fp64 of `(H, W, 3)` uint8 images with their prompts, which are cut at 35
        tokens."""
        size: int = self.vision.config.image_size
        seen = [
            openai_pixels(image, size, size, pixels.CLIP_MEAN, pixels.CLIP_STD) for image in images
        ]
        words = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        ).to(self.device)
        with exact():
            patches = self.vision(
                torch.stack(seen).to(self.device)
            ).last_hidden_state  # (B, 1 + patches, d_vision)
            read = self.text(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones(
                    patches.shape[:2], dtype=torch.int64, device=self.device
                ),
            )
            raw = self.head(read.last_hidden_state[:, 0])  # (B,)
        return ((raw.cpu().double() - MEAN) / STD).numpy()


def _under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _vision_name(name: str) -> str:
    """transformers' name of a tensor of BLIP's vision tower."""
    for pattern, replacement in _VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _vision_config(state: Mapping[str, torch.Tensor]) -> BlipVisionConfig:
    """The tower that the weights are of, from their shapes."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0], image_size=side * patch,
        patch_size=patch, num_hidden_layers=_count(state, r"^blocks\.(\d+)\."),
        num_attention_heads=width // _HEAD_WIDTH, layer_norm_eps=1e-6,
    )  # fmt: skip


def _text_config(state: Mapping[str, torch.Tensor]) -> BlipTextConfig:
    words, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words, hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        num_hidden_layers=_count(state, r"^encoder\.layer\.(\d+)\."), num_attention_heads=width // _HEAD_WIDTH,
        bos_token_id=None, eos_token_id=None, sep_token_id=None, pad_token_id=0,
    )  # fmt: skip


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Number of layers."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
