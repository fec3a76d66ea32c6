"""The model card of a release: what the model was trained on, how to prompt it, and how it was judged, in Markdown.

Tags and names come from strangers' files: everything is escaped, so that a tag can neither format nor link.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from training.data.geometry import Size
from training.evaluation.schedulers import label
from training.evaluation.verdict import sentence
from training.evaluation_config import EvaluationConfig
from training.run_config import RunConfig

RELIABLE, WITH_EMPHASIS = 1_000, 100
"""Images from which a tag works by itself, and from which it works when it is stressed. Source: bigASP's page."""
_MAX_TAGS = 100
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>:])")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetFacts:
    """What a training set holds, counted."""

    num_train: int
    num_validation: int
    num_captions: int
    """Training samples with a caption."""
    buckets: tuple[tuple[Size, int], ...]
    """Size and training samples, the most frequent first."""
    tags: tuple[tuple[str, int], ...]
    """All tags with their training samples, the most frequent first."""
    scores: tuple[tuple[int, int], ...]
    """Quality score and training samples, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All that the card says."""

    checkpoint: str
    """`<run>@<samples_seen>`."""
    digest: str
    """Of the checkpoint's weights."""
    base: str
    """Name of the base model."""
    base_digest: str
    family: str
    """sdxl or sd1."""
    license_name: str
    """Of the base model, which its fine-tunes inherit; a Hugging Face identifier."""
    fingerprint: str
    """Of the training set."""
    training_set: SetFacts
    run: RunConfig
    evaluation: EvaluationConfig
    verdicts: pl.DataFrame
    """Rows of table `verdicts`; may be empty."""


def count_set(rows: pl.DataFrame) -> SetFacts:
    """Count a training set.

    Args:
        rows: Of table `training_set`.
    """
    train = rows.filter(pl.col("split") == "train")
    buckets = (
        train.group_by("bucket_height", "bucket_width")
        .len("n")
        .sort("n", "bucket_height", "bucket_width", descending=True)
    )
    names = train.select(pl.col("tags").explode(empty_as_null=False, keep_nulls=False)).unnest("tags")
    tags = names.group_by("name").len("n").sort(["n", "name"], descending=[True, False])
    return SetFacts(
        num_train=train.height,
        num_validation=rows.height - train.height,
        num_captions=int(train["caption"].is_not_null().sum()),
        buckets=tuple((Size(height, width), count) for height, width, count in buckets.iter_rows()),
        tags=tuple(tags.select("name", "n").iter_rows()),
        scores=tuple(train.group_by("score").len("n").sort("score").iter_rows()),
    )


