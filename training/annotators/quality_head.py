"""The learned quality model: how much people prefer an image, and whether it is junk, from one
frozen CLIP embedding.

Utility is trained on judged pairs (Bradley-Terry), so a ranking follows from it without a
tournament. Junk is a question of its own: the lowest utility is not junk. Source: bigASP's quality
model, with these corrections: one scalar head instead of a pair classifier, the split by image
instead of by pair, no copy of a pair in both directions.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from training import seeds
from training.errors import DataError, ModelError
from training.models import weights
from training.seeds import Purpose

HELD_OUT_SHARE = 0.2
MIN_PAIRS = 20
_FILES = ("config.json", "model.safetensors")
_HIDDEN = 256
_BATCH = 256
_LEARNING_RATE = 2e-4
# Strong, as in bigASP (2.0): a few thousand judgements against a 768-wide embedding.
_WEIGHT_DECAY = 2.0
_MAX_EPOCHS = 120
# Without a held-out image there is nothing to stop by.
_UNWATCHED_EPOCHS = 20
_PATIENCE = 8

Report = dict[str, float | int | None]


class ScalarHead(nn.Module):
    """An embedding to one number."""

    def __init__(self, width: int, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, 1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Values `(B,)` of embeddings `(B, width)`."""
        hidden = nn.functional.gelu(self.linear1(self.ln(embeddings)))
        values: torch.Tensor = self.linear2(hidden).squeeze(-1)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """What the model says of one image."""

    utility: float
    """Unbounded; a difference of 1 means that the better one wins 73 % of the time."""
    junk_probability: float | None
    """In [0, 1]; None while no one has labelled junk."""


class QualityModel:
    """The adapter: CLIP class tokens to utility and junk probability, with the cut points of the
    scores."""

    def __init__(
        self,
        utility: ScalarHead,
        junk: ScalarHead | None,
        cuts: Sequence[float],
        device: str | torch.device,
    ) -> None:
        self.utility = utility.to(device).eval().requires_grad_(False)
        self.junk = None if junk is None else junk.to(device).eval().requires_grad_(False)
        self.cuts = tuple(float(cut) for cut in cuts)
        """Ascending utilities that part the scores."""
        if list(self.cuts) != sorted(self.cuts):
            raise ModelError(f"quality model: cut points {self.cuts} are not ascending")
        self.device = torch.device(device)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "QualityModel":
        """Load what `save` wrote.

        Raises:
            ModelError: Files are missing or do not belong together.
        """
        weights.require(
            folder,
            _FILES,
            name="quality model",
            source="judged pairs of this workspace",
            command="foundry run --select quality_model",
        )
        cuts = weights.read_config(folder / "config.json").get("cuts")
        if not isinstance(cuts, list):
            raise ModelError(
                f"quality model: {folder / 'config.json'} has cuts={cuts!r}, not a list of cut points"
            )
        return cls.read_heads(folder / "model.safetensors", cuts, device)

    @classmethod
    def read_heads(
        cls, path: Path, cuts: Sequence[float], device: str | torch.device = "cpu"
    ) -> "QualityModel":
        """Load the heads alone, of one file that `write_heads` wrote; their sizes are those of the
        tensors.

        Raises:
            ModelError: The file is broken or holds other tensors.
        """
        state = weights.read_tensors(path)
        heads = {}
        for name in ("utility", "junk"):
            part = {
                key.removeprefix(f"{name}."): value
                for key, value in state.items()
                if key.startswith(f"{name}.")
            }
            if part or name == "utility":
                shape = part["linear1.weight"].shape if "linear1.weight" in part else (_HIDDEN, 1)
                heads[name] = ScalarHead(width=shape[1], hidden=shape[0])
                weights.load_state(heads[name], part, path)
        return cls(heads["utility"], heads.get("junk"), cuts, device)

    def save(self, folder: Path) -> None:
        """Write `config.json` (the cut points) and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": "QualityModel", "cuts": list(self.cuts)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        self.write_heads(folder / "model.safetensors")

    def write_heads(self, path: Path) -> None:
        """Write the heads alone to one safetensors file."""
        heads = {"utility": self.utility} | ({} if self.junk is None else {"junk": self.junk})
        state = {
            f"{name}.{key}": value.cpu().contiguous()
            for name, head in heads.items()
            for key, value in head.state_dict().items()
        }
        save_file(state, path)

    def preprocess(self, embeddings: np.ndarray) -> torch.Tensor:
        """CLIP class tokens `(N, width)` as an fp32 tensor.

        Raises:
            ModelError: The width is not the head's: the embeddings are of another encoder.
        """
        width = self.utility.linear1.in_features
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise ModelError(
                f"quality model reads embeddings of width {width}, not of shape {embeddings.shape}"
            )
        return torch.from_numpy(np.array(embeddings, dtype=np.float32))

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Utilities and, where there is a junk head, junk probabilities, each `(N,)`, of embeddings
        `(N, width)`."""
        with torch.inference_mode():
            batch = batch.to(self.device)
            return self.utility(batch), None if self.junk is None else torch.sigmoid(
                self.junk(batch)
            )

    def postprocess(self, utilities: torch.Tensor, junk: torch.Tensor | None) -> list[QualityRow]:
        """One row per image of what `forward` returned."""
        probabilities = [None] * len(utilities) if junk is None else junk.cpu().tolist()
        return [
            QualityRow(utility=utility, junk_probability=probability)
            for utility, probability in zip(utilities.cpu().tolist(), probabilities, strict=True)
        ]

    def __call__(self, embeddings: np.ndarray) -> list[QualityRow]:
        """Judge `(N, width)` CLIP class tokens; one row per image."""
        return self.postprocess(*self.forward(self.preprocess(embeddings)))


