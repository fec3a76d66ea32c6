"""Turns chunks of token ids into the conditioning that the UNet attends to, for SDXL's two encoders
and SD 1.x's one.

The functions take the modules, not a folder, and record gradients as the caller wishes: the trainer
may train them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.errors import ModelError
from training.models.tokens import TokenizedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConditioning:
    """A batch of prompts as the UNet reads them."""

    hidden_states: torch.Tensor
    """`(B, n * 77, d)`; d is the sum of the encoders' widths."""
    pooled: torch.Tensor | None
    """`(B, d_projection)` of the first chunk by the second encoder; None for SD 1.x, which has no
    such input."""


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a `CLIPTokenizer` from its folder.

    Raises:
        ModelError: Files are missing or broken.
    """
    # Without its vocabulary, transformers makes a tokenizer of three words and says nothing.
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"tokenizer in {folder} has neither tokenizer.json nor {' and '.join(missing)}"
            )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions on broken files
        raise ModelError(f"tokenizer cannot be loaded from {folder}: {error}") from error


def ids_tensor(prompts: Sequence[TokenizedPrompt], device: str | torch.device) -> torch.Tensor:
    """Token ids `(B, n, 77)` int64 of prompts that have the same number of chunks."""
    assert len({prompt.num_chunks for prompt in prompts}) == 1, (
        "prompts of one batch share a number of chunks"
    )
    return torch.tensor([prompt.ids for prompt in prompts], dtype=torch.int64, device=device)


def encode_sdxl(
    encoder_1: CLIPTextModel,
    encoder_2: CLIPTextModelWithProjection,
    ids_1: torch.Tensor,
    ids_2: torch.Tensor,
) -> TextConditioning:
    """Encode chunks for SDXL: both encoders' hidden states before the last layer, side by side.

    Args:
        encoder_1: CLIP ViT-L's text model.
        encoder_2: OpenCLIP bigG's text model with its projection.
        ids_1: `(B, n, 77)` int64, padded as the first tokenizer does.
        ids_2: `(B, n, 77)` int64, padded as the second tokenizer does.

    Source: SDXL report, arXiv:2307.01952, section 2.1; chunks as in bigASP's train.py.
    """
    assert ids_1.shape == ids_2.shape, (ids_1.shape, ids_2.shape)
    batch, chunks, length = ids_1.shape
    out_1 = encoder_1(ids_1.flatten(0, 1), output_hidden_states=True)
    out_2 = encoder_2(ids_2.flatten(0, 1), output_hidden_states=True)
    states = torch.cat(
        [out_1.hidden_states[-2], out_2.hidden_states[-2]], dim=-1
    )  # (B * n, 77, d1 + d2)
    return TextConditioning(
        hidden_states=states.reshape(batch, chunks * length, -1),
        pooled=out_2.text_embeds.unflatten(0, (batch, chunks))[:, 0],
    )


def encode_sd1(encoder: CLIPTextModel, ids: torch.Tensor, clip_skip: int = 1) -> TextConditioning:
    """Encode chunks for SD 1.x: hidden states `clip_skip` layers from the end, through the final
    norm.

    Args:
        encoder: CLIP ViT-L's text model.
        ids: `(B, n, 77)` int64.
        clip_skip: 1 takes the last layer, as the base model does; 2 the one before, as NovelAI's
            family does.
    """
    batch, chunks, length = ids.shape
    out = encoder(ids.flatten(0, 1), output_hidden_states=True)
    states = encoder.final_layer_norm(out.hidden_states[-clip_skip])  # (B * n, 77, d)
    return TextConditioning(hidden_states=states.reshape(batch, chunks * length, -1), pooled=None)
