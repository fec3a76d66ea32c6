"""Latent files: the VAE's outputs of one bucket in one memory-mapped safetensors file, written once and never changed.

bfloat16 is kept as its 16 bits in uint16, because NumPy has no such type; `training/dataset.py` gives them their
meaning. A shard's folder holds generations: `g0003.json` (the manifest), its table and its latent files.
"""

import json
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from training import commit
from training.data.geometry import Size
from training.data.tables import TABLES
from training.errors import DamageError, DataError

LATENTS = "latents"
LOG_VARIANCE = "log_variance"
_ALIGNMENT = 64
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 1 << 20
_MANIFEST_NAME = re.compile(r"g(\d{4,})\.json")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 values as the bits of bfloat16 in uint16, rounded to nearest, ties to even.

    Raises:
        DataError: a value is not finite or rounds beyond bfloat16's range.
    """
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    # The sum wraps only for NaNs, and those are refused below by their exponent.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    if not np.isfinite(values).all() or ((rounded & 0x7F80) == 0x7F80).any():
        raise DataError("latents hold a value that is not finite in bfloat16: reject such an image before writing it")
    return rounded


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 bits in uint16; exact."""
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


@dataclass(kw_only=True)
class BucketWriter:
    """Collects the latents of one bucket of a shard and writes them as files of at most `max_bytes`."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    generation: int
    """Number of the encoding pass."""
    bucket: Size
    """Training resolution, pixels; names the file."""
    max_bytes: int
    """Largest file; one row is written whatever its size."""
    entries: list[commit.Entry] = field(default_factory=list, init=False)
    """Files written so far, for the manifest."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict, init=False)
    """image_id -> file and row, for the table `latents`."""
    _ids: list[str] = field(default_factory=list, init=False)
    _rows: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)

    def add(self, image_id: str, latents: np.ndarray, log_variance: np.ndarray | None) -> None:
        """Take one image: fp32 `(4, H/8, W/8)`, the log-variance of equal shape or never for any image.

        Raises:
            DataError: a value is not finite.
        """
        row = {LATENTS: latents} if log_variance is None else {LATENTS: latents, LOG_VARIANCE: log_variance}
        if self._ids:
            assert row.keys() == self._rows.keys(), "log-variance is stored for all images of a file or for none"
        for name, values in row.items():
            self._rows.setdefault(name, []).append(to_bfloat16(values))
        self._ids.append(image_id)
        row_bytes = sum(rows[0].nbytes for rows in self._rows.values())
        if (len(self._ids) + 1) * row_bytes + 4096 > self.max_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is still held; `entries` and `places` are complete afterwards."""
        if self._ids:
            self._flush()

    def _flush(self) -> None:
        arrays = {name: np.stack(rows) for name, rows in self._rows.items()}
        stem = f"g{self.generation:04d}-{self.bucket}"
        entry = commit.write_named(self.folder, stem, ".safetensors", lambda path: _write(path, arrays))
        self.entries.append(entry)
        self.places |= {image_id: (entry.name, row) for row, image_id in enumerate(self._ids)}
        self._ids, self._rows = [], {}


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of bfloat16 tensors whose data begins at a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": {"codec": "raw"}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _HEADER_LENGTH.size) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(_HEADER_LENGTH.pack(len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, dtype="<u2").tobytes())


class LatentFile:
    """A memory-mapped latent file; its header is checked at open, its digest before the first row is read."""

    def __init__(self, folder: Path, entry: commit.Entry) -> None:
        """Open and check size and header.

        Raises:
            DamageError: the file is gone, cut, foreign, or its header disagrees with its size.
        """
        commit.check_entry(folder, entry, whole=False)
        self.folder, self.entry = folder, entry
        self.path = folder / entry.name
        self._whole = False
        start, header = _read_header(self.path)
        self._arrays = {
            name: self._map(name, start, header[name]) for name in (LATENTS, LOG_VARIANCE) if name in header
        }
        if LATENTS not in self._arrays:
            raise self._damage(f"tensors {sorted(header)}", f"a tensor {LATENTS!r}")
        shapes = {array.shape for array in self._arrays.values()}
        if len(shapes) != 1:
            raise self._damage(f"shapes {sorted(shapes)}", "one shape for all tensors")
        held = sum(array.nbytes for array in self._arrays.values())
        if start + held != entry.bytes:
            raise self._damage(f"{start + held} bytes by its header", f"{entry.bytes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, 4, H/8, W/8)`."""
        return self._arrays[LATENTS].shape

    @property
    def has_log_variance(self) -> bool:
        """Whether the posterior can be drawn."""
        return LOG_VARIANCE in self._arrays

    def gather(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Copy rows out of the map, in the order asked for.

        Returns:
            Latents and log-variance (None where not stored), uint16 `(B, 4, H/8, W/8)`.

        Raises:
            DamageError: the bytes do not match the manifest's digest, or the table names a row that is not there.
        """
        if not self._whole:
            commit.check_entry(self.folder, self.entry)
            self._whole = True
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.shape[0]):
            raise self._damage(f"{self.shape[0]} rows", f"rows {index.min()} to {index.max()} by the table")
        log_variance = self._arrays.get(LOG_VARIANCE)
        return self._arrays[LATENTS][index], None if log_variance is None else log_variance[index]

    def _map(self, name: str, start: int, tensor: Any) -> np.ndarray:
        try:
            dtype, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
            fits = dtype == "BF16" and len(shape) == 4 and end - begin == 2 * int(np.prod(shape))
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits or start + end > self.entry.bytes:
            raise self._damage(f"{name}: {tensor}", "BF16 of shape (N, 4, H/8, W/8) within the file")
        return np.memmap(self.path, dtype="<u2", mode="r", offset=start + begin, shape=shape)

    def _damage(self, found: str, expected: str) -> DamageError:
        return DamageError(f"{self.path} has {found}, expected {expected}; run `foundry verify --repair`")


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the parsed header."""
    with path.open("rb") as file:
        head = file.read(_HEADER_LENGTH.size)
        length = _HEADER_LENGTH.unpack(head)[0] if len(head) == _HEADER_LENGTH.size else 0
        text = file.read(min(length, _MAX_HEADER_BYTES))
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DamageError(f"{path} has no safetensors header; run `foundry verify --repair`")
    return _HEADER_LENGTH.size + length, header


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One encoding pass over a shard, as committed."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    number: int
    """Higher is newer."""
    manifest: commit.Manifest
    """Its commit."""

    def table(self) -> pl.DataFrame:
        """The rows of the table `latents`.

        Raises:
            DamageError: the Parquet file does not match the manifest.
        """
        entry = next(entry for entry in self.manifest.files if entry.name.endswith(".parquet"))
        commit.check_entry(self.folder, entry)
        return pl.read_parquet(self.folder / entry.name).select(list(TABLES["latents"].columns))

    def open_files(self) -> dict[str, LatentFile]:
        """Its latent files by name, checked by size and header.

        Raises:
            DamageError: one of them is gone, cut or foreign.
        """
        entries = [entry for entry in self.manifest.files if entry.name.endswith(".safetensors")]
        return {entry.name: LatentFile(self.folder, entry) for entry in entries}


def generations(folder: Path) -> list[int]:
    """Numbers of the committed generations of a shard's folder, oldest first; a missing folder has none."""
    if not folder.is_dir():
        return []
    matches = (_MANIFEST_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def read_generation(folder: Path, number: int) -> Generation:
    """The committed generation `number`.

    Raises:
        DamageError: there is no such manifest, or it is damaged.
    """
    manifest = commit.read_manifest(folder / f"g{number:04d}.json")
    if manifest is None:
        raise DamageError(f"{folder} has no generation {number}; it has {generations(folder)}")
    return Generation(folder=folder, number=number, manifest=manifest)


def choose_generation(folder: Path, image_ids: Collection[str]) -> tuple[Generation | None, int]:
    """The highest generation that holds all `image_ids`.

    Returns:
        The generation and 0; or None and how many images the best one lacks.
    """
    fewest = len(image_ids)
    for number in reversed(generations(folder)):
        generation = read_generation(folder, number)
        lacking = len(set(image_ids).difference(generation.table()["image_id"]))
        if lacking == 0:
            return generation, 0
        fewest = min(fewest, lacking)
    return None, fewest
