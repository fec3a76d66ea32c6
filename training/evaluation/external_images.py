"""Scores images made anywhere: folders of images and a CSV of prompts, as the guide and
GhostReview lay them out.

A folder of images per model, each image with its prompt as `image_prompts` tells: by the
prompt's id, by what the file says of itself, or by a number in its name. Or GhostReview's own: a
folder `<model>-<number>` per model and prompt, where the CSV has its columns `sd_model_checkpoint`
and `index`. Numbers count the CSV's rows from 0.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from training import commit, manifests
from training.config.workspace import DecodeConfig
from training.errors import EvaluationError
from training.evaluation import clip_score, summary
from training.evaluation.clip_score import Mapped, Seen
from training.images.decode_pool import DecodePool, Rejection
from training.progress import track
from training.sampling import image_prompts
from training.sampling.image_files import DTYPE

COLUMNS = ("Prompts", "text")
"""What prompts are called: in the guide's and GhostReview's tables, and in prompt files of this
package."""
ID_COLUMN = "prompt_id"
SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".webp"})
SUMMARY = "summary.csv"
IMAGES = "pictures"
"""Folder of the tables with a row per image."""
_IDENTITY = "foundry.identity"
_MODEL_COLUMNS = ("sd_model_checkpoint", "index")
_OF_PROMPT = re.compile(r"(.+)-(\d+)")
"""A folder of GhostReview's: `int(name.split('-')[-1])` in its script."""
_SCHEMA = {
    "Model": pl.String,
    "file": pl.String,
    "prompt_index": pl.Int64,
    "prompt": pl.String,
    "failed": pl.String,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A CSV of prompts."""

    texts: Sequence[str]
    """A row each."""
    prompt_ids: Sequence[str]
    """Column `prompt_id`, where there is one."""
    folders: Mapping[str, tuple[str, int]]
    """GhostReview's folders, `<sd_model_checkpoint>-<index>` -> model and row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The images of one model."""

    name: str
    files: Sequence[Path]
    rows: Sequence[int]
    """Row of the CSV that each was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model."""

    name: str
    num_images: int
    num_failed: int
    skipped: bool
    """Its scores were there already."""


def read_prompts(path: Path) -> Prompts:
    """Read a CSV with a column `Prompts`, or `text` as prompt files have it, and perhaps
    `prompt_id`.

    Raises:
        EvaluationError: it is missing, no UTF-8 or no CSV; the column is missing; a line has too
            few or too many fields, no prompt, or an id that is empty or there already. Names file
            and line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise EvaluationError(f"{path}:{line}: not UTF-8: {error.reason}") from None
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    texts: list[str] = []
    prompt_ids: dict[str, int] = {}
    folders: dict[str, tuple[str, int]] = {}
    try:
        header = next(reader, [])
        column = next((name for name in COLUMNS if name in header), None)
        if column is None:
            raise EvaluationError(
                f"{path}:1: no column {COLUMNS[0]!r}, only {', '.join(header) or 'nothing'}"
            )
        for fields in filter(None, reader):
            place = f"{path}:{reader.line_num}"
            if len(fields) != len(header):
                raise EvaluationError(
                    f"{place}: {len(fields)} fields, but the header has {len(header)}: check quotes"
                )
            row = dict(zip(header, fields, strict=True))
            if not row[column].strip():
                raise EvaluationError(f"{place}: column {column!r} is empty")
            if ID_COLUMN in row and (not row[ID_COLUMN] or row[ID_COLUMN] in prompt_ids):
                raise EvaluationError(
                    f"{place}: {ID_COLUMN} {row[ID_COLUMN]!r} is empty or stands above already"
                )
            if ID_COLUMN in row:
                prompt_ids[row[ID_COLUMN]] = len(texts)
            if all(row.get(name) for name in _MODEL_COLUMNS):
                model, index = (row[name] for name in _MODEL_COLUMNS)
                folders.setdefault(f"{model}-{index}", (model, len(texts)))
            texts.append(row[column])
    except csv.Error as error:
        raise EvaluationError(f"{path}:{reader.line_num}: no valid CSV: {error}") from None
    if not texts:
        raise EvaluationError(f"prompt file {path} holds no prompt")
    return Prompts(texts=texts, prompt_ids=list(prompt_ids), folders=folders)


def find_models(folder: Path, prompts: Prompts) -> list[Model]:
    """The models whose images lie in `folder`, by name; other files and hidden folders are left
    alone.

    Raises:
        EvaluationError: there is no image, or nothing tells the prompt of one.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder")
    found: dict[str, list[tuple[Path, int]]] = {}
    for inner in sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    ):
        own = sorted(
            path for path in inner.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if told := _of_one_prompt(inner.name, prompts):
            name, row = told
            found.setdefault(name, []).extend((path, row) for path in own)
        elif own:
            rows = image_prompts.rows_of(inner.name, own, prompts.texts, prompts.prompt_ids)
            found.setdefault(inner.name, []).extend(zip(own, rows, strict=True))
    if not any(found.values()):
        raise EvaluationError(
            f"{folder} holds no folder with images ({', '.join(sorted(SUFFIXES))})"
        )
    return [
        Model(name=name, files=[path for path, _ in pairs], rows=[row for _, row in pairs])
        for name, pairs in sorted(found.items())
    ]


def score_models(
    models: Iterable[Model],
    prompts: Prompts,
    out: Path,
    networks: Mapped,
    *,
    digests: Mapping[str, str],
    decode: DecodeConfig,
    batch_size: int,
) -> Iterator[Outcome]:
    """Score one model after the other; one whose images, prompts and networks are as they were is
    skipped.

    Writes `pictures/<model>.parquet` and `.csv` with a row per image, then `summary.csv` with
    exactly the guide's columns and a row per model, anew after each: killed at any point, the next
    call goes on with the next model.

    Args:
        models: As found.
        prompts: What they were asked for.
        out: Folder of the tables.
        networks: Asked for nothing when all models are skipped.
        digests: Of the networks.
        decode: What may be an image.
        batch_size: Images at a time.

    Yields:
        What became of each model.
    """
    for model in models:
        path = out / IMAGES / f"{model.name}.parquet"
        texts = [prompts.texts[row] for row in model.rows]
        identity = _identity(model, texts, digests)
        skipped = path.is_file() and pl.read_parquet_metadata(path).get(_IDENTITY) == identity
        if not skipped:
            with DecodePool(decode) as pool:
                pictures = (_image(one) for one in pool.pixels(model.files))
                shown = track(pictures, f"images of {model.name}", len(model.files))
                seen = clip_score.look(shown, texts, networks, batch_size=batch_size)
            frame = _table(model, texts, seen)
            commit.write_bytes(path.with_suffix(".csv"), frame.write_csv().encode())
            with commit.atomic_file(path) as temporary:
                frame.write_parquet(temporary, metadata={_IDENTITY: identity})
        write_summary(out)
        failed = manifests.read_parquet(path, ["failed"])["failed"]
        yield Outcome(
            name=model.name,
            num_images=len(failed),
            num_failed=len(failed) - failed.null_count(),
            skipped=skipped,
        )


def write_summary(out: Path) -> pl.DataFrame:
    """Write `summary.csv`: the guide's columns, a row per model of which there are scores, by
    name."""
    rows: list[dict[str, object]] = []
    for path in sorted((out / IMAGES).glob("*.parquet")):
        scores = manifests.read_parquet(path).filter(pl.col("failed").is_null())
        found = summary.summarise(scores["clip_score"].to_numpy(), scores["aesthetic"].to_numpy())
        rows.append({"Model": path.stem, **found})
    schema = {"Model": pl.String} | dict.fromkeys(summary.COLUMNS, pl.Float64)
    frame = pl.DataFrame(rows, schema=schema).with_columns(
        pl.col("count_LAIONScore").cast(pl.Int64)
    )
    commit.write_bytes(out / SUMMARY, frame.write_csv().encode())
    return frame


def _of_one_prompt(folder: str, prompts: Prompts) -> tuple[str, int] | None:
    """Model and row of one of GhostReview's folders; None where the CSV is not of its form, or the
    folder is not."""
    if folder in prompts.folders:
        return prompts.folders[folder]
    match = _OF_PROMPT.fullmatch(folder) if prompts.folders else None
    return (match[1], int(match[2])) if match and int(match[2]) < len(prompts.texts) else None


def _identity(model: Model, texts: Sequence[str], digests: Mapping[str, str]) -> str:
    """Digest of all that a model's scores follow from; of its images by name, size and time."""
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model.files]
    return commit.json_digest([stamps, list(texts), dict(digests), DTYPE])


def _image(answer: np.ndarray | Rejection) -> np.ndarray | str:
    if isinstance(answer, Rejection):
        return " ".join(part for part in (answer.reason, answer.detail or answer.value) if part)
    return answer


def _table(model: Model, texts: Sequence[str], seen: Seen) -> pl.DataFrame:
    """A row per image; scores are null where it failed."""
    names = [path.relative_to(path.parents[1]).as_posix() for path in model.files]
    failed = [seen.failures.get(place) for place in range(len(names))]
    columns = [[model.name] * len(names), names, list(model.rows), list(texts), failed]
    frame = pl.DataFrame(dict(zip(_SCHEMA, columns, strict=True)), schema=_SCHEMA)
    scores = {
        name: np.full(len(names), np.nan) for name in ("clip_score", "aesthetic", *seen.scores)
    }
    for name, values in seen.scores.items():
        scores[name][seen.rows] = values
    added = [pl.Series(name, values).fill_nan(None) for name, values in scores.items()]
    return frame.with_columns(added).select(*list(_SCHEMA)[:-1], *scores, "failed")
