"""Latent files: the VAE's outputs of one bucket in one memory-mapped safetensors file, written once
and never changed.

Codec `raw` holds BF16 tensors, of which a batch is one gather; `split-zstd` holds two thirds of the
bytes and takes more time, for copies over a network and for very large sets.

bfloat16 is kept as its 16 bits in uint16, because NumPy has no such type;
`training/loop/dataset.py` gives them their meaning. A shard's folder holds generations:
`g0003.json` (the manifest), its table and its latent files.
"""

import json
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training import manifests
from training.buckets.geometry import Size
from training.errors import DamageError, DataError
from training.latents import codec as latent_codec
from training.names import GenerationName

LATENTS = "latents"
LOG_VARIANCE = "log_variance"
MAX_RECONSTRUCTION_ERROR = 24.0
"""Mean absolute difference of a crop and its decoded latents, 0-255, above which they do not belong
together."""
_ALIGNMENT = 64
_MANTISSA, _EXPONENT, _OFFSETS = ".mantissa", ".exponent", ".offsets"
_CONTENTS = ((LATENTS,), (LATENTS, LOG_VARIANCE))
_DTYPES = {1: "U8", 2: "BF16", 8: "I64"}
_STORED = {"U8": "<u1", "BF16": "<u2", "I64": "<i8"}
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 1 << 20


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 values as the bits of bfloat16 in uint16, rounded to nearest, ties to even.

    Raises:
        DataError: a value is not finite or rounds beyond bfloat16's range.
    """
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    # The sum wraps only for NaNs, and those are refused below by their exponent.
    rounded = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype("<u2")
    if not np.isfinite(values).all() or ((rounded & 0x7F80) == 0x7F80).any():
        raise DataError(
            "latents hold a value that is not finite in bfloat16: reject such an image before writing it"
        )
    return rounded


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 bits in uint16; exact."""
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


Codec = Literal["raw", "split-zstd"]


@dataclass(kw_only=True)
class BucketWriter:
    """Collects the latents of one bucket of a shard and writes them as files of at most
    `max_bytes`."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    generation: int
    """Number of the encoding pass."""
    bucket: Size
    """Training resolution, pixels; names the file."""
    max_bytes: int
    """Largest file before compression; one row is written whatever its size."""
    codec: Codec = "raw"
    """How values are stored."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further strings for the header of each file."""
    entries: list[manifests.Entry] = field(default_factory=list, init=False)
    """Files written so far, for the manifest."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict, init=False)
    """image_id -> file and row, for the table `latents`."""
    _ids: list[str] = field(default_factory=list, init=False)
    _rows: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)

    def add(self, image_id: str, latents: np.ndarray, log_variance: np.ndarray | None) -> None:
        """Take one image: fp32 `(4, H/8, W/8)`, the log-variance of equal shape or never for any
        image.

        Raises:
            DataError: a value is not finite.
        """
        self.add_bits(
            image_id,
            to_bfloat16(latents),
            None if log_variance is None else to_bfloat16(log_variance),
        )

    def add_bits(self, image_id: str, latents: np.ndarray, log_variance: np.ndarray | None) -> None:
        """Take one image whose values are the bits of bfloat16 in uint16 already, as
        `LatentFile.gather` gives them."""
        row = (
            {LATENTS: latents}
            if log_variance is None
            else {LATENTS: latents, LOG_VARIANCE: log_variance}
        )
        if self._ids:
            assert row.keys() == self._rows.keys(), (
                "log-variance is stored for all images of a file or for none"
            )
        for name, values in row.items():
            self._rows.setdefault(name, []).append(values)
        self._ids.append(image_id)
        row_bytes = sum(rows[0].nbytes for rows in self._rows.values())
        if (len(self._ids) + 1) * row_bytes + 4096 > self.max_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is still held; `entries` and `places` are complete afterwards."""
        if self._ids:
            self._flush()

    def _flush(self) -> None:
        arrays = _stored(self._rows, self.codec)
        metadata = {**self.metadata, "codec": self.codec}
        stem = f"{GenerationName(self.generation)}-{self.bucket}"
        entry = manifests.write_named(
            self.folder, stem, ".safetensors", lambda path: _write(path, arrays, metadata)
        )
        self.entries.append(entry)
        self.places |= {image_id: (entry.name, row) for row, image_id in enumerate(self._ids)}
        self._ids, self._rows = [], {}


