"""Prompt sets: the prompts that checkpoints are judged by, each with a size and a seed that follows
from its id alone.

A prompt that the model was trained on says nothing about it: `overlap` finds such prompts,
`refuse_overlap` refuses.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from training import commit, seeds
from training.errors import EvaluationError
from training.seeds import Purpose
from training.tables.schemas import TABLES

COLUMNS = ("prompt_id", "text", "negative", "group", "height", "width")
_SCHEMA = {name: pl.Int32 if name in ("height", "width") else pl.String for name in COLUMNS}
MULTIPLE_PX = 8
"""Both sides of an image must be multiples of this: the VAE's scale."""
MAX_SIDE_PX = 8192
"""Longest side of an image."""
_ESCAPED = re.compile(r"\\+([()])")
_SCORE_TAG = re.compile(r"score \d( up)?")


def seed_of(prompt_id: str) -> int:
    """The 63-bit seed of a prompt's generator: inserting, removing or reordering prompts moves no
    other."""
    return seeds.integer(0, Purpose.SAMPLE_IMAGE, prompt_id)


def read_prompts(path: Path) -> pl.DataFrame:
    """Read a prompt set from a UTF-8 CSV file with a header.

    Args:
        path: Columns prompt_id, text, height, width (pixels); negative and group may be missing,
            which means no negative prompt and the group `general`.

    Returns:
        Rows of table `prompt_sets`, sorted by prompt_id.

    Raises:
        EvaluationError: the file is missing, empty or no CSV; a column is missing or unknown; an id
            is empty or repeats; a text is empty; a side is no multiple of 8 between 8 and 8192.
            Names file and line.
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
    return make_frame(rows)


def write_prompts(path: Path, prompts: pl.DataFrame) -> None:
    """Write rows of table `prompt_sets` as a CSV file that `read_prompts` reads; seeds are left
    out."""
    commit.write_bytes(path, prompts.select(COLUMNS).write_csv().encode())


def digest(prompts: pl.DataFrame) -> str:
    """The digest of a prompt set: over its rows in order of prompt_id, seeds included."""
    frame = TABLES["prompt_sets"].conform(prompts)
    return commit.logical_digest(commit.column_digests(frame), frame.height)


def overlap(prompts: pl.DataFrame, trained: Iterable[str]) -> list[str]:
    """Ids of prompts whose text is that of a caption or prompt in `trained`, sorted; what makes no
    difference says `text_key`."""
    keys = [
        (prompt_id, text_key(text))
        for prompt_id, text in prompts.select("prompt_id", "text").iter_rows()
    ]
    known = trained_keys([key for _, key in keys], trained)
    return sorted(prompt_id for prompt_id, key in keys if key in known)


def trained_keys(keys: Iterable[str], trained: Iterable[str]) -> set[str]:
    """Those of some prompts' `text_key`s that a caption or prompt in `trained` has; `trained` may
    be millions."""
    wanted = set(keys)
    return {key for text in trained if (key := text_key(text)) in wanted}


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


def make_frame(rows: list[dict[str, object]]) -> pl.DataFrame:
    """Rows of table `prompt_sets` from rows with `COLUMNS`; adds the seeds."""
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
        if (
            not value.isascii()
            or not value.isdigit()
            or not 0 < int(value) <= MAX_SIDE_PX
            or int(value) % MULTIPLE_PX
        ):
            raise EvaluationError(
                f"{where}: {name}={value!r} of prompt {fields['prompt_id']!r} must be a multiple of {MULTIPLE_PX} "
                f"pixels, at most {MAX_SIDE_PX}"
            )
        row[name] = int(value)
    return row


def text_key(text: str) -> str:
    """What two prompts have in common that say the same: what stands between commas, sorted, in one
    spelling.

    Case, spaces and underscores, a full stop at the end, and `\\(` for `(`, as the UIs want it,
    make no difference; nor do score tags, which every training prompt may have.
    """
    plain = _ESCAPED.sub(r"\1", unicodedata.normalize("NFC", text.replace("_", " ").casefold()))
    parts = (" ".join(part.split()).rstrip(" .") for part in plain.split(","))
    return ",".join(sorted(part for part in parts if part and not _SCORE_TAG.fullmatch(part)))
