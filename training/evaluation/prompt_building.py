"""Prompt sets that are made: from held-out images, from the shipped groups, or from files in
PartiPrompts' form."""

import csv
import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from training import seeds
from training.buckets.geometry import Size
from training.config.evaluation import HeldOutPromptsConfig
from training.curation.vocabulary import place_of
from training.errors import EvaluationError
from training.evaluation.prompt_groups import group_prompts
from training.evaluation.prompt_sets import COLUMNS, make_frame, text_key, trained_keys
from training.prompts.tag_names import PLACES, SHORT_TAG
from training.sampling.prompt_reading import is_plain
from training.seeds import Purpose

PARTI_COLUMNS = ("Prompt", "Category")
"""Of a tab-separated file: github.com/google-research/parti, PartiPrompts.tsv."""
TEXTS = ("split", "tags", "caption", "made_caption")
"""Columns of an image that say what it is trained with."""
HELD_OUT = ("image_id", "height", "width", *TEXTS, "words")
"""Columns of an image that say what prompt it becomes."""
_SENTENCE_ENDS = (".", "!", "?", ",", ";", ":")
_ASPECTS = (1.0, 2 / 3, 3 / 2)
"""Width by height of prompts that come from no image."""


def from_validation(
    selected: pl.DataFrame,
    sizes: Sequence[Size],
    num_prompts: int,
    style: HeldOutPromptsConfig,
    previous: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Build a prompt set from held-out images: their tags as the recipe orders them, their
    captions, or both.

    Args:
        selected: Of table `selected_images`, with the columns `HELD_OUT`.
        sizes: Sizes of the bucket plan; each prompt gets the one nearest to its image's shape.
        num_prompts: At most this many.
        style: How an image becomes a prompt.
        previous: The set as it was built before in this style: its prompts stay as long as their
            image is held out and no training image has their text, so that a growing data set does
            not change what checkpoints are judged by.

    Returns:
        Rows of table `prompt_sets`, without those whose caption or tags a training image has too;
        choice, tags and order follow from the image's id, so that more images change few prompts.
        Texts that a UI reads otherwise than they stand (`:)`, `16:9` at the end, AND) are left out.
        Groups are `caption`, `caption_and_tags` and `tags`. Empty where no held-out image has a
        text of its own.
    """
    held_out = selected.filter(pl.col("split") == "validation").sort("image_id")
    candidates = []
    for row in sorted(
        held_out.iter_rows(named=True),
        key=lambda row: hashlib.sha256(row["image_id"].encode()).digest(),
    ):
        if made := _write(row, style):
            size = nearest(sizes, row["width"] / row["height"])
            candidates.append(
                (_row(row["image_id"][:16], made.text, made.group, size), text_key(made.source))
            )
    keys = {str(row["prompt_id"]): key for row, key in candidates}
    kept = [] if previous is None else previous.select(COLUMNS).sort("prompt_id").to_dicts()
    candidates = [
        (row, keys[row["prompt_id"]]) for row in kept if row["prompt_id"] in keys
    ] + candidates
    texts = [text_key(str(row["text"])) for row, _ in candidates]
    seen = trained_keys([*texts, *keys.values()], trained_texts(selected))
    rows: dict[str, dict[str, object]] = {}
    for (row, key), text in zip(candidates, texts, strict=True):
        is_new = not {key, text} & seen and row["prompt_id"] not in rows
        if is_new and len(rows) < num_prompts and is_plain(str(row["text"])):
            seen |= {key, text}
            rows[str(row["prompt_id"])] = row
    return make_frame(list(rows.values()))


def from_groups(
    groups: Sequence[str], sizes: Sequence[Size], known_words: Collection[str]
) -> pl.DataFrame:
    """The shipped prompts of `groups`, see `prompt_groups`; a size follows from the prompt's id.

    Args:
        groups: Names of groups.
        sizes: Sizes of the bucket plan: each prompt gets that nearest to square, upright or wide.
        known_words: Tags and aliases of the data set.

    Raises:
        EvaluationError: the data set has tags for too many of the rare words.
    """
    rows = [
        _row(prompt_id, text, group, _size_of(prompt_id, sizes))
        for group in groups
        for prompt_id, text in group_prompts(group, known_words)
    ]
    return make_frame(rows)


def is_parti(path: Path) -> bool:
    """Whether a file's header is that of PartiPrompts."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return set(PARTI_COLUMNS) <= set(file.readline().rstrip("\r\n").split("\t"))


def read_parti(path: Path, sizes: Sequence[Size]) -> pl.DataFrame:
    """Import a tab-separated file with the columns Prompt and Category; others are ignored.

    A prompt's id follows from its text, so that inserting a line moves no other prompt; its group
    is the category.

    Raises:
        EvaluationError: no prompt, or a line with too few fields or an empty prompt; names file and
            line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"prompt file {path} is not UTF-8: {error}") from None
    reader = csv.DictReader(
        io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    seen: Counter[str] = Counter()
    rows = []
    for line in reader:
        text, category = ((line[name] or "").strip() for name in PARTI_COLUMNS)
        if not text or not category:
            raise EvaluationError(
                f"{path}:{reader.line_num}: Prompt {text!r} and Category {category!r} must be filled"
            )
        prompt_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        seen[prompt_id] += 1
        if seen[prompt_id] > 1:
            prompt_id = (
                f"{prompt_id}-{seen[prompt_id]}"  # the same text again is drawn from another seed
            )
        group = re.sub(r"\W+", "_", category.casefold()).strip("_") or "general"
        rows.append(_row(prompt_id, text, group, _size_of(prompt_id, sizes)))
    if not rows:
        raise EvaluationError(f"prompt file {path} holds no prompt")
    return make_frame(rows)


def nearest(sizes: Sequence[Size], aspect: float) -> Size:
    """The size whose width / height is nearest to `aspect`, by ratio; of equal ones the largest."""
    return min(
        sizes, key=lambda size: (max(size.aspect / aspect, aspect / size.aspect), -size.area)
    )


def _size_of(prompt_id: str, sizes: Sequence[Size]) -> Size:
    return nearest(sizes, _ASPECTS[hashlib.sha256(prompt_id.encode()).digest()[0] % len(_ASPECTS)])


def _row(prompt_id: str, text: str, group: str, size: Size) -> dict[str, object]:
    return {
        "prompt_id": prompt_id, "text": text, "negative": "", "group": group, "height": size.height,
        "width": size.width,
    }  # fmt: skip


def trained_texts(images: pl.DataFrame) -> Iterator[str]:
    """Every line of the training images' captions and made captions, and all their tags as a
    prompt.

    Args:
        images: Of table `selected_images` or `training_set`, with the columns `TEXTS`.
    """
    for row in images.select(TEXTS).filter(pl.col("split") == "train").iter_rows(named=True):
        yield from _sentences(row)
        if names := _tag_names(row):
            yield _prompt_of(names)


class _Written(NamedTuple):
    """A held-out image as a prompt."""

    text: str
    group: str
    source: str
    """The caption or the tags, all of them, that no training image may have."""


def _write(row: dict[str, object], style: HeldOutPromptsConfig) -> _Written | None:
    """What an image becomes; None where it has no text of its own."""
    draw = seeds.generator(0, Purpose.PROMPT_SET, str(row["image_id"]))
    share, sentences, names = draw.random(), _sentences(row), _tag_names(row)
    if sentences and (not names or share < style.caption_prob):
        return _Written(sentences[0], "caption", sentences[0])
    if not names:
        return None
    tags = _prompt_of(_choose(row, style, draw))
    before = f"{style.prefix}, " if style.prefix else ""
    if sentences and share < style.caption_prob + style.caption_and_tags_prob:
        comma = "" if sentences[0].endswith(_SENTENCE_ENDS) else ","
        return _Written(f"{before}{sentences[0]}{comma} {tags}", "caption_and_tags", sentences[0])
    return _Written(before + tags, "tags", _prompt_of(names))


def _choose(row: dict[str, object], style: HeldOutPromptsConfig, draw: random.Random) -> list[str]:
    """An image's tags and words in a prompt: as many as the style has, in its order.

    Source: as `training/prompts/chosen_tags.py`.
    """
    tags: list[dict[str, str]] = row["tags"]  # type: ignore[assignment]
    words: list[str] = row["words"] or []  # type: ignore[assignment]
    places = dict.fromkeys(words, len(PLACES))
    places |= {
        tag["name"]: PLACES.get(place_of(tag["name"], tag["category"]), len(PLACES)) for tag in tags
    }
    first = [name for name in style.first_tags if name in places]
    others = sorted(places.keys() - set(first))
    draw.shuffle(others)
    if style.num_tags:
        others = others[: max(style.num_tags - len(first), 0)]
    if style.order == "kohaku":
        placed = sorted((places[name], name) for name in others if places[name] < len(PLACES))
        others = [name for _, name in placed] + [
            name for name in others if places[name] == len(PLACES)
        ]
    chosen = [*first, *others]
    return (
        [name.replace("_", " ") if len(name) > SHORT_TAG else name for name in chosen]
        if style.spaces
        else chosen
    )


def _sentences(row: dict[str, object]) -> list[str]:
    """The lines of an image's caption, then of its made one."""
    lines = [
        line.strip()
        for name in ("caption", "made_caption")
        for line in str(row[name] or "").splitlines()
    ]
    return [line for line in lines if line]


def _tag_names(row: dict[str, object]) -> list[str]:
    tags: list[dict[str, str]] = row["tags"] or []  # type: ignore[assignment]
    return [tag["name"] for tag in tags]


def _prompt_of(tags: Sequence[str]) -> str:
    return ", ".join(tags)
