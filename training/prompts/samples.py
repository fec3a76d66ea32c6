"""A training set in memory as columns: what prompts and masks are made from, by rows, at millions
of them.

Tags are codes into one list of names, so that a million and a half samples open in seconds and
hundreds of megabytes.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from training.buckets.geometry import Box
from training.errors import DataError
from training.prompts.ragged import Ragged, offsets
from training.tables.schemas import TABLES

_ID_LENGTH = 64
_NAMES = {"tags": "tags.list.element.name", "words": "words.list.element"}
_DICTIONARIES = [*_NAMES.values(), "shard", "split"]
_SIDES = ("y0", "x0", "y1", "x1")
_NUMBERS: dict[str, Any] = {
    "bucket_height": np.int32,
    "bucket_width": np.int32,
    "score": np.int8,
    "stable": np.bool_,
}
_COLUMNS = (
    "image_id", "shard", *_NUMBERS, *_NAMES.values(), "caption", "made_caption", "split",
    *(f"boxes.list.element.{side}" for side in _SIDES),
)  # fmt: skip
_LISTS = ("tags", "words", "boxes", "caption", "made_caption")
_NUM_THREADS = 2
"""Row groups that are read at a time: more are hardly quicker and hold more memory."""


class ImageIds(Sequence[str]):
    """Image ids of the rows of a set, as one block of bytes."""

    def __init__(self, block: np.ndarray) -> None:
        """Take `(N,)` of S64."""
        self._block = block

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._block)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        """The id of a row, or those of a range."""
        return (
            self._block[row].decode() if not isinstance(row, slice) else _decode(self._block[row])
        )

    def __iter__(self) -> Iterator[str]:
        """Every id, in order of rows."""
        return iter(_decode(self._block))

    def take(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows."""
        return _decode(self._block[rows])


def _decode(block: np.ndarray) -> list[str]:
    return [value.decode() for value in block.tolist()]


class Samples:
    """The rows of a `training_set`, sorted by image_id."""

    def __init__(self, source: Path | pl.DataFrame, groups: Sequence[int] | None = None) -> None:
        """Read a set.

        Args:
            source: Its Parquet file, or the table.
            groups: Only these row groups of the file, in ascending order; None for all.

        Raises:
            DataError: a column is missing, or rows are not in the order of their ids.
        """
        self.num_groups, parts = _read(source, groups)
        """Row groups of the file."""
        image_ids = _join(parts, "image_id")
        self.image_ids = ImageIds(image_ids)
        """Per row."""
        if (image_ids[1:] <= image_ids[:-1]).any():
            raise DataError(
                f"training set {_name(source)}: image_ids do not ascend, or one appears twice"
            )
        self.buckets = np.column_stack(
            [_join(parts, "bucket_height"), _join(parts, "bucket_width")]
        ).astype(np.int64)
        """`(N, 2)`: heights and widths, px."""
        self.shards, self.shard_names = _join_codes(parts, "shard")
        """Per row, `(N,)` int32 into `shard_names`."""
        split, names = _join_codes(parts, "split")
        self.validates = np.isin(
            split, [code for code, name in enumerate(names) if name == "validation"]
        )
        """Per row: of the held-out images, which never train."""
        self.forgotten = np.isin(
            split, [code for code, name in enumerate(names) if name == "forgotten"]
        )
        """Per row: forgotten since the set was frozen; nothing but its id is left."""
        self.stable = _join(parts, "stable")
        """Per row: on the list of the stable training loss."""
        self.scores = _join(parts, "score")
        """Per row, `(N,)` int8: 1 to 9, 0 where it has none."""
        tags, self.tag_names = _join_codes(parts, "tags")
        """Every tag of the set."""
        words, self.word_names = _join_codes(parts, "words")
        """Every word of the set: for quality, rating and date."""
        starts = {name: offsets(_join(parts, f"{name} lengths")) for name in _LISTS}
        self.tags, self.words = Ragged(tags, starts["tags"]), Ragged(words, starts["words"])
        """Per row, int32 into `tag_names` and `word_names`."""
        self._boxes = Ragged(np.concatenate([part["boxes"] for part in parts]), starts["boxes"])
        self.captions, self.made_captions = (
            Texts(b"".join(part.pop(name) for part in parts), starts[name])
            for name in ("caption", "made_caption")
        )
        """Per row: the source's own sentences and a model's; several lines are a choice among
        them."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.image_ids)

    @property
    def train_rows(self) -> np.ndarray:
        """Rows that train, `(n,)` int64 in ascending order: all that are not held out or
        forgotten."""
        return np.flatnonzero(~self.validates & ~self.forgotten)

    def watermarked(self, rows: np.ndarray) -> np.ndarray:
        """Whether a watermark was found in each of these rows, bool."""
        return self._boxes.lengths(rows) > 0

    def boxes(self, row: int) -> list[Box]:
        """Watermarks of a row, upright source pixels."""
        return [Box(*sides) for sides in self._boxes.row(row).tolist()]


class Texts:
    """A column of sentences as bytes and where each begins."""

    def __init__(self, data: bytes, starts: np.ndarray) -> None:
        """Take the bytes of all rows, one after the other, and `(N + 1,)` places in them."""
        self._data, self._starts = data, starts

    def __getitem__(self, row: int) -> str | None:
        """The sentences of a row; None where it has none."""
        first, last = self._starts[row : row + 2].tolist()
        return self._data[first:last].decode() if first < last else None

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of these rows has one, bool."""
        return self._starts[rows + 1] > self._starts[rows]


