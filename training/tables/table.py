"""What a table is: columns with their types and meanings, and the closed list of reasons for a
rejection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import polars as pl

from training.errors import DataError

BOX = pl.Struct(dict.fromkeys(("y0", "x0", "y1", "x1"), pl.Float64))
SCORED_BOX = pl.Struct(dict.fromkeys(("y0", "x0", "y1", "x1", "confidence"), pl.Float64))
TAG = pl.Struct({"name": pl.String, "category": pl.String})
SCORED_TAG = pl.Struct({"name": pl.String, "probability": pl.Float32})
UTC = pl.Datetime("us", "UTC")


class Reason(StrEnum):
    """Why an image, or what lies beside it, is not used. A closed list: `rejected_images.reason`
    holds nothing else."""

    GONE = "gone"
    NOT_A_FILE = "not_a_file"
    LINK_NOT_FOLLOWED = "link_not_followed"
    UNREADABLE = "unreadable"
    EMPTY_FILE = "empty_file"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    MODE_NOT_ALLOWED = "mode_not_allowed"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TRUNCATED = "truncated"
    DECODE_FAILED = "decode_failed"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_CRASHED = "decode_crashed"
    OUT_OF_MEMORY = "out_of_memory"
    ANIMATED = "animated"
    FORGOTTEN = "forgotten"
    CHANGED_WHILE_READ = "changed_while_read"
    NO_BUCKET = "no_bucket"
    SMALLER_THAN_BUCKET = "smaller_than_bucket"
    NON_FINITE_LATENTS = "non_finite_latents"
    ANNOTATION_FAILED = "annotation_failed"
    SIDECAR_UNMATCHED = "sidecar_unmatched"
    SIDECAR_UNREADABLE = "sidecar_unreadable"
    SIDECAR_MALFORMED = "sidecar_malformed"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its type, one line of meaning, and the absolute tolerance of a model's output."""

    dtype: pl.DataType | type[pl.DataType]
    about: str
    tolerance: float | None = None
    """None: equal inputs give equal values on every machine. Else the largest allowed
    difference."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table: what a row is, what identifies it, and its columns in order."""

    name: str
    row: str
    key: tuple[str, ...]
    columns: Mapping[str, Column]
    has_generations: bool = False
    """Whether a new commit of a part adds a generation and leaves the older ones."""

    @property
    def schema(self) -> pl.Schema:
        """Polars schema in column order."""
        return pl.Schema({name: column.dtype for name, column in self.columns.items()})

    def empty(self) -> pl.DataFrame:
        """A frame of no rows."""
        return pl.DataFrame(schema=self.schema)

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Order columns, check types and keys, and sort by key: equal content becomes equal bytes.

        Raises:
            DataError: a column is missing, unknown or of another type, or a key repeats.
        """
        missing = [name for name in self.columns if name not in frame.columns]
        unknown = [name for name in frame.columns if name not in self.columns]
        if missing or unknown:
            raise DataError(f"table {self.name}: columns missing {missing}, unknown {unknown}")
        frame = frame.select(list(self.columns))
        for name, column in self.columns.items():
            if frame.schema[name] != column.dtype:
                raise DataError(
                    f"table {self.name}: column {name} is {frame.schema[name]}, must be {column.dtype}"
                )
        if self.key:
            frame = frame.sort(self.key, nulls_last=True)
            keys = frame.select(self.key)
            same = (
                keys.slice(1)
                .select(
                    pl.all_horizontal(
                        pl.col(name).eq_missing(keys[name].slice(0, max(len(keys) - 1, 0)))
                        for name in self.key
                    )
                )
                .to_series()
            )
            if same.any():
                twice = keys.row(same.arg_max() or 0)
                raise DataError(
                    f"table {self.name}: key {self.key} = {twice} appears more than once"
                )
        return frame.rechunk()


def column(
    dtype: pl.DataType | type[pl.DataType], about: str, tolerance: float | None = None
) -> Column:
    """A column, its meaning and how far model outputs may differ between machines."""
    return Column(dtype, about, tolerance)


IMAGE_ID = column(pl.String, "SHA-256 of the file's bytes")
MODEL = column(pl.String, "who says so: a name from [models], or `sidecar`")
