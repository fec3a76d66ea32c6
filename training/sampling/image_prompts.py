"""Which prompt an image from elsewhere was made from: by prompt id, by what its file says of
itself, or by its name.

The first of these that tells a row counts: the name is a prompt's id, or begins with one; the file
holds the prompt, as A1111, its relatives and this package write it; a number in the name is that of
the row, counted from 0.
"""

import hashlib
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from training.errors import EvaluationError

_NUMBER = re.compile(r"\d+")
_NAMED_NUMBER = re.compile(r"prompt\W*_*(\d+)", re.IGNORECASE)
_EXTRA_NETWORKS = re.compile(r"\s*<(?:lora|lyco|hypernet):[^<>]*>")
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_COMMENT_CODES: Mapping[bytes, str] = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}


def own_file_stem(prompt_id: str) -> str:
    """Stem of the file that this package writes for a prompt: safe whatever the id holds."""
    return hashlib.sha256(prompt_id.encode()).hexdigest()[:16]


def rows_of(
    model: str, files: Sequence[Path], texts: Sequence[str], prompt_ids: Sequence[str]
) -> list[int]:
    """The row of the prompts that each image of one model was made from.

    Args:
        model: Name of the model's folder.
        files: Its images.
        texts: Prompts, a row each.
        prompt_ids: Their ids; empty where they have none.

    Raises:
        EvaluationError: nothing tells a file's row, or a number is none of a row; names the file.
    """
    ids = {
        name: row
        for row, prompt_id in enumerate(prompt_ids)
        for name in (own_file_stem(prompt_id), prompt_id)
    }
    said: dict[str, int] = {}
    for row, text in enumerate(texts):
        said.setdefault(_plain(text), row)
    rows = [_by_id(path.stem, ids) for path in files]
    rows = [
        row if row is not None else _by_metadata(path, said)
        for row, path in zip(rows, files, strict=True)
    ]
    left = [path for path, row in zip(files, rows, strict=True) if row is None]
    numbered = iter(_by_number(model, left, len(texts)))
    return [row if row is not None else next(numbered) for row in rows]


def read_prompt(path: Path) -> str | None:
    """The prompt inside an image file, without the networks that were added to it; None where there
    is none.

    Reads headers only: text `parameters` of PNG, the user comment of other formats.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as image:
            text = image.info.get("parameters") or _user_comment(image)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return None  # what cannot be read is said where it is decoded
    if not isinstance(text, str):
        return None
    prompt = re.split(r"^(?:Negative prompt: |Steps: \d)", text, maxsplit=1, flags=re.MULTILINE)[0]
    return _plain(prompt) or None


def _user_comment(image: Image.Image) -> str | None:
    value = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if not isinstance(value, bytes) or value[:8] not in _COMMENT_CODES:
        return None
    return value[8:].decode(_COMMENT_CODES[value[:8]], errors="replace")


def _plain(text: str) -> str:
    return " ".join(_EXTRA_NETWORKS.sub("", text).split())


def _by_id(stem: str, ids: Mapping[str, int]) -> int | None:
    """The row of the longest id that a name is, or begins with before something that is no part of
    a word."""
    fitting = [
        name
        for name in ids
        if stem.startswith(name) and not stem[len(name) : len(name) + 1].isalnum()
    ]
    return ids[max(fitting, key=len)] if fitting else None


def _by_metadata(path: Path, said: Mapping[str, int]) -> int | None:
    prompt = read_prompt(path)
    return None if prompt is None else said.get(prompt)


def _by_number(model: str, files: Sequence[Path], count: int) -> list[int]:
    """Rows by a number in the names: that after `prompt`; else the first one, or the last one where
    the first is the same in all names and so belongs to the model. The model's own name in front
    does not count.

    Source: the last one after GhostReview's script, `int(name.split('-')[-1])`.
    """
    found = []
    for path in files:
        stem = path.stem.removeprefix(model)
        named = _NAMED_NUMBER.search(stem)
        found.append([int(number) for number in ([named[1]] if named else _NUMBER.findall(stem))])
    is_models = (
        len({numbers[0] for numbers in found if numbers})
        == 1
        < len({tuple(numbers) for numbers in found})
    )
    last_fits = all(numbers and numbers[-1] < count for numbers in found)
    place = -1 if is_models and last_fits else 0
    for path, numbers in zip(files, found, strict=True):
        if not numbers or numbers[place] >= count:
            raise EvaluationError(
                f"image {path}: its name is no prompt's id, the file holds no prompt of the table, and the "
                f"{'last' if place else 'first'} number of its name must be that of a row, 0 to {count - 1}"
                + (f", not {numbers[place]}" if numbers else "")
            )
    return [numbers[place] for numbers in found]