_Part = dict[str, Any]
"""One row group as arrays, by column; of names in codes also `... names`, of lists `...
lengths`."""


def _read(source: Path | pl.DataFrame, groups: Sequence[int] | None) -> tuple[int, list[_Part]]:
    """How many row groups the file has, and those asked for, each made by one of two threads."""
    where: Any = str(source)
    if isinstance(source, pl.DataFrame):
        buffer = io.BytesIO()
        TABLES["training_set"].conform(source).write_parquet(buffer)
        where = pa.py_buffer(buffer.getvalue())

    def open_file(**options: Any) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.BufferReader(where) if isinstance(where, pa.Buffer) else where, **options
        )

    file = open_file()
    missing = sorted(set(TABLES["training_set"].columns) - set(file.schema_arrow.names))
    if missing:
        raise DataError(
            f"training set {_name(source)} lacks the columns {missing}; run `foundry run` to freeze it anew"
        )

    def read(group: int) -> _Part:
        return _convert(
            open_file(read_dictionary=_DICTIONARIES).read_row_group(
                group, list(_COLUMNS), use_threads=False
            ),
            source,
        )

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(
            pool.map(read, range(file.metadata.num_row_groups) if groups is None else groups)
        )
    pa.default_memory_pool().release_unused()
    return file.metadata.num_row_groups, parts or [
        _convert(file.schema_arrow.empty_table(), source)
    ]


def _name(source: Path | pl.DataFrame) -> str:
    return f"of {len(source)} rows" if isinstance(source, pl.DataFrame) else str(source)


def _convert(table: pa.Table, source: Path | pl.DataFrame) -> _Part:
    """A row group as arrays that hold nothing of Arrow's memory."""
    columns = {name: _whole(table, name) for name in table.column_names}
    part: _Part = {"image_id": _ids(columns["image_id"], source)}
    for name, dtype in _NUMBERS.items():
        part[name] = _values(columns[name]).astype(dtype)
    for name in ("shard", "split"):
        part[name], part[f"{name} names"] = _codes(columns[name])
    for name in ("tags", "words", "boxes"):
        part[f"{name} lengths"] = np.diff(_values(columns[name].offsets)).astype(np.int32)
    part["tags"], part["tags names"] = _codes(columns["tags"].values.field("name"))
    part["words"], part["words names"] = _codes(columns["words"].values)
    sides = [_values(columns["boxes"].values.field(side)) for side in _SIDES]
    part["boxes"] = np.column_stack(sides).astype(np.float64)
    for name in ("caption", "made_caption"):
        texts = columns[name].cast(pa.large_string())
        _, starts, data = texts.buffers()
        part[name] = data.to_pybytes() if data is not None else b""
        part[f"{name} lengths"] = np.diff(
            np.frombuffer(starts, dtype=np.int64, count=len(texts) + 1)
        )
    return part


def _whole(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _ids(array: pa.Array, source: Path | pl.DataFrame) -> np.ndarray:
    """`(N,)` of S64."""
    _, starts, data = array.cast(pa.large_string()).buffers()
    lengths = np.diff(np.frombuffer(starts, dtype=np.int64, count=len(array) + 1))
    if (lengths != _ID_LENGTH).any():
        raise DataError(
            f"training set {_name(source)}: an image_id is no SHA-256 of {_ID_LENGTH} hexadecimal digits"
        )
    return np.frombuffer(data or b"", dtype=f"S{_ID_LENGTH}", count=len(array)).copy()


def _codes(array: pa.DictionaryArray) -> tuple[np.ndarray, list[str]]:
    """Codes `(N,)` int32, and the names that they count."""
    return _values(array.indices).astype(np.int32), array.dictionary.to_pylist()


def _values(array: pa.Array) -> np.ndarray:
    """Numbers or truth values of an Arrow array, nulls as 0, out of its memory: `to_numpy` would
    import pandas."""
    whole = slice(array.offset, array.offset + len(array))
    validity, data = array.buffers()
    if pa.types.is_boolean(array.type):
        values = _bits(data)[whole]
    else:
        kind = "f" if pa.types.is_floating(array.type) else "i"
        values = np.frombuffer(data or b"", dtype=f"{kind}{array.type.bit_width // 8}")[whole]
    return (
        np.where(_bits(validity)[whole], values, 0).astype(values.dtype)
        if array.null_count
        else values
    )


def _bits(buffer: pa.Buffer | None) -> np.ndarray:
    return np.unpackbits(np.frombuffer(buffer or b"", dtype=np.uint8), bitorder="little").astype(
        bool
    )


def _join(parts: list[_Part], name: str) -> np.ndarray:
    """A column of all parts, each of which is freed as soon as it is copied."""
    joined = np.empty(sum(len(part[name]) for part in parts), dtype=parts[0][name].dtype)
    first = 0
    for part in parts:
        array = part.pop(name)
        joined[first : first + len(array)] = array
        first += len(array)
    return joined


def _join_codes(parts: list[_Part], name: str) -> tuple[np.ndarray, list[str]]:
    """Codes of all parts into one list of names."""
    numbers: dict[str, int] = {}
    for part in parts:
        names = part.pop(f"{name} names")
        own = np.array(
            [numbers.setdefault(one, len(numbers)) for one in names] or [0], dtype=np.int32
        )
        part[name] = own[part[name]]
    return _join(parts, name), list(numbers)
