"""LAION's aesthetic head: CLIP ViT-L/14 embeddings to one score, about 1 to 10 with most
photographs between 4 and 7.

The published network has five linear layers and, at inference, nothing between them: it is folded
into one affine map. Source: christophschuhmann/improved-aesthetic-predictor (Apache-2.0),
`sac+logos+ava1-l14-linearMSE`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from training.errors import ModelError
from training.models import weights

WIDTHS = (1024, 128, 64, 16, 1)
_FILE = "model.safetensors"
_LAYERS = (0, 2, 4, 6, 7)
_DROPOUTS = (0.2, 0.2, 0.1)


class AestheticHead(nn.Module):
    """The network as it is trained, under the published names: linear layers with dropout between
    the first four."""

    def __init__(self, width: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((width, *widths[:-1]), widths, strict=True)):
            layers.append(nn.Linear(before, after))
            if number < len(_DROPOUTS):
                layers.append(nn.Dropout(_DROPOUTS[number]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores `(B,)` of embeddings `(B, width)` of length 1."""
        scores: torch.Tensor = self.layers(embeddings).squeeze(-1)
        return scores


class Aesthetic:
    """The adapter: CLIP's projected embeddings to scores, by one dot product each."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, device: str | torch.device
    ) -> None:
        self.weight = weight.to(device, torch.float32)  # (width,)
        self.bias = bias.to(device, torch.float32)  # ()
        self.device = torch.device(device)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Aesthetic":
        """Load and fold the five layers.

        Raises:
            ModelError: The file is missing, or holds other layers (the ReLU variant has other
                numbers).
        """
        weights.require(
            folder,
            [_FILE],
            name="LAION aesthetic head",
            source="https://huggingface.co/ttj/sac-logos-ava1-l14-linearMSE",
            command=f"hf download ttj/sac-logos-ava1-l14-linearMSE {_FILE} --local-dir {folder}",
        )
        state = weights.read_tensors(folder / _FILE)
        expected = {f"layers.{number}.{kind}" for number in _LAYERS for kind in ("weight", "bias")}
        if state.keys() != expected:
            raise ModelError(
                f"{folder / _FILE} holds {', '.join(sorted(state)[:12])}, but the linear aesthetic head has exactly "
                f"layers {', '.join(map(str, _LAYERS))}; the ReLU variant (layers 0, 3, 6, 9, 11) is not supported"
            )
        return cls(*_fold(state, folder / _FILE), device)

    def preprocess(self, embeddings: np.ndarray) -> torch.Tensor:
        """`(N, width)` embeddings of any length to length 1, fp32; a zero vector stays zero.

        Raises:
            ModelError: The width is not the head's: the embeddings are of another CLIP.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.weight.numel():
            raise ModelError(
                f"aesthetic head reads embeddings of width {self.weight.numel()}, not of shape {embeddings.shape}"
            )
        vectors = torch.from_numpy(np.array(embeddings, dtype=np.float32))
        lengths = vectors.norm(dim=1, keepdim=True)
        return vectors / torch.where(lengths == 0, 1.0, lengths)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Scores `(N,)` of embeddings `(N, width)` of length 1."""
        return batch.to(self.device) @ self.weight + self.bias

    def postprocess(self, scores: torch.Tensor) -> list[float]:
        """The scores as plain numbers."""
        return [float(score) for score in scores.cpu()]

    def __call__(self, embeddings: np.ndarray) -> list[float]:
        """Score `(N, width)` projected CLIP embeddings; one number per row."""
        return self.postprocess(self.forward(self.preprocess(embeddings)))


def save(folder: Path, head: AestheticHead) -> None:
    """Write the file that `Aesthetic.load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().float().contiguous() for key, value in head.state_dict().items()},
        folder / _FILE,
    )


def _fold(state: dict[str, torch.Tensor], origin: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the layers into one, in fp64: weight `(width,)` and bias `()`."""
    weight = state[f"layers.{_LAYERS[0]}.weight"].double()
    bias = state[f"layers.{_LAYERS[0]}.bias"].double()
    try:
        for number in _LAYERS[1:]:
            matrix = state[f"layers.{number}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + state[f"layers.{number}.bias"].double()
    except RuntimeError as error:
        raise ModelError(
            f"{origin}: its layers' shapes do not follow each other: {error}"
        ) from error
    if weight.shape[0] != 1:
        raise ModelError(
            f"{origin}: the last layer has {weight.shape[0]} outputs, but the head gives one score"
        )
    return weight[0], bias[0]
