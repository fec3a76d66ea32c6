"""Prompt sets that are made: from held-out images, from the shipped groups, or from files in PartiPrompts' form."""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import polars as pl

from training.data.geometry import Size
from training.errors import EvaluationError
from training.evaluation.prompt_groups import group_prompts
from training.evaluation.prompt_reading import is_plain
from training.evaluation.prompt_sets import COLUMNS, make_frame, text_key, trained_keys

PARTI_COLUMNS = ("Prompt", "Category")
"""Of a tab-separated file: github.com/google-research/parti, PartiPrompts.tsv."""
TEXTS = ("split", "tags", "caption", "made_caption")
"""Columns of an image that say what it is trained with."""
_MAX_TAGS = 12
"""Of a prompt that is made from tags."""
_ASPECTS = (1.0, 2 / 3, 3 / 2)
"""Width by height of prompts that come from no picture."""


def from_validation(
    selected: pl.DataFrame, sizes: Sequence[Size], num_prompts: int, previous: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Build a prompt set from held-out images: their captions, or up to twelve of their tags where there is none.

    Args:
        selected: Of table `selected_images`: image_id, height, width, split, tags, caption, made_caption.
        sizes: Sizes of the bucket plan; each prompt gets the one nearest to its image's shape.
        num_prompts: At most this many.
        previous: The set as it was built before: its prompts stay as long as their image is held out and no training
            image has their text, so that a growing data set does not change what checkpoints are judged by.

    Returns:
        Rows of table `prompt_sets`, without texts that a training image has too; the choice follows the SHA-256 of
        the image's id, so that more images change few prompts. Texts that a UI reads otherwise than they stand (`:)`,
        `16:9` at the end, AND) are left out. Groups are `caption` and `tags`. Empty where no held-out image has a text
        of its own.
    """
    held_out = selected.filter(pl.col("split") == "validation").sort("image_id")
    ids = {image_id[:16] for image_id in held_out["image_id"]}
    kept = [] if previous is None else previous.select(COLUMNS).sort("prompt_id").to_dicts()
    candidates = [row for row in kept if row["prompt_id"] in ids]
    for row in sorted(
        held_out.iter_rows(named=True), key=lambda row: hashlib.sha256(row["image_id"].encode()).digest()
    ):
        size = nearest(sizes, row["width"] / row["height"])
        if sentences := _sentences(row):
            candidates.append(_row(row["image_id"][:16], sentences[0], "caption", size))
        elif names := _tag_names(row):
            candidates.append(_row(row["image_id"][:16], _prompt_of(names[:_MAX_TAGS]), "tags", size))
    keys = [text_key(str(row["text"])) for row in candidates]
    seen = trained_keys(keys, trained_texts(selected))
    rows: dict[str, dict[str, object]] = {}
    for row, key in zip(candidates, keys, strict=True):
        is_new = key not in seen and row["prompt_id"] not in rows
        if is_new and len(rows) < num_prompts and is_plain(str(row["text"])):
            seen.add(key)
            rows[str(row["prompt_id"])] = row
    return make_frame(list(rows.values()))


def from_groups(groups: Sequence[str], sizes: Sequence[Size], known_words: Collection[str]) -> pl.DataFrame:
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

    A prompt's id follows from its text, so that inserting a line moves no other prompt; its group is the category.

    Raises:
        EvaluationError: no prompt, or a line with too few fields or an empty prompt; names file and line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"prompt file {path} is not UTF-8: {error}") from None
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    seen: Counter[str] = Counter()
    rows = []
    for line in reader:
        text, category = ((line[name] or "").strip() for name in PARTI_COLUMNS)
        if not text or not category:
            raise EvaluationError(f"{path}:{reader.line_num}: Prompt {text!r} and Category {category!r} must be filled")
        prompt_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        seen[prompt_id] += 1
        if seen[prompt_id] > 1:
            prompt_id = f"{prompt_id}-{seen[prompt_id]}"  # the same text again is drawn from another seed
        group = re.sub(r"\W+", "_", category.casefold()).strip("_") or "general"
        rows.append(_row(prompt_id, text, group, _size_of(prompt_id, sizes)))
    if not rows:
        raise EvaluationError(f"prompt file {path} holds no prompt")
    return make_frame(rows)


def nearest(sizes: Sequence[Size], aspect: float) -> Size:
    """The size whose width / height is nearest to `aspect`, by ratio; of equal ones the largest."""
    return min(sizes, key=lambda size: (max(size.aspect / aspect, aspect / size.aspect), -size.area))


def _size_of(prompt_id: str, sizes: Sequence[Size]) -> Size:
    return nearest(sizes, _ASPECTS[hashlib.sha256(prompt_id.encode()).digest()[0] % len(_ASPECTS)])


def _row(prompt_id: str, text: str, group: str, size: Size) -> dict[str, object]:
    return {
        "prompt_id": prompt_id, "text": text, "negative": "", "group": group, "height": size.height,
        "width": size.width,
    }  # fmt: skip


def trained_texts(images: pl.DataFrame) -> Iterator[str]:
    """Every line of the training images' captions and made captions, and their tags as a prompt, all of them and as
    many as a prompt is made of.

    Args:
        images: Of table `selected_images` or `training_set`, with the columns `TEXTS`.
    """
    for row in images.select(TEXTS).filter(pl.col("split") == "train").iter_rows(named=True):
        yield from _sentences(row)
        if names := _tag_names(row):
            yield _prompt_of(names)
            if len(names) > _MAX_TAGS:
                yield _prompt_of(names[:_MAX_TAGS])


def _sentences(row: dict[str, object]) -> list[str]:
    """The lines of an image's caption, then of its made one."""
    lines = [line.strip() for name in ("caption", "made_caption") for line in str(row[name] or "").splitlines()]
    return [line for line in lines if line]


def _tag_names(row: dict[str, object]) -> list[str]:
    tags: list[dict[str, str]] = row["tags"] or []  # type: ignore[assignment]
    return [tag["name"] for tag in tags]


def _prompt_of(tags: Sequence[str]) -> str:
    return ", ".join(tags)
