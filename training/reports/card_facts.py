"""What a model card counts: the training set, and what the event log says of the run's time and
speed."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from training.buckets.geometry import Size
from training.curation.vocabulary import GENERAL, Vocabulary
from training.runs.event_log import OPENINGS, Event

RELIABLE, WITH_EMPHASIS = 1_000, 100
"""Images from which a tag works by itself, and from which it works when it is stressed; Kohaku XL
Delta's page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetFacts:
    """What a training set holds, counted."""

    num_train: int
    num_validation: int
    num_forgotten: int
    """Images that were in the set and have been forgotten since; nothing else counts them."""
    num_captions: int
    """Training samples with a caption of their source,"""
    num_made_captions: int
    """and with one that a model made."""
    num_watermarked: int
    """Training samples with a watermark box."""
    buckets: tuple[tuple[Size, int], ...]
    """Size and training samples, the most frequent first."""
    tags: tuple[tuple[str, int], ...]
    """All tags with their training samples, the most frequent first."""
    words: tuple[tuple[str, int], ...]
    """Words for quality, rating and date, the most frequent first."""
    scores: tuple[tuple[int, int], ...]
    """Quality score and training samples, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run says of itself."""

    hours: float
    """By the clock, validation and saving included, attempts that were done again as well."""
    images_per_s: float | None
    """Median over the steps; None where no step has been logged."""
    num_attempts: int
    num_parameters: int | None
    """Trained ones."""
    device: str
    """Kind and number."""


def count_set(rows: pl.DataFrame) -> SetFacts:
    """Count a training set.

    Args:
        rows: Of table `training_set`.
    """
    train = rows.filter(pl.col("split") == "train")
    by = ("bucket_height", "bucket_width")
    buckets = train.group_by(by).len("n").sort("n", *by, descending=True)
    return SetFacts(
        num_train=train.height,
        num_validation=int((rows["split"] == "validation").sum()),
        num_forgotten=int((rows["split"] == "forgotten").sum()),
        num_captions=int(train["caption"].is_not_null().sum()),
        num_made_captions=int(train["made_caption"].is_not_null().sum()),
        num_watermarked=int((train["boxes"].list.len() > 0).sum()),
        buckets=tuple((Size(height, width), count) for height, width, count in buckets.iter_rows()),
        tags=_counts(
            train.select(name=pl.col("tags").list.eval(pl.element().struct.field("name")))
        ),
        words=_counts(train.select(name="words")),
        scores=tuple(train.group_by("score").len("n").drop_nulls().sort("score").iter_rows()),
    )


def summarise_run(events: Sequence[Event]) -> RunFacts:
    """Sum up a run.

    Args:
        events: All lines of its log, `event_log.read_lines`.
    """
    attempts: list[list[Event]] = []
    for event in events:
        if event["event"] in OPENINGS:
            attempts.append([])
        if attempts:
            attempts[-1].append(event)
    milliseconds = sum(attempt[-1]["time_ms"] - attempt[0]["time_ms"] for attempt in attempts)
    rates = [
        event["images_per_s"]
        for event in events
        if event["event"] == "step" and "images_per_s" in event
    ]
    opening = attempts[-1][0] if attempts else {}
    return RunFacts(
        hours=milliseconds / 3_600_000,
        images_per_s=statistics.median(rates) if rates else None,
        num_attempts=len(attempts),
        num_parameters=opening.get("num_trained_parameters"),
        device=f"{opening.get('num_ranks', 1)} x {opening.get('device', 'unknown').partition(':')[0]}",
    )


def band(count: int) -> str:
    """How well a tag with so many images works."""
    return (
        "reliable" if count >= RELIABLE else "with emphasis" if count >= WITH_EMPHASIS else "weak"
    )


def tags_csv(facts: SetFacts, vocabulary: Vocabulary) -> str:
    """All tags as CSV, the most frequent first: tag, category, images, band, and the other names
    that were trained."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("tag", "category", "images", "band", "aliases"))
    for tag, count in facts.tags:
        aliases = ", ".join(vocabulary.aliases.get(tag, ()))
        writer.writerow((tag, vocabulary.category.get(tag, GENERAL), count, band(count), aliases))
    return buffer.getvalue()


def _counts(lists: pl.DataFrame) -> tuple[tuple[str, int], ...]:
    """Elements of column `name`, a list, with the rows that hold them, the most frequent first."""
    names = lists.select(
        pl.col("name").list.unique().explode(empty_as_null=False, keep_nulls=False)
    )
    return tuple(
        names.group_by("name").len("n").sort(["n", "name"], descending=[True, False]).iter_rows()
    )
