"""JoyTag: which of several thousand tags an image shows, with a probability each.

Own implementation of the published architecture, under its weights' names: neither transformers nor
timm can load them. Source: fancyfeast/joytag (Apache-2.0), a ViT-B/16 behind a convolutional stem.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from training.errors import ModelError
from training.models import pixels, weights

JOYTAG_STEM = "conv:c=64;ln;relu;conv:c=128;ln;relu;conv:c=256;ln;relu;conv:c=512;ln;relu;conv:c=768,s=1,k=1,p=0"
PROBABILITY_FLOOR = 0.05
_FILES = ("config.json", "model.safetensors", "top_tags.txt")
_REQUIRED = (
    "n_tags",
    "image_size",
    "num_blocks",
    "patch_size",
    "d_model",
    "mlp_dim",
    "num_heads",
    "cnn_stem",
)
# Arguments of the published config that only training reads, or whose other value changes no
# result.
_WITHOUT_EFFECT = ("stochdepth_rate", "loss_type", "layerscale_init", "head_mean_after")
# Early JoyTag files carry 3 rating and 6 score rows behind the tags.
_OLD_EXTRA_ROWS = 9


class JoyTagViT(nn.Module):
    """The network: pixels to one logit per tag."""

    def __init__(
        self,
        *,
        n_tags: int,
        image_size: int,
        num_blocks: int,
        patch_size: int,
        d_model: int,
        mlp_dim: int,
        num_heads: int,
        cnn_stem: str,
    ) -> None:
        super().__init__()
        if d_model % num_heads or d_model % 4:
            raise ModelError(
                f"tagger: d_model={d_model} must be a multiple of 4 and of num_heads={num_heads}"
            )
        self.config: dict[str, Any] = {
            "n_tags": n_tags,
            "image_size": image_size,
            "num_blocks": num_blocks,
            "patch_size": patch_size,
            "d_model": d_model,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "cnn_stem": cnn_stem,
        }
        self.patch_embeddings = _Stem(cnn_stem, d_model)
        self.blocks = nn.ModuleList(_Block(d_model, mlp_dim, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_tags)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, n_tags)` of normalised images `(B, 3, S, S)`."""
        grid = self.patch_embeddings(images)  # (B, d, S/16, S/16)
        x = grid.flatten(2).transpose(1, 2)  # (B, tokens, d)
        x = x + sine_positions(grid.shape[2], grid.shape[3], grid.shape[1]).to(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(dim=1))  # (B, n_tags)
        return logits


def sine_positions(height: int, width: int, depth: int) -> torch.Tensor:
    """2-D positions `(height * width, depth)` fp32: sin x, cos x, sin y, cos y, a quarter of it
    each."""
    quarter = depth // 4
    # Clamped so that the smallest depth, 4, has one frequency instead of 0 / 0.
    frequencies = 10_000.0 ** -(torch.arange(quarter) / max(quarter - 1, 1))  # (depth / 4,)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles_x = x.reshape(-1, 1) * frequencies
    angles_y = y.reshape(-1, 1) * frequencies
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)


