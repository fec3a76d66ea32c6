"""The model card of a release: what the model was trained on, how to prompt it, and how it was
judged, in Markdown.

Tags and names come from strangers' files: everything is escaped, so that a tag can neither format
nor link.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from training.config.evaluation import EvaluationConfig
from training.config.run import RunConfig
from training.evaluation.summary import COLUMNS
from training.evaluation.verdict import sentence
from training.models.trainables import trainable_of
from training.names import CheckpointName
from training.reports.card_advice import prompting, sampling_advice
from training.reports.card_facts import RELIABLE, WITH_EMPHASIS, RunFacts, SetFacts, band
from training.reports.card_markdown import BASES, escape, front_matter, licence_fields, table
from training.reports.overfitting import Summaries, sentences
from training.reports.scores import label_of
from training.reports.verdicts import in_order

_MAX_TAGS = 100
"""Of each band; tags.csv has all."""
_BAR_BLOCKS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A sample image beside the card."""

    file: str
    """Relative to the card."""
    text: str
    negative: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All that the card says."""

    checkpoint: str
    """`<run>@<samples_seen>`."""
    base: str
    """Name of the base model."""
    family: str
    """sdxl or sd1."""
    prediction_type: str
    """Of the fine-tuned model."""
    license_name: str
    """Of the base model, which its fine-tunes inherit."""
    license_files: Sequence[str]
    """Its texts beside the card; none where the base model came without."""
    lineage: Mapping[str, str]
    """What the model came from -> digest or revision."""
    training_set: SetFacts
    run: RunConfig
    run_facts: RunFacts
    evaluation: EvaluationConfig
    summaries: Summaries
    """Of the base and of checkpoints of the run, the guide's columns among others."""
    verdicts: pl.DataFrame
    """Rows of table `verdicts`; may be empty."""
    images: Sequence[Image]


def render(card: Card) -> str:
    """Write the card: Hugging Face front matter and sections in Markdown."""
    run, samples_seen = CheckpointName.parse(card.checkpoint)
    advice = [*prompting(card.run.prompts, card.training_set), *_reading(card)]
    sections = {
        "Pictures": _images(card.images),
        "Training data": _data(card.training_set),
        "How to prompt": "\n".join(f"- {line}" for line in advice),
        "Samplers": "\n".join(
            f"- {line}" for line in sampling_advice(card.evaluation.sampling, card.family)
        ),
        "Tags": _tags(card.training_set),
        "Training": _training(card, int(samples_seen)),
        "Evaluation": _evaluation(card),
        "Licence": _licence(card),
        "Lineage": table(
            ("what", "digest"),
            [(escape(what), f"`{value}`") for what, value in card.lineage.items()],
        ),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)
    intro = (
        f"{escape(card.base)} fine-tuned on {card.training_set.num_train:,} images, {int(samples_seen):,} samples "
        f"long. Written by the pipeline that trained it; every number below is counted, none is recalled."
    )
    return f"{_front_matter(card)}\n# {escape(run)}\n\n{intro}\n\n{body}"


def _front_matter(card: Card) -> str:
    text = card.license_files[0] if card.license_files else None
    gallery = [
        {"text": image.text, "output": {"url": image.file}}
        | ({"parameters": {"negative_prompt": image.negative}} if image.negative else {})
        for image in card.images
    ]
    return front_matter(
        {
            **licence_fields(card.license_name, text),
            "base_model": BASES.get(card.base),
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": [
                "stable-diffusion-xl" if card.family == "sdxl" else "stable-diffusion",
                "fine-tuned",
            ],
            "widget": gallery or None,
        }
    )


def _images(images: Sequence[Image]) -> str:
    if not images:
        return ""
    shown = table(
        [f"![sample {n}]({p.file})" for n, p in enumerate(images, 1)],
        [[escape(p.text) for p in images]],
    )
    return (
        f"{shown}\n\nBase and fine-tuned side by side, for all prompts: [report.html](report.html)."
    )


def _data(facts: SetFacts) -> str:
    total = max(facts.num_train, 1)
    parts = [
        f"{facts.num_train:,} images for training, {facts.num_validation:,} held out and never trained on; "
        f"{facts.num_captions:,} have a caption of their source, {facts.num_made_captions:,} one made by a model; a "
        f"watermark was found in {facts.num_watermarked:,}."
    ]
    if facts.num_forgotten:
        parts.append(f"{facts.num_forgotten:,} more were in the set and have been forgotten since.")
    if facts.scores:
        most = max(count for _, count in facts.scores)
        rows = [
            (str(s), f"{n:,}", f"{n / total:.1%}", "█" * round(n / most * _BAR_BLOCKS))
            for s, n in facts.scores
        ]
        parts.append(table(("quality score (9 is best)", "images", "share", ""), rows))
    if facts.words:
        words = [
            (escape(word), f"{count:,}", f"{count / total:.1%}") for word, count in facts.words
        ]
        parts.append(table(("quality, rating and date", "images", "share"), words))
    buckets = [
        (f"{size.height} × {size.width}", f"{n:,}", f"{n / total:.1%}") for size, n in facts.buckets
    ]
    parts.append(table(("bucket, height × width", "images", "share"), buckets))
    return "\n\n".join(parts)