def render(card: Card) -> str:
    """Write the card: Hugging Face front matter and sections in Markdown."""
    run, _, samples_seen = card.checkpoint.rpartition("@")
    sections = {
        "Training data": _data(card.training_set),
        "How to prompt": _advice(card),
        "Tags": _tags(card.training_set),
        "Training": _training(card, int(samples_seen)),
        "Evaluation": _evaluation(card),
        "Licence": f"The licence of the base model, {escape(card.base)} ({escape(card.license_name)}), holds for this "
        "model too. Nothing is said here about the rights in the training images.",
        "Lineage": _table(
            ("what", "SHA-256"),
            [("weights", card.digest), ("training set", card.fingerprint), ("base model", card.base_digest)],
        ),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    intro = (
        f"{escape(card.base)} fine-tuned on {card.training_set.num_train:,} images, {int(samples_seen):,} samples "
        f"long. Written by the pipeline that trained it; every number below is counted, none is recalled."
    )
    return f"{_front_matter(card)}\n# {escape(run)}\n\n{intro}\n\n{body}"


def escape(text: str) -> str:
    """Text as Markdown that shows it and nothing else: no markup, no HTML, no link, one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\1", plain)


def _front_matter(card: Card) -> str:
    # JSON strings are YAML strings, whatever they hold.
    lines = {
        "license": card.license_name,
        "base_model": card.base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion-xl" if card.family == "sdxl" else "stable-diffusion", "fine-tuned"],
    }
    return "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()) + "---\n"


def _data(facts: SetFacts) -> str:
    shares = ", ".join(f"{score}: {count:,}" for score, count in facts.scores)
    table = _table(
        ("height × width", "images"), [(f"{size.height} × {size.width}", f"{n:,}") for size, n in facts.buckets]
    )
    return (
        f"{facts.num_train:,} images for training, {facts.num_validation:,} held out and never trained on; "
        f"{facts.num_captions:,} have a caption.\n\nImages by quality score (9 is best): {shares or 'none'}.\n\n{table}"
    )


def _advice(card: Card) -> str:
    prompts, sampling = card.run.prompts, card.evaluation.sampling
    shown = [f"Tags, separated by commas; training prompts had about {prompts.mean_tags:.0f} of them."]
    if prompts.caption_prob:
        shown.append(f"Sentences work too: {prompts.caption_prob:.0%} of the captioned images were trained with them.")
    if prompts.score_tags and card.training_set.scores:
        best = card.training_set.scores[-1][0]
        shown.append(f"Begin with `score_{best}` or `score_7_up` for quality; `score_N_up` means N or better.")
    shown.append(
        f"Prompts of up to {prompts.max_chunks * 75} tokens, in chunks of 75."
        if prompts.max_chunks > 1
        else "Prompts of up to 75 tokens."
    )
    shown.append(
        f"Sampler {label(sampling.sampler, sampling.schedule)}, {sampling.num_steps} steps, "
        f"guidance {sampling.guidance_scale:g}, "
        "at one of the sizes above: so were the pictures of the evaluation made."
    )
    return "\n".join(f"- {line}" for line in shown)


def _tags(facts: SetFacts) -> str:
    bands = (
        (f"Reliable ({RELIABLE:,} images and more)", RELIABLE, None),
        (f"With emphasis ({WITH_EMPHASIS} to {RELIABLE - 1})", WITH_EMPHASIS, RELIABLE),
        (f"Weak (fewer than {WITH_EMPHASIS})", 0, WITH_EMPHASIS),
    )
    parts = [f"{len(facts.tags):,} tags were trained."]
    for title, least, most in bands:
        own = [(tag, count) for tag, count in facts.tags if count >= least and (most is None or count < most)]
        if own:
            shown = ", ".join(f"{escape(tag)} ({count:,})" for tag, count in own[:_MAX_TAGS])
            more = f", and {len(own) - _MAX_TAGS:,} more" if len(own) > _MAX_TAGS else ""
            parts.append(f"**{title}:** {shown}{more}")
    return "\n\n".join(parts)


def _training(card: Card, samples_seen: int) -> str:
    run = card.run
    encoders = [name for name, on in (("1", run.train_text_encoder), ("2", run.train_text_encoder_2)) if on]
    rows: Mapping[str, object] = {
        "samples seen": f"{samples_seen:,}",
        "samples per optimizer step": run.batch.global_batch_size,
        "peak learning rate": f"{run.optimizer.learning_rate:g} ({run.optimizer.schedule})",
        "warm-up": f"{run.optimizer.warmup_samples:,} samples",
        "weight decay": run.optimizer.weight_decay,
        "trained": "UNet" + (f" and text encoder {' and '.join(encoders)}" if encoders else ""),
        "loss weighting": run.loss.weighting,
        "empty prompts": f"{run.prompts.empty_prob:.0%}",
        "precision": run.precision,
        "seed": run.seed,
    }
    return _table(("setting", "value"), [(name, str(value)) for name, value in rows.items()])


def _evaluation(card: Card) -> str:
    if card.verdicts.is_empty():
        return "Not compared with its base model yet."
    in_order = card.verdicts.with_columns(first=pl.col("group") != "all").sort("first", "group", "metric")
    lines = [f"- {escape(sentence(row))}" for row in in_order.iter_rows(named=True)]
    against = escape(card.verdicts["a"][0])
    return (
        f"Against {against}, paired by prompt with equal seeds, 95 % t intervals, Holm over metrics. CLIP score and "
        "the LAION aesthetic score are trip wires and no judges of taste: look at `report.html`.\n\n" + "\n".join(lines)
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
