"""The only maker of random generators: every draw is keyed by what is drawn, never by when or where.

Two processes, two ranks or a resumed run that ask for the same draw get the same numbers.
"""

import hashlib
import random
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Key = int | str


class Purpose(StrEnum):
    """What a draw is for. Closed: a new kind of draw is a new member, so that streams never overlap."""

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


def digest(seed: int, purpose: Purpose, *keys: Key) -> bytes:
    """The 32 bytes that stand for one draw: SHA-256 over the typed, length-prefixed parts.

    Lengths and types are part of the hash, so ("ab", "c"), ("a", "bc") and (1,), ("1",) all differ.
    """
    return _feed(hashlib.sha256(), seed, purpose.value, *keys).digest()


def _feed(hasher: "hashlib._Hash", *parts: Key) -> "hashlib._Hash":
    for part in parts:
        kind = b"i" if isinstance(part, int) else b"s"
        data = str(part).encode()
        hasher.update(kind + len(data).to_bytes(8, "little") + data)
    return hasher


def integer(seed: int, purpose: Purpose, *keys: Key) -> int:
    """A non-negative 63-bit integer for one draw; fits every library's seed argument."""
    return int.from_bytes(digest(seed, purpose, *keys)[:8], "little") >> 1


def generator(seed: int, purpose: Purpose, *keys: Key) -> random.Random:
    """A standard-library generator for one draw (its first 16 digest bytes are the seed)."""
    return random.Random(int.from_bytes(digest(seed, purpose, *keys)[:16], "little"))  # noqa: S311


class Stream:
    """Generators of many draws that share all but their last key: what they share is hashed once."""

    def __init__(self, seed: int, purpose: Purpose, *keys: Key) -> None:
        """The keys that the draws share."""
        self._shared = _feed(hashlib.sha256(), seed, purpose.value, *keys)
        self._random = random.Random()  # noqa: S311

    def generator(self, key: Key) -> random.Random:
        """The generator that `generator` makes for the shared keys and this one; valid until the next is asked for."""
        hasher = _feed(self._shared.copy(), key)
        self._random.seed(int.from_bytes(hasher.digest()[:16], "little"))
        return self._random


def numpy_generator(seed: int, purpose: Purpose, *keys: Key) -> np.random.Generator:
    """A NumPy generator (PCG64) for one draw."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest(seed, purpose, *keys)[:16], "little")))


def torch_generator(seed: int, purpose: Purpose, *keys: Key) -> "torch.Generator":
    """A CPU torch generator for one draw: the numbers do not depend on the device that uses them."""
    import torch

    return torch.Generator("cpu").manual_seed(integer(seed, purpose, *keys))
