"""The only maker of random generators: every draw is keyed by what is drawn, never by when or
where.

Two processes, two ranks or a resumed run that ask for the same draw get the same numbers.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Key = int | str


class Purpose(StrEnum):
    """What a draw is for. Closed: a new kind of draw is a new member, so that streams never
    overlap."""

    CROP = "crop"
    POSTERIOR = "posterior"
    PROMPT = "prompt"
    TIMESTEP = "timestep"
    NOISE = "noise"
    ORDER = "order"
    SPLIT = "split"
    SAMPLE_IMAGE = "sample_image"
    QUALITY = "quality"
    VALIDATION = "validation"
    INIT = "init"
    DEMO = "demo"
    PROMPT_SET = "prompt_set"


def digest(seed: int, purpose: Purpose, *keys: Key) -> bytes:
    """The 32 bytes that stand for one draw: SHA-256 over the typed, length-prefixed parts.

    Lengths and types are part of the hash, so ("ab", "c"), ("a", "bc") and (1,), ("1",) all differ.
    """
    return hashlib.sha256(b"".join(_parts(seed, purpose.value, *keys))).digest()


def _parts(*keys: Key) -> Iterator[bytes]:
    for key in keys:
        kind = b"i" if isinstance(key, int) else b"s"
        data = str(key).encode()
        yield kind + len(data).to_bytes(8, "little") + data


def integer(seed: int, purpose: Purpose, *keys: Key) -> int:
    """A non-negative 63-bit integer for one draw; fits every library's seed argument."""
    return int.from_bytes(digest(seed, purpose, *keys)[:8], "little") >> 1


def generator(seed: int, purpose: Purpose, *keys: Key) -> random.Random:
    """A standard-library generator for one draw (its first 16 digest bytes are the seed)."""
    return random.Random(int.from_bytes(digest(seed, purpose, *keys)[:16], "little"))  # noqa: S311


class Stream:
    """Draws of many keys that share all but their last: what they share is hashed once."""

    def __init__(self, seed: int, purpose: Purpose, *keys: Key) -> None:
        """The keys that the draws share."""
        self._shared = hashlib.shake_128()
        for part in _parts(seed, purpose.value, *keys):
            self._shared.update(part)

    def words(self, keys: Sequence[str], counts: Sequence[int]) -> np.ndarray:
        """Uniform numbers of 32 bits: `counts[i]` of them for `keys[i]`, one key after the other.

        SHAKE-128 over the parts that `digest` hashes. What is drawn for a key follows from it
        alone, and what more is drawn for it comes behind.

        Returns:
            `(sum(counts),)` uint32.
        """
        drawn = []
        for key, count in zip(keys, counts, strict=True):
            data, hasher = key.encode(), self._shared.copy()
            hasher.update(b"s" + len(data).to_bytes(8, "little") + data)
            drawn.append(hasher.digest(4 * count))
        return np.frombuffer(b"".join(drawn), dtype="<u4")


def numpy_generator(seed: int, purpose: Purpose, *keys: Key) -> np.random.Generator:
    """A NumPy generator (PCG64) for one draw."""
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(digest(seed, purpose, *keys)[:16], "little"))
    )


def torch_generator(seed: int, purpose: Purpose, *keys: Key) -> "torch.Generator":
    """A CPU torch generator for one draw: the numbers do not depend on the device that uses
    them."""
    import torch

    return torch.Generator("cpu").manual_seed(integer(seed, purpose, *keys))