def _stored(rows: Mapping[str, Sequence[np.ndarray]], codec: Codec) -> dict[str, np.ndarray]:
    """The tensors of a file; uint16 stands for BF16."""
    if codec == "raw":
        return {name: np.stack(values) for name, values in rows.items()}
    arrays: dict[str, np.ndarray] = {}
    for name, values in rows.items():
        mantissas, frames = zip(*(latent_codec.encode(bits) for bits in values), strict=True)
        # Offsets first: their data begins at a multiple of 64, as eight-byte numbers must.
        arrays[f"{name}{_OFFSETS}"] = np.cumsum([0, *map(len, frames)], dtype="<i8")
        arrays[f"{name}{_MANTISSA}"] = np.stack(mantissas)
        arrays[f"{name}{_EXPONENT}"] = np.frombuffer(b"".join(frames), dtype=np.uint8)
    return arrays


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file, each tensor of which begins at a multiple of 64 bytes of the file, or
    near one.

    The format leaves no gaps between tensors, so only the first is sure to be aligned; larger items
    go first.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.itemsize],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _HEADER_LENGTH.size) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(_HEADER_LENGTH.pack(len(text)) + text)
        for array in arrays.values():
            file.write(
                np.ascontiguousarray(array)
                .astype(array.dtype.newbyteorder("<"), copy=False)
                .tobytes()
            )


