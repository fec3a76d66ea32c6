"""Turns the prompts of a batch into what the UNet attends to: in chunks of 75 tokens and from the
layer, as trained.

Three chunks are read of every prompt by every checkpoint, whatever its run's `max_chunks`: a
fine-tune and its base are to be shown the same words. What is cut off is told of.
"""

from collections.abc import Mapping, Sequence

import polars as pl
import torch

from training.config.evaluation import PromptEnds, SamplingConfig
from training.errors import EvaluationError
from training.models.text_encoders import TextConditioning, encode_sd1, encode_sdxl, ids_tensor
from training.models.tokens import Tokenizer, tokenize_sections
from training.models.unet import PipelineParts
from training.sampling.prompt_reading import Readings, read_set
from training.sampling.prompt_schedules import Schedule, text_at
from training.sampling.prompt_weights import apply_weights, token_weights


def cut_prompts(
    prompts: pl.DataFrame, tokenizer: Tokenizer, config: SamplingConfig
) -> list[dict[str, object]]:
    """Prompts and negatives of a set whose end no chunk holds.

    Args:
        prompts: Rows of table `prompt_sets`.
        tokenizer: Of either text encoder.
        config: Says how marks in prompts are read: they are no tokens.

    Returns:
        Rows `prompt_id`, `text` (`prompt` or `negative`), `tokens` and how many of these are `not
        read`, by prompt_id; of a prompt that changes while it is drawn, for the text that loses
        most.
    """
    readings = read_set(prompts, config)
    rows: list[dict[str, object]] = []
    for name, column in (("prompt", "text"), ("negative", "negative")):
        for prompt_id, text in prompts.select("prompt_id", column).iter_rows():
            read = readings[text, name == "negative"].texts.values()
            plain = [[section.text for section in text.sections] for text in read]
            longest = max(
                tokenize_sections(plain, tokenizer), key=lambda entry: entry.num_truncated
            )
            if longest.num_truncated:
                rows.append({"prompt_id": prompt_id, "text": name, "tokens": longest.num_tokens,
                             "not read": longest.num_truncated})  # fmt: skip
    return sorted(rows, key=lambda row: str(row["prompt_id"]))


class PassText:
    """What the UNet attends to in one pass of a batch, call by call."""

    def __init__(
        self,
        encoded: TextConditioning,
        schedules: Sequence[tuple[Schedule, Mapping[str, int]]],
        ends: PromptEnds,
    ) -> None:
        """Hold the texts of a pass.

        Args:
            encoded: Of all distinct texts, `(T, n * 77, d)`.
            schedules: Per reading, negatives first: its schedule, and the row in `encoded` of each
                of its texts.
            ends: How ends are compared with calls.
        """
        self._encoded, self._schedules, self._ends = encoded, schedules, ends
        self._rows: tuple[int, ...] = ()
        self._now = encoded

    def at(self, call: int) -> TextConditioning:
        """Conditioning `(2 * B, n * 77, d)` of a call of the UNet, counted from 0, negatives first;
        the same object as before while no text changes."""
        rows = tuple(row_of[text_at(texts, call, self._ends)] for texts, row_of in self._schedules)
        if rows != self._rows:
            hidden_states, pooled = self._encoded.hidden_states, self._encoded.pooled
            places = torch.tensor(rows, device=hidden_states.device)
            self._rows = rows
            self._now = TextConditioning(
                hidden_states=hidden_states[places],
                pooled=None if pooled is None else pooled[places],
            )
        return self._now


class ChunkCounts:
    """How many chunks of tokens prompts need; asks a tokenizer, no text encoder."""

    def __init__(self, readings: Readings, tokenizer: Tokenizer) -> None:
        """Count.

        Args:
            readings: Every prompt and negative that will be asked for.
            tokenizer: Of either text encoder.
        """
        self._readings = readings
        self.sections = {
            text: read.sections
            for reading in readings.values()
            for text, read in reading.texts.items()
        }
        plain = [[section.text for section in sections] for sections in self.sections.values()]
        tokenized = tokenize_sections(plain, tokenizer)
        self.of_text = {
            text: entry.num_chunks for text, entry in zip(self.sections, tokenized, strict=True)
        }

    def of(self, prompt: str, negative: str) -> int:
        """Chunks of the longest text that the two ever show: they share it in every call."""
        readings = self._readings[prompt, False], self._readings[negative, True]
        return max(self.of_text[text] for reading in readings for text in reading.texts)


