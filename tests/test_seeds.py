"""Draws follow from what is drawn: not from the process, the order, or neighbouring keys."""

import hashlib
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from training.seeds import Purpose, digest, generator, integer, numpy_generator, torch_generator

KEYS = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=12)), max_size=4)


@given(first=KEYS, second=KEYS)
def test_different_keys_give_different_digests(first, second):
    typed = [(type(key), key) for key in first], [(type(key), key) for key in second]
    same = typed[0] == typed[1]
    assert (digest(0, Purpose.NOISE, *first) == digest(0, Purpose.NOISE, *second)) == same


def test_digest_is_sha256_of_typed_length_prefixed_parts():
    parts = [(b"i", b"7"), (b"s", b"crop"), (b"i", b"3"), (b"s", b"ab")]
    by_hand = b"".join(kind + len(data).to_bytes(8, "little") + data for kind, data in parts)
    assert digest(7, Purpose.CROP, 3, "ab") == hashlib.sha256(by_hand).digest()


def test_purposes_do_not_overlap():
    assert len({integer(0, purpose, "x") for purpose in Purpose}) == len(Purpose)


def test_equal_in_another_process_with_another_hash_seed():
    code = (
        "from training.seeds import *;"
        "print(generator(1, Purpose.PROMPT, 2, 'é').random(), numpy_generator(1, Purpose.NOISE, 'a').random(),"
        " torch_generator(1, Purpose.NOISE, 'a').initial_seed())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = (
        f"{generator(1, Purpose.PROMPT, 2, 'é').random()} {numpy_generator(1, Purpose.NOISE, 'a').random()} "
        f"{torch_generator(1, Purpose.NOISE, 'a').initial_seed()}\n"
    )
    assert outputs == {here}
