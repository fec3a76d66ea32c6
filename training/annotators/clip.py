"""CLIP: one vision pass gives the quality model's embedding and the one that CLIP score and
aesthetics read.

Always fp32, never TF32: in bf16 a score moves by more than most pairs of checkpoints differ. Pixels
are prepared as OpenAI's own code does, which transformers misses by one pixel on 832x1216, SDXL's
most used bucket.
"""

import contextlib
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from training.errors import ModelError
from training.models import pixels, weights
from training.models.text_encoders import load_tokenizer

TEXT_LENGTH = 77
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json")
_BICUBIC = 3
_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)
# Control characters that are Windows' punctuation read as Latin-1.
_WINDOWS = str.maketrans(
    {n: bytes([n]).decode("cp1252", "ignore") or chr(n) for n in range(0x80, 0xA0)}
)
_ESCAPE_SEQUENCE = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_WIDTH_AND_LIGATURES = re.compile(
    "[\ufb00-\ufb04\ufb06\uff01-\uffee\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRow:
    """One image behind CLIP's vision tower, both fp32."""

    cls: np.ndarray
    """`(d_hidden,)`: class token of the last hidden state before the final norm; what the quality
    head reads."""
    embedding: np.ndarray
    """`(d_projection,)`: projected and of length 1; what CLIP score and the aesthetic head read."""


class Clip:
    """The adapter: images to `ClipRow`s, prompts to embeddings of the same space."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocessor: dict[str, Any],
        device: str | torch.device,
    ) -> None:
        self.model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.resize = _side(preprocessor, "size")
        self.crop = _side(preprocessor, "crop_size")
        self.mean = tuple(preprocessor.get("image_mean", pixels.CLIP_MEAN))
        self.std = tuple(preprocessor.get("image_std", pixels.CLIP_STD))
        image_size = model.config.vision_config.image_size
        if self.crop != image_size or self.resize < self.crop:
            raise ModelError(
                f"CLIP: preprocessor_config.json resizes to {self.resize} and crops to {self.crop}, "
                f"but the vision tower reads {image_size}"
            )
        if preprocessor.get("resample", _BICUBIC) != _BICUBIC:
            raise ModelError(
                f"CLIP: resample={preprocessor['resample']}, but CLIP is trained with bicubic (3)"
            )

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Clip":
        """Load a `CLIPModel` with its tokenizer and preprocessor.

        Raises:
            ModelError: Files are missing or do not belong together.
        """
        weights.require(
            folder,
            _FILES,
            name="CLIP",
            source="https://huggingface.co/openai/clip-vit-large-patch14",
            command=f"hf download openai/clip-vit-large-patch14 --exclude '*.bin' '*.h5' --local-dir {folder}",
        )
        model = weights.from_pretrained(CLIPModel, folder, device)
        preprocessor = weights.read_config(folder / "preprocessor_config.json")
        return cls(model, load_tokenizer(folder), preprocessor, device)

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` uint8 to `(3, S, S)` fp32, see `openai_pixels`."""
        return openai_pixels(image, self.resize, self.crop, self.mean, self.std)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class tokens `(B, d_hidden)` and normalised embeddings `(B, d_projection)` of images `(B,
        3, S, S)`."""
        with exact():
            out = self.model.vision_model(batch.to(self.device, torch.float32))
            projected = self.model.visual_projection(out.pooler_output)
            return out.last_hidden_state[:, 0], _unit(projected)

    def postprocess(self, cls: torch.Tensor, embeddings: torch.Tensor) -> list[ClipRow]:
        """One row per image of what `forward` returned."""
        pairs = zip(cls.cpu().numpy(), embeddings.cpu().numpy(), strict=True)
        return [ClipRow(cls=token.copy(), embedding=embedding.copy()) for token, embedding in pairs]

    def __call__(self, images: Sequence[np.ndarray]) -> list[ClipRow]:
        """Embed `(H, W, 3)` uint8 images of any sizes; one row per image."""
        return self.postprocess(
            *self.forward(torch.stack([self.preprocess(image) for image in images]))
        )

    def encode_text(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings `(N, d_projection)` fp32 of length 1; a prompt beyond 77 tokens is cut, its
        last token is EOT."""
        encoded = self.tokenizer(
            [clean_text(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        )
        with exact():
            out = self.model.text_model(encoded["input_ids"].to(self.device))
            return _unit(self.model.text_projection(out.pooler_output)).cpu().numpy()


def openai_pixels(
    image: np.ndarray, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """`(H, W, 3)` uint8 to `(3, crop, crop)` fp32: shorter side to `resize`, bicubic, centre crop,
    normalise.

    Source: openai/CLIP `clip.py`, bit for bit (torchvision's Resize and CenterCrop on a Pillow
    image).
    """
    pixels.check_rgb(image)
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = int(resize * height / short), int(resize * width / short)
    resized = Image.fromarray(image)
    if resized.size != (width, height):
        resized = resized.resize((width, height), Image.Resampling.BICUBIC)
    # Python's round: halves go to the even side, as in the reference.
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    cropped = resized.crop((left, top, left + crop, top + crop))
    return pixels.normalise(np.asarray(cropped), mean, std)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inference in true fp32: torch lets cuDNN round to TF32 unless told otherwise, and others may
    have told cuBLAS."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    try:
        cuda.allow_tf32 = cudnn.allow_tf32 = False
        with torch.inference_mode():
            yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def clean_text(text: str) -> str:
    """What OpenAI's tokenizer sees of a text: straight quotes, plain widths, no entities, single
    spaces.

    Stands in for `ftfy.fix_text` without its repair of mis-decoded text, then unescapes HTML twice
    as the reference.

    Source: openai/CLIP `simple_tokenizer.py`.
    """
    text = html.unescape(text) if "<" not in text else text
    text = _ESCAPE_SEQUENCE.sub("", text.translate(_WINDOWS))
    text = _WIDTH_AND_LIGATURES.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _CONTROL.sub("", text.translate(_QUOTES).replace("\ufb05", "\u017ft"))
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return re.sub(r"\s+", " ", text).strip()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _side(preprocessor: dict[str, Any], key: str) -> int:
    """The pixels that `size` or `crop_size` asks for, in any of the forms in which it is
    written."""
    value = preprocessor.get(key)
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"CLIP: preprocessor_config.json has {key}={preprocessor.get(key)!r}, not a size in pixels"
        )
    return value
