"""The order of an epoch: which samples make which micro-batch and step, as pure data that knows
nothing of ranks.

A micro-batch holds samples of one bucket and one number of text chunks; a step holds exactly the
global batch, the epoch's last one what is left. Nothing is dropped or repeated.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import commit, seeds
from training.errors import DamageError
from training.seeds import Purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The samples of an epoch in order, and where micro-batches and steps begin."""

    samples: np.ndarray
    """`(N,)` int32: rows of the training set."""
    micro_starts: np.ndarray
    """`(M + 1,)` int64: micro-batch m is `samples[micro_starts[m]:micro_starts[m + 1]]`."""
    step_starts: np.ndarray
    """`(S + 1,)` int64: step s is micro-batches `step_starts[s]` to `step_starts[s + 1]`."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self.step_starts) - 1

    def step_size(self, step: int) -> int:
        """Samples in a step."""
        first, last = self.step_starts[step], self.step_starts[step + 1]
        return int(self.micro_starts[last] - self.micro_starts[first])

    def first_sample(self, step: int) -> int:
        """Position in `samples` at which a step begins."""
        return int(self.micro_starts[self.step_starts[step]])

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """The micro-batches of a step, each as rows of the training set; rank r of w takes r, r +
        w, ..."""
        return [
            np.asarray(self.samples[self.micro_starts[micro] : self.micro_starts[micro + 1]])
            for micro in range(self.step_starts[step], self.step_starts[step + 1])
        ]


def make_order(
    buckets: np.ndarray,
    num_chunks: np.ndarray,
    *,
    seed: int,
    epoch: int,
    micro_batch_size: int,
    global_batch_size: int,
    windows: np.ndarray | None = None,
) -> EpochOrder:
    """Shuffle within each (bucket, chunks) group, cut micro-batches, shuffle those, fill steps.

    Args:
        buckets: `(N, 2)` heights and widths of the samples' buckets, pixels.
        num_chunks: `(N,)` text chunks of the samples' prompts in this epoch.
        seed: The run's.
        epoch: Number of the epoch; with the seed it keys every shuffle.
        micro_batch_size: Samples per micro-batch, at most; remainders stay as short ones.
        global_batch_size: Samples per step; a micro-batch that would overshoot is split.
        windows: `(N,)` part of the epoch, 0, 1, ..., that each sample belongs to: every shuffle
            stays within a part. None for one part.
    """
    keys = (
        (buckets[:, 0].astype(np.int64) << 40) | (buckets[:, 1].astype(np.int64) << 8) | num_chunks
    )
    parts = np.zeros(len(keys), dtype=np.int64) if windows is None else windows
    micros: list[np.ndarray] = []
    for part in range(parts.max(initial=0) + 1):
        members = np.flatnonzero(parts == part)
        own = _cut(keys[members], [seed, Purpose.ORDER, epoch, part], micro_batch_size)
        seeds.numpy_generator(seed, Purpose.ORDER, epoch, part, "micro_batches").shuffle(
            order := np.arange(len(own))
        )
        micros += [members[own[number]] for number in order]
    samples = np.concatenate(micros).astype(np.int32)
    micro_starts = np.concatenate([[0], np.cumsum([len(micro) for micro in micros])])
    step_borders = np.append(np.arange(0, len(samples), global_batch_size), len(samples))
    micro_starts = np.union1d(micro_starts, step_borders)
    return EpochOrder(
        samples=samples,
        micro_starts=micro_starts.astype(np.int64),
        step_starts=np.searchsorted(micro_starts, step_borders).astype(np.int64),
    )


def _cut(keys: np.ndarray, seed_keys: list[Any], micro_batch_size: int) -> list[np.ndarray]:
    """Shuffled positions of each group of equal keys (height, width, chunks), in pieces of the
    micro-batch's size."""
    groups, member_of = np.unique(keys, return_inverse=True)
    # Sorting numbers of 16 bits is a matter of counting them.
    member_of = member_of.astype(np.uint16 if len(groups) < 65_536 else np.int64)
    by_group = np.split(
        np.argsort(member_of, kind="stable"), np.cumsum(np.bincount(member_of))[:-1]
    )
    pieces: list[np.ndarray] = []
    for key, members in zip(groups.tolist(), by_group, strict=True):
        parts = (key >> 40, key >> 8 & 0xFFFFFFFF, key & 0xFF)
        shuffled = seeds.numpy_generator(*seed_keys, "samples", *parts).permutation(members)
        pieces += [
            shuffled[start : start + micro_batch_size]
            for start in range(0, len(shuffled), micro_batch_size)
        ]
    return pieces


def assign_windows(
    shards: Sequence[str], *, seed: int, epoch: int, shards_at_a_time: int
) -> np.ndarray | None:
    """Which part of an epoch each sample belongs to, `(N,)` int64: shards in a keyed order, so many
    at a time.

    Args:
        shards: Of the samples.
        seed: The run's.
        epoch: Keys the order of the shards.
        shards_at_a_time: Shards per part; 0 for one part, which is None.
    """
    if not shards_at_a_time:
        return None
    names = sorted(set(shards))
    seeds.numpy_generator(seed, Purpose.ORDER, epoch, "shards").shuffle(
        order := np.arange(len(names))
    )
    place = {
        names[number]: position // shards_at_a_time
        for position, number in enumerate(order.tolist())
    }
    return np.array([place[name] for name in shards], dtype=np.int64)


def leave_out(order: EpochOrder, rows: np.ndarray) -> EpochOrder:
    """An order without some rows of the training set; steps keep their numbers, and one may become
    empty.

    Args:
        order: Of an epoch.
        rows: Whether each row of the set is left out, `(len(set),)` bool.
    """
    kept = ~rows[order.samples]
    borders = np.concatenate([[0], np.cumsum(kept)])[order.micro_starts]
    filled = np.diff(borders) > 0
    return EpochOrder(
        samples=np.asarray(order.samples)[kept],
        micro_starts=np.concatenate([[0], borders[1:][filled]]).astype(np.int64),
        step_starts=np.concatenate([[0], np.cumsum(filled)])[order.step_starts].astype(np.int64),
    )


def write_order(path: Path, order: EpochOrder) -> str:
    """Write an order as an uncompressed `.npz`; returns the SHA-256 of its bytes, which equal
    orders share."""
    with commit.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            samples=order.samples,
            micro_starts=order.micro_starts,
            step_starts=order.step_starts,
        )
    return commit.sha256_file(path)


def read_order(path: Path, sha256: str) -> EpochOrder:
    """Memory-map an order that `write_order` wrote.

    Raises:
        DamageError: the file is gone or is not the one that was written.
    """
    if not path.is_file() or commit.sha256_file(path) != sha256:
        raise DamageError(
            f"{path} is missing or changed, expected SHA-256 {sha256[:16]}; remove it and its .json"
        )
    return EpochOrder(
        **{name: _map(path, name) for name in ("samples", "micro_starts", "step_starts")}
    )


def _map(path: Path, name: str) -> np.ndarray:
    """A member of an uncompressed `.npz` as a memory map, which NumPy itself does not offer."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        assert version == (1, 0), version
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
        start = archive.getinfo(f"{name}.npy").header_offset
    with path.open("rb") as file:
        file.seek(start)
        local = file.read(
            30
        )  # the fixed part of a local file header; lengths of name and extra field end it
    names_bytes = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = start + 30 + names_bytes + header_bytes
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