def fit_utility(
    embeddings_a: np.ndarray,
    embeddings_b: np.ndarray,
    target: np.ndarray,
    *,
    ids_a: Sequence[str],
    ids_b: Sequence[str],
    seed: int,
) -> tuple[ScalarHead, Report]:
    """Train the utility head on judged pairs, on the CPU, equal for equal inputs and thread counts.

    A fifth of the images, chosen by their ids, is held out: training sees no pair with one of them,
    and the report is measured on the pairs that have one. The head returned is then trained on all
    pairs for as many epochs as were best.

    Args:
        embeddings_a: `(P, width)` class tokens of the pairs' first images.
        embeddings_b: `(P, width)` of the second ones.
        target: `(P,)`: 1 where the first was better, 0 where the second was, 0.5 for a tie.
        ids_a: Image ids of the first images.
        ids_b: Image ids of the second ones.
        seed: Decides the split, the first weights and the order.

    Returns:
        The head and its report: numbers of pairs, `held_out_accuracy` (ties left out),
        `held_out_tau` ((agreeing - disagreeing) / judged pairs), `held_out_loss`, `epochs`.
        Measures are None where no pair is left.

    Raises:
        DataError: Fewer than 20 pairs, or none that is not a tie.
    """
    decisive = int(np.sum(target != 0.5))
    if len(target) < MIN_PAIRS or not decisive:
        raise DataError(
            f"{len(target)} judged pairs, {decisive} of them not ties: at least {MIN_PAIRS} and one are needed"
        )
    first, second, wanted = (
        torch.from_numpy(np.array(x, np.float32)) for x in (embeddings_a, embeddings_b, target)
    )
    held = np.array(
        [_held_out(a, seed) or _held_out(b, seed) for a, b in zip(ids_a, ids_b, strict=True)]
    )

    def loss(head: ScalarHead, rows: torch.Tensor) -> torch.Tensor:
        difference = head(torch.cat([first[rows], second[rows]])).view(2, -1)
        return nn.functional.binary_cross_entropy_with_logits(
            difference[0] - difference[1], wanted[rows]
        )

    head, epochs, measured = _fit(first.shape[1], held, loss, seed, "utility")
    report: Report = {
        "num_pairs": len(target),
        "num_ties": len(target) - decisive,
        "num_held_out_pairs": int(held.sum()),
        "held_out_accuracy": None,
        "held_out_tau": None,
        "held_out_loss": None,
        "epochs": epochs,
    }
    if measured is not None:
        rows = torch.from_numpy(held.nonzero()[0])
        with torch.inference_mode():
            agreement = torch.sign(measured(first[rows]) - measured(second[rows])) * torch.sign(
                wanted[rows] - 0.5
            )
            report["held_out_loss"] = float(loss(measured, rows))
        report["held_out_tau"] = float(agreement.mean())
        judged = wanted[rows] != 0.5
        if judged.any():
            report["held_out_accuracy"] = float((agreement[judged] > 0).float().mean())
    return head, report


