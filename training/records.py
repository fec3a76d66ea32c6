"""Small JSON files that a version of this code wrote for later ones: `format` says in which form.

Another format is refused by its number before anything else of the file is read, so that a newer
version's keys are never taken for damage.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from training import commit
from training.errors import DamageError, PipelineError

T = TypeVar("T")


def write_record(path: Path, record_format: int, values: Mapping[str, Any]) -> None:
    """Write a record, atomically and durably.

    Args:
        path: The file.
        record_format: Number of the form in which the values are.
        values: All keys but `format`.
    """
    commit.write_json(path, {"format": record_format, **values})


def read_record(
    path: Path,
    record_format: int,
    build: Callable[[dict[str, Any]], T],
    *,
    subject: str = "",
    damaged: str = "{subject} is damaged: {error!r}",
    error: type[PipelineError] = DamageError,
) -> T:
    """Read a record.

    Args:
        path: The file.
        record_format: The only format that is read.
        build: Makes the result of all keys but `format`; where a key is missing, unknown or of
            another type, it raises a KeyError, TypeError, ValueError or AttributeError that says so.
        subject: What messages call the file; its path by default.
        damaged: What they say of a file that cannot be read, with `{subject}` and `{error}`.
        error: What is raised.

    Raises:
        FileNotFoundError: there is no such file.
        PipelineError: the `error`; it is of another format, or damaged.
    """
    subject = subject or str(path)
    try:
        values = json.loads(path.read_bytes())
        found = values["format"]
        if found != record_format:
            raise error(f"{subject} has format {found!r}, this version reads {record_format}")
        return build({key: value for key, value in values.items() if key != "format"})
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise error(damaged.format(subject=subject, error=reason)) from None
