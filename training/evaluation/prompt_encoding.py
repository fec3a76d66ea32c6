"""Turns the prompts of a batch into what the UNet attends to: in chunks of 75 tokens and from the layer, as trained.

Three chunks are read of every prompt by every checkpoint, whatever its run's `max_chunks`: a fine-tune and its base are
to be shown the same words. What is cut off is told of.
"""

from collections.abc import Sequence

import polars as pl
import torch

from training.data.tokens import Tokenizer, count_chunks, tokenize
from training.errors import EvaluationError
from training.evaluation.prompt_weights import apply_weights, read_prompt, token_weights
from training.evaluation_config import SamplingConfig
from training.models.text_encoders import TextConditioning, encode_sd1, encode_sdxl, ids_tensor
from training.models.unet import PipelineParts


def cut_prompts(prompts: pl.DataFrame, tokenizer: Tokenizer, config: SamplingConfig) -> list[dict[str, object]]:
    """Prompts and negatives of a set whose end no chunk holds.

    Args:
        prompts: Rows of table `prompt_sets`.
        tokenizer: Of either text encoder.
        config: Says how weights in prompts are read: they are no tokens.

    Returns:
        Rows `prompt_id`, `text` (`prompt` or `negative`), `tokens` and how many of these are `not read`, by prompt_id.
    """
    rows: list[dict[str, object]] = []
    for name, column in (("prompt", "text"), ("negative", "negative")):
        plain = [read_prompt(text, config.prompt_weights).text for text in prompts[column]]
        for prompt_id, entry in zip(prompts["prompt_id"], tokenize(plain, tokenizer), strict=True):
            if entry.num_truncated:
                rows.append({"prompt_id": prompt_id, "text": name, "tokens": entry.num_tokens,
                             "not read": entry.num_truncated})  # fmt: skip
    return sorted(rows, key=lambda row: str(row["prompt_id"]))


class PromptEncoder:
    """Encodes batches of prompts with their negatives; each distinct text of a batch once."""

    def __init__(
        self, parts: PipelineParts, texts: Sequence[str], config: SamplingConfig, *, clip_skip: int, device: str
    ) -> None:
        """Read all prompts and check them before the first picture is drawn.

        Args:
            parts: The model.
            texts: Every prompt and negative that will be asked for.
            config: Says how weights in prompts are read.
            clip_skip: Layer of SD 1.x's text encoder, from the end; SDXL has no choice and reads its own.
            device: Where the encoders are.

        Raises:
            EvaluationError: SDXL is asked for another layer, SD 1.x for one that it does not have, or a prompt for
                what cannot be done.
        """
        if parts.family == "sdxl" and config.clip_skip > 1:
            raise EvaluationError(
                f"evaluation.sampling.clip_skip={config.clip_skip}: SDXL always reads the layer before the last; "
                "leave it at 0"
            )
        layers = parts.text_encoders[0].config.num_hidden_layers
        if parts.family == "sd1" and clip_skip > layers:
            raise EvaluationError(f"clip_skip={clip_skip}: the text encoder has {layers} layers")
        self._parts, self._config, self._clip_skip, self._device = parts, config, clip_skip, device
        self._read = {text: read_prompt(text, config.prompt_weights) for text in dict.fromkeys(texts)}
        plain = [read.text for read in self._read.values()]
        self._chunks = {
            text: count_chunks(entry.num_tokens)
            for text, entry in zip(self._read, tokenize(plain, parts.tokenizers[0]), strict=True)
        }

    def num_chunks(self, *texts: str) -> int:
        """Chunks of the longest of the texts: what they share when they are encoded together."""
        return max(self._chunks[text] for text in texts)

    def encode(self, negatives: Sequence[str], prompts: Sequence[str]) -> TextConditioning:
        """Conditioning `(2 * B, n * 77, d)`, negatives first; n is that of the longest text."""
        texts = [*negatives, *prompts]
        distinct = list(dict.fromkeys(texts))
        encoded = self._encode(distinct)
        rows = torch.tensor([distinct.index(text) for text in texts], device=self._device)
        hidden_states = encoded.hidden_states[rows]
        pooled = None if encoded.pooled is None else encoded.pooled[rows]
        if self._parts.force_zeros_for_empty_prompt and pooled is not None:
            empty = [place for place, negative in enumerate(negatives) if not negative]
            hidden_states[empty], pooled[empty] = 0.0, 0.0
        return TextConditioning(hidden_states=hidden_states, pooled=pooled)

    def _encode(self, texts: Sequence[str]) -> TextConditioning:
        num_chunks = self.num_chunks(*texts)
        plain = [self._read[text].text for text in texts]
        parts = self._parts
        ids = [
            ids_tensor(tokenize(plain, tokenizer, min_chunks=num_chunks), self._device)
            for tokenizer in parts.tokenizers
        ]
        if parts.family == "sd1":
            encoded = encode_sd1(parts.text_encoders[0], ids[0], self._clip_skip)
        else:
            encoded = encode_sdxl(*parts.text_encoders, *ids)
        if self._config.prompt_weights == "off":
            return encoded
        widths = [encoder.config.hidden_size for encoder in parts.text_encoders]
        reads = [self._read[text] for text in texts]
        weighted = [
            apply_weights(
                states,
                torch.from_numpy(token_weights(reads, tokenizer, num_chunks)).to(self._device),
                restore_mean=self._config.prompt_weights == "mean_restored",
            )
            for states, tokenizer in zip(encoded.hidden_states.split(widths, dim=-1), parts.tokenizers, strict=True)
        ]
        return TextConditioning(hidden_states=torch.cat(weighted, dim=-1), pooled=encoded.pooled)