def fit_junk(
    embeddings: np.ndarray, is_junk: np.ndarray, *, ids: Sequence[str], seed: int
) -> tuple[ScalarHead, Report]:
    """Train the junk head on labelled images, both classes weighing the same; split and returns as
    in `fit_utility`.

    Args:
        embeddings: `(N, width)` class tokens.
        is_junk: `(N,)` bool.
        ids: Image ids.
        seed: Decides the split, the first weights and the order.

    Returns:
        The head and its report: numbers of images, `held_out_precision` and `held_out_recall` at
        probability 0.5 (None where the held-out images give no denominator), `epochs`.

    Raises:
        DataError: One of the two classes is empty.
    """
    num_junk = int(is_junk.sum())
    if num_junk in (0, len(is_junk)):
        raise DataError(
            f"{num_junk} of {len(is_junk)} labelled images are junk: both kinds are needed"
        )
    inputs = torch.from_numpy(np.array(embeddings, np.float32))
    wanted = torch.from_numpy(np.array(is_junk, np.float32))
    balance = torch.where(
        wanted > 0, 0.5 * len(is_junk) / num_junk, 0.5 * len(is_junk) / (len(is_junk) - num_junk)
    )
    held = np.array([_held_out(image_id, seed) for image_id in ids])

    def loss(head: ScalarHead, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            head(inputs[rows]), wanted[rows], balance[rows]
        )

    head, epochs, measured = _fit(inputs.shape[1], held, loss, seed, "junk")
    report: Report = {
        "num_images": len(is_junk),
        "num_junk": num_junk,
        "num_held_out_images": int(held.sum()),
        "held_out_precision": None,
        "held_out_recall": None,
        "epochs": epochs,
    }
    if measured is not None:
        rows = torch.from_numpy(held.nonzero()[0])
        with torch.inference_mode():
            found = measured(inputs[rows]) > 0
        junk = wanted[rows] > 0
        hits = float((found & junk).sum())
        report["held_out_precision"] = hits / float(found.sum()) if found.any() else None
        report["held_out_recall"] = hits / float(junk.sum()) if junk.any() else None
    return head, report


def _held_out(image_id: str, seed: int) -> bool:
    return seeds.generator(seed, Purpose.QUALITY, "held_out", image_id).random() < HELD_OUT_SHARE


def _fit(
    width: int,
    held: np.ndarray,
    loss: Callable[[ScalarHead, torch.Tensor], torch.Tensor],
    seed: int,
    name: str,
) -> tuple[ScalarHead, int, ScalarHead | None]:
    """Find the best number of epochs on the held-out rows, then train on all rows for as long.

    Returns:
        The head trained on all rows, the epochs, and the head that never saw a held-out row (None
        without such rows).
    """
    everything = torch.arange(len(held))
    if held.all() or not held.any():
        return (
            _train(width, everything, loss, epochs=_UNWATCHED_EPOCHS, seed=seed, name=name)[0],
            _UNWATCHED_EPOCHS,
            None,
        )
    kept, watched = (torch.from_numpy(rows.nonzero()[0]) for rows in (~held, held))
    measured, epochs = _train(
        width, kept, loss, epochs=_MAX_EPOCHS, seed=seed, name=name, watched=watched
    )
    return _train(width, everything, loss, epochs=epochs, seed=seed, name=name)[0], epochs, measured


def _train(
    width: int,
    rows: torch.Tensor,
    loss: Callable[[ScalarHead, torch.Tensor], torch.Tensor],
    *,
    epochs: int,
    seed: int,
    name: str,
    watched: torch.Tensor | None = None,
) -> tuple[ScalarHead, int]:
    """Train for `epochs`, or until the loss on `watched` has not fallen for a while; the best state
    and its epoch."""
    head = _fresh_head(width, seed, name)
    optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, best_epoch, best_state = float("inf"), epochs, None
    for epoch in range(1, epochs + 1):
        order = torch.randperm(
            len(rows), generator=seeds.torch_generator(seed, Purpose.QUALITY, name, epoch)
        )
        for batch in rows[order].split(_BATCH):
            optimizer.zero_grad()
            loss(head, batch).backward()
            optimizer.step()
        if watched is None:
            continue
        with torch.inference_mode():
            current = float(loss(head, watched))
        if current < best:
            best, best_epoch = current, epoch
            best_state = {key: value.clone() for key, value in head.state_dict().items()}
        elif epoch - best_epoch >= _PATIENCE:
            break
    if best_state is not None:
        head.load_state_dict(best_state)
    return head.eval().requires_grad_(False), best_epoch


def _fresh_head(width: int, seed: int, name: str) -> ScalarHead:
    """PyTorch's default initialisation, drawn from our own generator instead of the global one."""
    head = ScalarHead(width)
    generator = seeds.torch_generator(seed, Purpose.INIT, "quality", name)
    for layer in (head.linear1, head.linear2):
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return head