class Tagger:
    """The adapter: images to tags with probabilities above `PROBABILITY_FLOOR`."""

    def __init__(self, model: JoyTagViT, tags: Sequence[str], device: str | torch.device) -> None:
        if len(tags) != model.config["n_tags"]:
            raise ModelError(
                f"tagger: {len(tags)} names for n_tags={model.config['n_tags']} outputs"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.tags = tuple(tags)
        self.device = torch.device(device)
        self.image_size = int(model.config["image_size"])

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Tagger":
        """Load JoyTag, or a tiny sibling, from its three files.

        Raises:
            ModelError: Files are missing, or weights, config and tag list do not belong together.
        """
        weights.require(
            folder,
            _FILES,
            name="tagger JoyTag",
            source="https://huggingface.co/fancyfeast/joytag",
            command=f"hf download fancyfeast/joytag {' '.join(_FILES)} --local-dir {folder}",
        )
        with weights.Unfilled():
            model = build(weights.read_config(folder / "config.json"))
        state = weights.read_tensors(folder / "model.safetensors")
        n_tags = model.head.out_features
        if len(state.get("head.bias", ())) == n_tags + _OLD_EXTRA_ROWS:
            state["head.weight"] = state["head.weight"][:n_tags]
            state["head.bias"] = state["head.bias"][:n_tags]
        weights.load_state(model, state, folder / "model.safetensors")
        lines = (folder / "top_tags.txt").read_text("utf-8").splitlines()
        return cls(model, [line.strip() for line in lines if line.strip()], device)

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` uint8 to `(3, S, S)` fp32: centred on white, bicubic to S, normalised like
        CLIP."""
        pixels.check_rgb(image)
        height, width = image.shape[:2]
        side = max(height, width)
        square = Image.new("RGB", (side, side), "white")
        square.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
        if side != self.image_size:
            square = square.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return pixels.normalise(np.asarray(square), pixels.CLIP_MEAN, pixels.CLIP_STD)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits `(B, n_tags)` of preprocessed images `(B, 3, S, S)`, in fp32 on the adapter's
        device."""
        with torch.inference_mode():
            return self.model(batch.to(self.device))

    def postprocess(self, logits: torch.Tensor) -> list[list[tuple[str, float]]]:
        """Per image, the (tag, probability) pairs above the floor, sorted by tag."""
        rows = torch.sigmoid(logits.float()).cpu().tolist()
        return [
            sorted((tag, p) for tag, p in zip(self.tags, row, strict=True) if p > PROBABILITY_FLOOR)
            for row in rows
        ]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[tuple[str, float]]]:
        """Tag a batch of `(H, W, 3)` uint8 images of any sizes; one row per image."""
        return self.postprocess(
            self.forward(torch.stack([self.preprocess(image) for image in images]))
        )


def build(config: dict[str, Any]) -> JoyTagViT:
    """The network with fresh weights for JoyTag's own `config.json` (`class` and constructor
    arguments).

    Raises:
        ModelError: A key is missing or unknown, or asks for a variant that JoyTag's release does
            not use.
    """
    if config.get("class") != "ViT":
        raise ModelError(
            f"tagger: config class={config.get('class')!r}, but only 'ViT' (JoyTag) is known"
        )
    if not config.get("use_sine", True) or config.get("patch_dropout", 0):
        raise ModelError("tagger: only use_sine=true with patch_dropout=0 is supported")
    known = {*_REQUIRED, *_WITHOUT_EFFECT, "class", "use_sine", "patch_dropout"}
    missing = [key for key in _REQUIRED if key not in config]
    unknown = sorted(config.keys() - known)
    if missing or unknown:
        raise ModelError(f"tagger: config.json lacks {missing} and has unknown {unknown}")
    return JoyTagViT(**{key: config[key] for key in _REQUIRED})


def save(
    folder: Path, model: JoyTagViT, tags: Sequence[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write the three files that `Tagger.load` reads; `dtype` is that of the stored weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")
    config = {"class": "ViT", **model.config, "use_sine": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "top_tags.txt").write_text("".join(f"{tag}\n" for tag in tags), "utf-8")


class _Stem(nn.Module):
    """Convolutions written as `conv:c=64,k=3,s=2,p=1;ln;relu;…` (those are the defaults of k, s and
    p)."""

    def __init__(self, grammar: str, d_model: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for word in grammar.split(";"):
            kind, _, options = word.partition(":")
            if kind == "conv":
                values = {"k": 3, "s": 2, "p": 1} | {
                    key: int(value)
                    for key, _, value in (option.partition("=") for option in options.split(","))
                }
                layers.append(
                    nn.Conv2d(channels, values["c"], values["k"], values["s"], values["p"])
                )
                channels = values["c"]
            elif kind == "ln":
                layers.append(_ChannelNorm(channels))
            elif kind == "relu":
                layers.append(nn.ReLU())
            else:
                raise ModelError(
                    f"tagger: cnn_stem has the word {word!r}; known are conv, ln and relu"
                )
        if channels != d_model:
            raise ModelError(
                f"tagger: cnn_stem ends with {channels} channels, but d_model={d_model}"
            )
        self.conv = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid: torch.Tensor = self.conv(images)
        return grid


class _ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class _LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip = nn.Parameter(
            torch.full((channels,), 0.1)
        )  # CaiT's value for up to 18 blocks, arXiv:2103.17239.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.skip


class _MLP(nn.Module):
    def __init__(self, d_model: int, mlp_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear2(nn.functional.gelu(self.linear1(x)))
        return out


class _Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel before it joins the residual."""

    def __init__(self, d_model: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(d_model)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.skip_init1 = _LayerScale(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = _MLP(d_model, mlp_dim)
        self.skip_init2 = _LayerScale(d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(self.norm1(x)).unflatten(
            -1, (3, self.num_heads, -1)
        )  # (B, tokens, 3, heads, d_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, d_head)
        mixed = (
            nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )
        x = x + self.skip_init1(self.out_proj(mixed))
        x = x + self.skip_init2(self.mlp(self.norm2(x)))
        return x
