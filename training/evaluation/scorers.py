"""Further scorers of human preference: one class each, chosen by name in `[evaluation.scoring]
scorers`.

A new one is a class with `load` and `score`, a line in `SCORERS`, its name in `ScorerName` and its
folder in `[models]`. Each loads safetensors from a local folder, and says where they come from when
they are missing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel

from training.annotators.clip import Clip
from training.annotators.image_reward import ImageReward
from training.annotators.open_clip import from_open_clip
from training.annotators.published import pickle_command
from training.config.evaluation import ScorerName
from training.models import pixels, weights
from training.models.text_encoders import load_tokenizer

_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


class Scorer(Protocol):
    """Judges images with their prompts, in fp32."""

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Scores `(B,)` of `(H, W, 3)` uint8 images; `texts` holds what each was asked for."""
        ...


class PickScore:
    """PickScore v1: CLIP H/14 fine-tuned on choices between two images; about 15 to 25.

    The scaled cosine of image and prompt. Pixels and prompts are prepared as OpenAI does:
    transformers' processor, which the authors use, crops one pixel beside that where the overhang
    is odd.

    Source: Kirstain et al., arXiv:2305.01569; yuvalkirstain/PickScore_v1.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._scale = float(clip.model.logit_scale.exp())
        self._texts = _Texts(clip)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "PickScore":
        """Load a `CLIPModel`.

        Raises:
            ModelError: Files are missing or do not belong together.
        """
        weights.require(
            folder,
            (
                "config.json",
                "model.safetensors",
                "preprocessor_config.json",
                "tokenizer_config.json",
            ),
            name="PickScore",
            source=f"https://huggingface.co/yuvalkirstain/PickScore_v1 and {_H14}",
            command=f"hf download yuvalkirstain/PickScore_v1 config.json model.safetensors --local-dir {folder} && "
            f"hf download {_H14} preprocessor_config.json {' '.join(_TOKENIZER_FILES)} --local-dir {folder}",
        )
        return cls(Clip.load(folder, device))

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Scores `(B,)`."""
        embeddings = np.stack([row.embedding for row in self._clip(images)])  # (B, d)
        return self._scale * _cosines(embeddings, self._texts(texts))


class Hps:
    """Human Preference Score v2.1: CLIP H/14 fine-tuned on rankings; about 0.2 to 0.35 (published
    tables: times 100).

    The cosine of image and prompt; the whole image is fitted into a black square, nothing is
    cropped.

    Source: Wu et al., arXiv:2306.09341; tgxs002/HPSv2.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._texts = _Texts(clip)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Hps":
        """Load the published weights, as safetensors under open_clip's names, into a `CLIPModel`.

        Raises:
            ModelError: Files are missing, or the weights are of another architecture than
                config.json.
        """
        weights.require(
            folder,
            ("config.json", "model.safetensors", "tokenizer_config.json"),
            name="HPS v2.1",
            source=f"https://huggingface.co/xswu/HPSv2 and {_H14}",
            command=f"hf download {_H14} config.json {' '.join(_TOKENIZER_FILES)} --local-dir {folder} && "
            + pickle_command("xswu/HPSv2", "HPS_v2.1_compressed.pt", folder, key="state_dict"),
        )
        path = folder / "model.safetensors"
        model = weights.build(CLIPModel, folder)
        weights.load_state(model, from_open_clip(weights.read_tensors(path), path), path)
        side = model.config.vision_config.image_size
        return cls(Clip(model, load_tokenizer(folder), {"size": side, "crop_size": side}, device))

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Scores `(B,)`."""
        _, embeddings = self._clip.forward(
            torch.stack([self.preprocess(image) for image in images])
        )
        return _cosines(embeddings.cpu().numpy(), self._texts(texts))

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` uint8 to `(3, S, S)` fp32: longer side to S, bicubic, on black in the middle,
        normalised."""
        pixels.check_rgb(image)
        side = self._clip.crop
        scale = side / max(image.shape[:2])
        height, width = (round(length * scale) for length in image.shape[:2])
        resized = Image.fromarray(image)
        if scale != 1:
            resized = resized.resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (side, side))
        square.paste(resized, ((side - width) // 2, (side - height) // 2))
        return pixels.normalise(np.asarray(square), self._clip.mean, self._clip.std)


class _Texts:
    """Embeddings of prompts, each encoded once."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, d)` fp32 of length 1."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, self._clip.encode_text(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b).sum(axis=1)


SCORERS: Mapping[ScorerName, Callable[[Path, str], Scorer]] = {
    "pickscore": PickScore.load,
    "hps_v2": Hps.load,
    "image_reward": ImageReward.load,
}


def load(folders: Mapping[ScorerName, Path], device: str) -> dict[str, Scorer]:
    """Load scorers.

    Args:
        folders: Where the weights of each lie.
        device: Where they run.

    Returns:
        Scorer by the name of its metric.

    Raises:
        ModelError: Files are missing, or are of another model.
    """
    return {name: SCORERS[name](folder, device) for name, folder in folders.items()}