class LatentFile:
    """A memory-mapped latent file; size and header are checked at open, its digest once before the
    first row."""

    def __init__(self, folder: Path, entry: manifests.Entry, *, checked: bool = False) -> None:
        """Open and check size and header; nothing stays open until the first row is asked for.

        Args:
            folder: Where it lies.
            entry: What its manifest says of it.
            checked: Whether its bytes have been compared with its digest already.

        Raises:
            DamageError: the file is gone, cut, foreign, or its header disagrees with its size.
        """
        manifests.check_entry(folder, entry, whole=False)
        self.folder, self.entry = folder, entry
        self.path = folder / entry.name
        self._start, self._header = _read_header(self.path)
        self.metadata: Mapping[str, str] = self._header.pop("__metadata__", {})
        """Strings of the header: `codec`, and what the writer was given."""
        self._check_header()
        self._checked, self._checking = checked, threading.Lock()
        self._map: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, 4, H/8, W/8)`."""
        return tuple(self._header[LATENTS if self._raw else LATENTS + _MANTISSA]["shape"])

    @property
    def has_log_variance(self) -> bool:
        """Whether the posterior can be drawn."""
        return any(name.startswith(LOG_VARIANCE) for name in self._header)

    def check(self) -> None:
        """Compare all its bytes with its digest, unless that has been done; whoever comes meanwhile
        waits for it.

        Raises:
            DamageError: they do not match; each caller is told.
        """
        with self._checking:
            if not self._checked:
                manifests.check_entry(self.folder, self.entry)
                self._checked = True

    def gather(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Copy rows out of the map, in the order asked for.

        Returns:
            Latents and log-variance (None where not stored), uint16 `(B, 4, H/8, W/8)`.

        Raises:
            DamageError: the bytes do not match the manifest's digest, or the table names a row that
                is not there.
        """
        if self._map is None:
            self.check()
            self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.shape[0]):
            raise self._damage(
                f"{self.shape[0]} rows", f"rows {index.min()} to {index.max()} by the table"
            )
        return self._values(LATENTS, index), self._values(
            LOG_VARIANCE, index
        ) if self.has_log_variance else None

    @property
    def _raw(self) -> bool:
        return self._codec == "raw"

    @property
    def _codec(self) -> str:
        return self.metadata.get("codec", "raw")

    def _values(self, name: str, index: np.ndarray) -> np.ndarray:
        if self._raw:
            return self._tensor(name)[index]
        offsets, exponents = self._tensor(name + _OFFSETS), self._tensor(name + _EXPONENT)
        ends = offsets[index + 1]
        starts = offsets[index]
        if (starts < 0).any() or (ends < starts).any() or (ends > len(exponents)).any():
            raise self._damage(
                f"{name}: offsets {starts.tolist()} to {ends.tolist()}",
                f"within {len(exponents)} bytes",
            )
        frames = [exponents[a:b].data for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        try:
            return latent_codec.decode(self._tensor(name + _MANTISSA)[index], frames)
        except ValueError as error:
            raise self._damage(f"{name}: {error}", "an exponent plane for each row") from None

    def _tensor(self, name: str) -> np.ndarray:
        """A view of the map."""
        assert self._map is not None
        tensor = self._header[name]
        begin, end = tensor["data_offsets"]
        data = self._map[self._start + begin : self._start + end]
        return np.asarray(data.view(_STORED[tensor["dtype"]]).reshape(tensor["shape"]))

    def _check_header(self) -> None:
        """Compare every tensor with its bytes, and all of them with the file."""
        expected = f"tensors of codec raw or split-zstd, {LATENTS} and maybe {LOG_VARIANCE}"
        codec = self._codec
        parts = {"raw": ("",), "split-zstd": (_MANTISSA, _EXPONENT, _OFFSETS)}.get(codec)
        names = set(self._header)
        allowed = [{name + part for name in stored for part in parts or ()} for stored in _CONTENTS]
        if parts is None or names not in allowed:
            raise self._damage(f"codec {codec!r} with tensors {sorted(names)}", expected)
        held = 0
        for name, tensor in self._header.items():
            held += self._check_tensor(name, tensor)
        if self._start + held != self.entry.bytes:
            raise self._damage(f"{self._start + held} bytes by its header", f"{self.entry.bytes}")
        grids = {
            tuple(tensor["shape"]) for tensor in self._header.values() if len(tensor["shape"]) == 4
        }
        rows = {
            tensor["shape"][0] - 1
            for name, tensor in self._header.items()
            if name.endswith(_OFFSETS)
        }
        if len(grids) != 1 or rows - {next(iter(grids))[0]}:
            raise self._damage(
                f"shapes {sorted(grids)} with offsets of {sorted(rows)} rows",
                "one shape for all tensors",
            )

    def _check_tensor(self, name: str, tensor: Any) -> int:
        """Bytes of a tensor whose description is sound."""
        kind = next((part for part in (_EXPONENT, _OFFSETS) if name.endswith(part)), "")
        wanted, ndim = {_EXPONENT: ("U8", 1), _OFFSETS: ("I64", 1)}.get(
            kind, ("BF16" if self._raw else "U8", 4)
        )
        try:
            dtype, shape, (begin, end) = (
                tensor["dtype"],
                [int(side) for side in tensor["shape"]],
                tensor["data_offsets"],
            )
            num_bytes = int(np.prod(shape)) * np.dtype(_STORED[dtype]).itemsize
            fits = (
                dtype == wanted
                and len(shape) == ndim
                and min(shape, default=0) >= 0
                and end - begin == num_bytes
            )
            fits = fits and begin >= 0 and self._start + end <= self.entry.bytes
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            raise self._damage(
                f"{name}: {tensor}", f"{wanted} of {ndim} dimensions within the file"
            )
        return num_bytes

    def _damage(self, found: str, expected: str) -> DamageError:
        return DamageError(
            f"{self.path} has {found}, expected {expected}; run `foundry verify --repair`"
        )


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
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise DamageError(f"{path} has no safetensors header; run `foundry verify --repair`")
    return _HEADER_LENGTH.size + length, header
