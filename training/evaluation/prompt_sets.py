"""Prompt sets: the prompts that checkpoints are judged by, each with a size and a seed that follows from its id alone.

A prompt that the model was trained on says nothing about it: `overlap` finds such prompts, `refuse_overlap` refuses.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from training import commit, seeds
from training.data.geometry import Size
from training.data.tables import TABLES
from training.errors import EvaluationError
from training.seeds import Purpose

COLUMNS = ("prompt_id", "text", "negative", "group", "height", "width")
_SCHEMA = {name: pl.Int32 if name in ("height", "width") else pl.String for name in COLUMNS}
MULTIPLE_PX = 8
"""Both sides of a picture must be multiples of this: the VAE's scale."""
MAX_SIDE_PX = 8192
"""Longest side of a picture."""
_MAX_TAGS = 12


def seed_of(prompt_id: str) -> int:
    """The 63-bit seed of a prompt's generator: inserting, removing or reordering prompts moves no other."""
    return seeds.integer(0, Purpose.SAMPLE_IMAGE, prompt_id)


def read_prompts(path: Path) -> pl.DataFrame:
    """Read a prompt set from a UTF-8 CSV file with a header.

    Args:
        path: Columns prompt_id, text, height, width (pixels); negative and group may be missing, which means no
            negative prompt and the group `general`.

    Returns:
        Rows of table `prompt_sets`, sorted by prompt_id.

    Raises:
        EvaluationError: the file is missing, empty or no CSV; a column is missing or unknown; an id is empty or
            repeats; a text is empty; a side is no multiple of 8 between 8 and 8192. Names file and line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"prompt file {path} is not UTF-8: {error}") from None
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    rows: list[dict[str, object]] = []
    lines: dict[str, int] = {}
    try:
        _check_header(path, reader.fieldnames or ())
        for line in reader:
            row = _parse(f"{path}:{reader.line_num}", line)
            prompt_id = str(row["prompt_id"])
            if prompt_id in lines:
                raise EvaluationError(
                    f"{path}:{reader.line_num}: prompt_id {prompt_id!r} stands in line {lines[prompt_id]} already"
                )
            lines[prompt_id] = reader.line_num
            rows.append(row)
    except csv.Error as error:
        raise EvaluationError(f"{path}:{reader.line_num}: no valid CSV: {error}") from None
    if not rows:
        raise EvaluationError(f"prompt file {path} holds no prompt")
    return _frame(rows)


def write_prompts(path: Path, prompts: pl.DataFrame) -> None:
    """Write rows of table `prompt_sets` as a CSV file that `read_prompts` reads; seeds are left out."""
    commit.write_bytes(path, prompts.select(COLUMNS).write_csv().encode())


def digest(prompts: pl.DataFrame) -> str:
    """The digest of a prompt set: over its rows in order of prompt_id, seeds included."""
    frame = TABLES["prompt_sets"].conform(prompts)
    return commit.logical_digest(commit.column_digests(frame), frame.height)


def overlap(prompts: pl.DataFrame, trained: Iterable[str]) -> list[str]:
    """Ids of prompts whose text is that of a caption or prompt in `trained`, sorted.

    Case, spaces, underscores and the order of what stands between commas make no difference.
    """
    known = {_key(text) for text in trained}
    return sorted(row["prompt_id"] for row in prompts.iter_rows(named=True) if _key(row["text"]) in known)


def refuse_overlap(prompts: pl.DataFrame, trained: Iterable[str]) -> None:
    """Refuse a prompt set of which a prompt is a training caption or prompt.

    Raises:
        EvaluationError: names up to five of them.
    """
    found = overlap(prompts, trained)
    if found:
        raise EvaluationError(
            f"{len(found)} of {prompts.height} prompts were trained on ({', '.join(found[:5])}): a prompt set must "
            "hold none of the training captions"
        )


def from_validation(selected: pl.DataFrame, sizes: Sequence[Size], num_prompts: int) -> pl.DataFrame:
    """Build a prompt set from held-out images: their captions, or up to twelve of their tags where there is none.

    Args:
        selected: Of table `selected_images`: image_id, height, width, split, tags, caption.
        sizes: Sizes of the bucket plan; each prompt gets the one nearest to its image's shape.
        num_prompts: At most this many.

    Returns:
        Rows of table `prompt_sets`, without texts that a training image has too; the choice follows the SHA-256 of
        the image's id, so that more images change few prompts. Groups are `caption` and `tags`.

    Raises:
        EvaluationError: no held-out image has a text of its own.
    """
    trained = {
        _key(text)
        for row in selected.filter(pl.col("split") == "train").iter_rows(named=True)
        for text, _ in _texts(row)
    }
    held_out = selected.filter(pl.col("split") == "validation").sort("image_id")
    rows: list[dict[str, object]] = []
    seen = set(trained)
    for row in sorted(
        held_out.iter_rows(named=True), key=lambda row: hashlib.sha256(row["image_id"].encode()).digest()
    ):
        for text, group in _texts(row)[:1]:
            if _key(text) in seen or len(rows) == num_prompts:
                continue
            seen.add(_key(text))
            size = min(sizes, key=lambda size: abs(size.aspect / Size(row["height"], row["width"]).aspect - 1))
            rows.append(
                {
                    "prompt_id": row["image_id"][:16], "text": text, "negative": "", "group": group,
                    "height": size.height, "width": size.width,
                }
            )  # fmt: skip
    if not rows:
        raise EvaluationError(
            f"none of {held_out.height} held-out images has a caption or tags that no training image has: "
            "write a prompt file"
        )
    return _frame(rows)


def _frame(rows: list[dict[str, object]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=_SCHEMA).with_columns(
        pl.Series("seed", [seed_of(str(row["prompt_id"])) for row in rows], dtype=pl.Int64)
    )
    return TABLES["prompt_sets"].conform(frame)


def _check_header(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in ("prompt_id", "text", "height", "width") if name not in names]
    unknown = [name for name in names if name not in COLUMNS]
    if missing or unknown or len(set(names)) != len(names):
        raise EvaluationError(
            f"prompt file {path} has columns {', '.join(names) or 'none'}: missing {missing}, unknown {unknown}; "
            f"known are {', '.join(COLUMNS)}, each once"
        )


def _parse(where: str, line: dict[str | None, str | None]) -> dict[str, object]:
    """One row of the file, checked."""
    if None in line or None in line.values():
        raise EvaluationError(f"{where}: the line has more or fewer fields than the header")
    fields = {str(name): (value or "").strip() for name, value in line.items()}
    for name in ("prompt_id", "text"):
        if not fields[name]:
            raise EvaluationError(f"{where}: {name} is empty")
    row: dict[str, object] = {"negative": "", **fields, "group": fields.get("group") or "general"}
    for name in ("height", "width"):
        value = fields[name]
        if not value.isascii() or not value.isdigit() or not 0 < int(value) <= MAX_SIDE_PX or int(value) % MULTIPLE_PX:
            raise EvaluationError(
                f"{where}: {name}={value!r} of prompt {fields['prompt_id']!r} must be a multiple of {MULTIPLE_PX} "
                f"pixels, at most {MAX_SIDE_PX}"
            )
        row[name] = int(value)
    return row


def _key(text: str) -> str:
    """What two prompts have in common that say the same: sorted comma-separated parts in one spelling."""
    parts = (" ".join(part.replace("_", " ").casefold().split()).rstrip(".") for part in text.split(","))
    return ",".join(sorted(part for part in parts if part))


def _texts(row: dict[str, object]) -> list[tuple[str, str]]:
    """The texts of a selected image with their group, the caption first."""
    texts = [(str(row["caption"]).strip(), "caption")] if row["caption"] else []
    tags: list[dict[str, str]] = row["tags"] or []  # type: ignore[assignment]
    names = [tag["name"] for tag in tags][:_MAX_TAGS]
    return [*texts, (", ".join(names), "tags")] if names else texts