def check_layer(parts: PipelineParts, config: SamplingConfig, clip_skip: int) -> None:
    """Refuse a layer of the text encoder that cannot be read.

    Raises:
        EvaluationError: SDXL is asked for another layer than its own, or SD 1.x for one that it
            does not have.
    """
    if parts.family == "sdxl" and config.clip_skip > 1:
        raise EvaluationError(
            f"evaluation.sampling.clip_skip={config.clip_skip}: SDXL always reads the layer before the last; "
            "leave it at 0"
        )
    layers = parts.text_encoders[0].config.num_hidden_layers
    if parts.family == "sd1" and clip_skip > layers:
        raise EvaluationError(f"clip_skip={clip_skip}: the text encoder has {layers} layers")


class PromptEncoder:
    """Encodes batches of prompts with their negatives; each distinct text of a batch once."""

    def __init__(
        self,
        parts: PipelineParts,
        readings: Readings,
        config: SamplingConfig,
        *,
        clip_skip: int,
        device: str,
    ) -> None:
        """Check what is asked of the text encoders before the first image is drawn.

        Args:
            parts: The model.
            readings: Every prompt and negative that will be asked for.
            config: Says how prompts are read.
            clip_skip: Layer of SD 1.x's text encoder, from the end; SDXL has no choice and reads
                its own.
            device: Where the encoders are.

        Raises:
            EvaluationError: SDXL is asked for another layer, or SD 1.x for one that it does not
                have.
        """
        check_layer(parts, config, clip_skip)
        self._parts, self._config, self._clip_skip, self._device = parts, config, clip_skip, device
        self._readings = readings
        self._counts = ChunkCounts(readings, parts.tokenizers[0])
        self._sections = self._counts.sections

    def guidance(self, prompts: Sequence[str]) -> list[float]:
        """Factors of the guidance scale."""
        return [self._readings[prompt, False].guidance for prompt in prompts]

    def encode(self, negatives: Sequence[str], prompts: Sequence[str]) -> list[PassText]:
        """What each pass attends to; all its calls have the chunks of the longest text of the
        batch."""
        readings = [self._readings[text, True] for text in negatives] + [
            self._readings[text, False] for text in prompts
        ]
        distinct = list(dict.fromkeys(text for reading in readings for text in reading.texts))
        encoded = self._encode(distinct)
        row_of = {text: row for row, text in enumerate(distinct)}
        rows = [row_of] * len(readings)
        if self._parts.force_zeros_for_empty_prompt and encoded.pooled is not None:
            empty = [place for place in range(len(negatives)) if not any(readings[place].texts)]
            encoded = TextConditioning(
                hidden_states=torch.cat(
                    [encoded.hidden_states, torch.zeros_like(encoded.hidden_states[:1])]
                ),
                pooled=torch.cat([encoded.pooled, torch.zeros_like(encoded.pooled[:1])]),
            )
            for place in empty:
                rows[place] = {"": len(distinct)}
        return [
            PassText(encoded, list(zip(schedules, rows, strict=True)), self._config.prompt_ends)
            for schedules in zip(*(reading.passes for reading in readings), strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> TextConditioning:
        num_chunks = max(self._counts.of_text[text] for text in texts)
        sections = [self._sections[text] for text in texts]
        plain = [[section.text for section in one] for one in sections]
        parts = self._parts
        ids = [
            ids_tensor(tokenize_sections(plain, tokenizer, min_chunks=num_chunks), self._device)
            for tokenizer in parts.tokenizers
        ]
        if parts.family == "sd1":
            encoded = encode_sd1(parts.text_encoders[0], ids[0], self._clip_skip)
        else:
            encoded = encode_sdxl(*parts.text_encoders, *ids)
        if self._config.prompt_weights == "off":
            return encoded
        widths = [encoder.config.hidden_size for encoder in parts.text_encoders]
        weighted = [
            apply_weights(
                states,
                torch.from_numpy(token_weights(sections, tokenizer, num_chunks)).to(self._device),
                restore_mean=self._config.prompt_weights == "mean_restored",
            )
            for states, tokenizer in zip(
                encoded.hidden_states.split(widths, dim=-1), parts.tokenizers, strict=True
            )
        ]
        return TextConditioning(hidden_states=torch.cat(weighted, dim=-1), pooled=encoded.pooled)
