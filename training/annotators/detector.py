"""OWLv2: boxes around what a phrase names, here watermarks, in upright source pixels.

The network sees the image in the upper left corner of a black square; boxes come back relative to
that square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from transformers import CLIPTokenizer, Owlv2ForObjectDetection

from training.errors import ModelError
from training.models import pixels, weights
from training.models.text_encoders import load_tokenizer

CONFIDENCE_FLOOR = 0.05
NMS_IOU = 0.5
QUERY_LENGTH = 16
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json")
# scipy.ndimage.gaussian_filter's default reach, in standard deviations.
_GAUSSIAN_REACH = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One detection in upright source pixels; half-open like a slice, y first."""

    y0: float
    x0: float
    y1: float
    x1: float
    confidence: float
    """Sigmoid of the query's logit, above `CONFIDENCE_FLOOR`."""


class Detector:
    """The adapter: images to boxes of one phrase."""

    def __init__(
        self,
        model: Owlv2ForObjectDetection,
        tokenizer: CLIPTokenizer,
        preprocessor: dict[str, Any],
        query: str,
        device: str | torch.device,
    ) -> None:
        self.model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = torch.device(device)
        size = preprocessor.get("size", {})
        self.image_size = int(model.config.vision_config.image_size)
        if (size.get("height"), size.get("width")) != (self.image_size, self.image_size):
            raise ModelError(
                f"OWLv2: preprocessor_config.json has size={size}, but the network reads "
                f"{self.image_size}x{self.image_size}"
            )
        self.mean = tuple(preprocessor.get("image_mean", pixels.CLIP_MEAN))
        self.std = tuple(preprocessor.get("image_std", pixels.CLIP_STD))
        encoded = tokenizer(
            [query],
            padding="max_length",
            truncation=True,
            max_length=QUERY_LENGTH,
            return_tensors="pt",
        )
        self.query_ids = encoded["input_ids"].to(device)  # (1, 16)
        self.query_mask = encoded["attention_mask"].to(device)  # (1, 16)

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device, query: str = "a watermark"
    ) -> "Detector":
        """Load OWLv2 with its tokenizer and preprocessor.

        Args:
            folder: The model's folder.
            device: Where the network runs.
            query: What to look for; bigASP's phrase by default.

        Raises:
            ModelError: Files are missing or do not belong together.
        """
        weights.require(
            folder,
            _FILES,
            name="detector OWLv2",
            source="https://huggingface.co/google/owlv2-base-patch16-ensemble",
            command=f"hf download google/owlv2-base-patch16-ensemble --exclude '*.bin' --local-dir {folder}",
        )
        model = weights.from_pretrained(Owlv2ForObjectDetection, folder, device)
        preprocessor = weights.read_config(folder / "preprocessor_config.json")
        return cls(model, load_tokenizer(folder), preprocessor, query, device)

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` uint8 to `(3, S, S)` fp32: pad to a square at the bottom or right, resize,
        normalise.

        Equals transformers' image processor (gaussian filter, then linear interpolation), but as
        one sparse matrix per axis, in which the padding costs nothing.
        """
        pixels.check_rgb(image)
        height, width = image.shape[:2]
        shrink = _shrink_matrix(max(height, width), self.image_size)  # (S, side)
        rows = shrink[:, :height] @ image.reshape(height, width * 3).astype(
            np.float32
        )  # (S, W * 3)
        columns = np.ascontiguousarray(rows.reshape(-1, width, 3).transpose(1, 0, 2)).reshape(
            width, -1
        )
        square = (shrink[:, :width] @ columns).reshape(
            self.image_size, self.image_size, 3
        )  # (x, y, channel)
        scaled = torch.from_numpy(square).permute(2, 1, 0).div(255)  # (3, S, S)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return ((scaled - mean) / std).contiguous()

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidences `(B, P)` and boxes `(B, P, 4)` as (cx, cy, w, h) of the padded square, for P
        patches."""
        with torch.inference_mode():
            out = self.model(
                pixel_values=batch.to(self.device),
                input_ids=self.query_ids.expand(len(batch), -1),
                attention_mask=self.query_mask.expand(len(batch), -1),
            )
            return torch.sigmoid(out.logits[:, :, 0]), out.pred_boxes

    def postprocess(
        self, confidences: torch.Tensor, boxes: torch.Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[list[Box]]:
        """Boxes in source pixels, most confident first.

        Args:
            confidences: `(B, P)`.
            boxes: `(B, P, 4)`, (cx, cy, w, h) relative to the padded square.
            sizes: (height, width) of each source image in pixels.

        Returns:
            Per image the boxes above the floor that touch the image, clamped to it, overlaps
            removed.
        """
        return [
            _source_boxes(confidence, box, size)
            for confidence, box, size in zip(
                confidences.cpu().numpy(), boxes.cpu().numpy(), sizes, strict=True
            )
        ]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Box]]:
        """Find the phrase in `(H, W, 3)` uint8 images of any sizes; one row per image."""
        batch = torch.stack([self.preprocess(image) for image in images])
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return self.postprocess(*self.forward(batch), sizes)


def suppress(boxes: np.ndarray, confidences: np.ndarray, max_iou: float = NMS_IOU) -> list[int]:
    """Greedy non-maximum suppression.

    Args:
        boxes: `(N, 4)` as (y0, x0, y1, x1).
        confidences: `(N,)`; equal ones are taken in their order.
        max_iou: A box that overlaps a kept, more confident one by more than this is dropped.

    Returns:
        Indices of the kept boxes, most confident first.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-confidences, kind="stable")
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        heights = np.minimum(boxes[best, 2], boxes[order, 2]) - np.maximum(
            boxes[best, 0], boxes[order, 0]
        )
        widths = np.minimum(boxes[best, 3], boxes[order, 3]) - np.maximum(
            boxes[best, 1], boxes[order, 1]
        )
        shared = heights.clip(min=0) * widths.clip(min=0)
        order = order[shared <= max_iou * (areas[best] + areas[order] - shared)]
    return kept


def _source_boxes(confidences: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> list[Box]:
    height, width = size
    above = confidences > CONFIDENCE_FLOOR
    confidences = confidences[above].astype(np.float64)
    centre_x, centre_y, box_width, box_height = boxes[above].astype(np.float64).T * max(
        height, width
    )
    corners = np.stack(
        [
            (centre_y - box_height / 2).clip(0, height),
            (centre_x - box_width / 2).clip(0, width),
            (centre_y + box_height / 2).clip(0, height),
            (centre_x + box_width / 2).clip(0, width),
        ],
        axis=1,
    )
    # What lay in the padding has no area left after the clamp.
    inside = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    corners, confidences = corners[inside], confidences[inside]
    return [
        Box(
            **dict(zip(("y0", "x0", "y1", "x1"), corners[i].tolist(), strict=True)),
            confidence=float(confidences[i]),
        )
        for i in suppress(corners, confidences)
    ]


def _shrink_matrix(source: int, target: int) -> scipy.sparse.csr_array:
    """`(target, source)` fp32: a gaussian filter against aliasing, then linear interpolation, along
    one axis.

    Both mirror at the borders without repeating the border's pixel (scipy.ndimage's `mirror`).
    Source: scikit-image's `resize`, as in OWLv2's own preprocessing.
    """
    factor = source / target
    sigma = max(0.0, (factor - 1) / 2)
    reach = int(_GAUSSIAN_REACH * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    kernel /= kernel.sum()
    positions = (np.arange(target) + 0.5) * factor - 0.5
    lower = np.floor(positions).astype(np.int64)
    weight = positions - lower
    # Per target row: the kernel around the lower neighbour and the one around the upper.
    columns = np.stack([lower, lower + 1], axis=1)[:, :, None]  # (target, 2, 1)
    columns = _mirror(_mirror(columns, source) + offsets, source)  # (target, 2, kernel)
    values = np.stack([1 - weight, weight], axis=1)[:, :, None] * kernel
    rows = np.broadcast_to(np.arange(target)[:, None, None], columns.shape)
    matrix = scipy.sparse.coo_array(
        (values.ravel(), (rows.ravel(), columns.ravel())), shape=(target, source)
    )
    return matrix.tocsr().astype(np.float32)


def _mirror(indices: np.ndarray, length: int) -> np.ndarray:
    """Reflect indices into [0, length): … 2 1 0 1 2 …, the border's pixel not repeated."""
    if length == 1:
        return np.zeros_like(indices)
    period = 2 * (length - 1)
    folded = np.abs(indices) % period
    return np.where(folded < length, folded, period - folded)