def _reading(card: Card) -> list[str]:
    """How the text encoders are to be read, and what the UNet predicts, where that is not what UIs
    expect."""
    lines = []
    if card.run.clip_skip != 1:
        lines.append(f"Clip skip {card.run.clip_skip}, as it was trained.")
    if card.prediction_type == "v_prediction":
        zero = " with zero terminal SNR" if card.run.zero_terminal_snr else ""
        lines.append(f"The model predicts v{zero}: tell the UI so, or images are noise.")
    return lines


def _tags(facts: SetFacts) -> str:
    bands = {
        "reliable": f"Reliable ({RELIABLE:,} images and more)",
        "with emphasis": f"With emphasis ({WITH_EMPHASIS} to {RELIABLE - 1}), such as `(tag:1.5)`",
        "weak": f"Weak (fewer than {WITH_EMPHASIS})",
    }
    parts = [
        f"{len(facts.tags):,} tags were trained; [tags.csv](tags.csv) has all with their images and aliases."
    ]
    for word, title in bands.items():
        own = [(tag, count) for tag, count in facts.tags if band(count) == word]
        if own:
            shown = ", ".join(f"{escape(tag)} ({count:,})" for tag, count in own[:_MAX_TAGS])
            more = f", and {len(own) - _MAX_TAGS:,} more" if len(own) > _MAX_TAGS else ""
            parts.append(f"**{title}:** {shown}{more}")
    return "\n\n".join(parts)


def _training(card: Card, samples_seen: int) -> str:
    run, facts, optimizer = card.run, card.run_facts, card.run.optimizer
    trainable = trainable_of(run)
    text_rate = optimizer.text_encoder_learning_rate
    loss = run.loss.weighting + (
        f", gamma {run.loss.min_snr_gamma:g}" if run.loss.weighting == "min_snr" else ""
    )
    ema = optimizer.ema_half_life_samples
    rows: Mapping[str, object] = {
        "samples seen": f"{samples_seen:,} ({samples_seen / max(card.training_set.num_train, 1):.1f} per image)",
        "samples per optimizer step": run.batch.global_batch_size,
        "optimizer": f"{optimizer.name}, weight decay {optimizer.weight_decay:g}",
        "peak learning rate": f"{optimizer.learning_rate:g} ({optimizer.schedule})",
        "peak learning rate of text encoders": f"{optimizer.learning_rate if text_rate is None else text_rate:g}"
        if any(trainable.text_encoders)
        else None,
        "warm-up": f"{optimizer.warmup_samples:,} samples",
        "trained": trainable.about,
        "trained parameters": None if facts.num_parameters is None else f"{facts.num_parameters:,}",
        "loss": loss
        + (f", noise offset {run.loss.noise_offset:g}" if run.loss.noise_offset else ""),
        "predicts": card.prediction_type,
        "empty prompts": f"{run.prompts.empty_prob:.0%}",
        "averaged weights": f"half-life {ema:,} samples" if ema else "none",
        "precision": run.precision,
        "seed": run.seed,
        "device": facts.device,
    }
    shown = [(name, f"`{value}`") for name, value in rows.items() if value is not None]
    return f"{table(('setting', 'value'), shown)}\n\nThe whole configuration: [config.toml](config.toml)."


def _evaluation(card: Card) -> str:
    parts = []
    if card.summaries:
        rows = [
            (f"`{column}`", *(_number(own.get(column)) for _, own in card.summaries))
            for column in COLUMNS
        ]
        parts.append(table(("", *(escape(label_of(name)) for name, _ in card.summaries)), rows))
        if said := sentences(card.summaries):
            parts.append("\n".join(f"- {escape(line)}" for line in said))
    if card.verdicts.is_empty():
        sides = dict([*card.summaries[:1], *card.summaries[-1:]])
        failed = sum(own.get("num_failed", 0) for own in sides.values())
        why = f": {failed:.0f} images have no scores." if failed else " yet."
        parts.append(f"Not compared with its base model{why}")
    else:
        lines = [f"- {escape(sentence(row))}" for row in in_order(card.verdicts)]
        parts.append(
            f"Against {escape(card.verdicts['a'][0])}, paired by prompt with equal seeds, 95 % t intervals, Holm over "
            "metrics. These scores are trip wires and no judges of taste: look at [report.html](report.html).\n\n"
            + "\n".join(lines)
        )
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".removesuffix(".0000")


def _licence(card: Card) -> str:
    files = ", ".join(f"[{escape(name)}]({name})" for name in card.license_files)
    where = (
        f"Its text: {files}."
        if files
        else "**Its text is missing**: no LICENSE file was found beside the base model. Add it before you publish this."
    )
    return (
        f"The licence of the base model, {escape(card.base)} ({escape(card.license_name)}), holds for this model too. "
        f"{where} Nothing is said here about the rights in the training images."
    )
