"""Workers that hang, crash, starve or never start: each costs one row; order and memory stay as
promised."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from drawn_images import SAVED, encode, png, quadrants, textured
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from training.config.workspace import DecodeConfig
from training.errors import PipelineError
from training.images import decoding, measures
from training.images.decode_pool import DecodePool, Rejection

ONE = DecodeConfig(num_workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(12):
        size = (20 + number, 30, 3) if number % 5 else (700, 900, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / f"{number:02d}.png")
    (root / "05.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def shared_pool():
    with DecodePool(ONE) as pool:
        yield pool


def paths(folder):
    return sorted(folder.iterdir())


def alone(path):
    """What this process makes of a file, without a pool."""
    data = path.read_bytes()
    try:
        return decoding.decode(data, ONE), hashlib.sha256(data).hexdigest(), data
    except decoding.Unusable as error:
        return error


def test_facts_and_pixels_come_in_order_and_are_those_of_decode(folder):
    with DecodePool(DecodeConfig(num_workers=2)) as pool:
        for path, facts, pixels in zip(
            paths(folder), pool.facts(paths(folder)), pool.pixels(paths(folder)), strict=True
        ):
            expected = alone(path)
            if path.name == "05.png":
                assert isinstance(facts, Rejection)
                assert facts == pixels
                assert (facts.reason, facts.image_id) == (
                    "not_an_image",
                    hashlib.sha256(b"no image").hexdigest(),
                )
            else:
                decoded, image_id, data = expected
                assert facts == measures.measure(data, image_id, decoded)
                assert np.array_equal(pixels, decoded.pixels)


def test_a_missing_file_and_a_pipe_are_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with DecodePool(ONE) as pool:
        answers = list(
            pool.facts(
                [tmp_path / "none.jpg", tmp_path / "pipe.jpg", tmp_path / os.fsdecode(b"\xff.jpg")]
            )
        )
    assert [a.reason for a in answers] == ["gone", "not_a_file", "gone"]
    assert {a.image_id for a in answers} == {None}


def test_bytes_that_changed_since_they_were_listed_are_noticed(folder):
    good = paths(folder)[0]
    ids = [hashlib.sha256(good.read_bytes()).hexdigest(), "0" * 64]
    with DecodePool(ONE) as pool:
        first, second = pool.pixels([good, good], ids)
    assert isinstance(first, np.ndarray)
    assert (second.reason, second.limit) == ("changed_while_read", "0" * 64)


def odd_files():
    """Contents of files of every format, as they are and in the ways in which they are refused."""
    turned = Image.Exif()
    turned[274] = 6
    for form, options in SAVED.items():
        whole = encode(quadrants(), form, **options)
        yield whole
        yield encode(textured(), form, **options, exif=turned)
        yield whole + bytes(99)
        yield from (whole[: len(whole) * part // 4] for part in (1, 2, 3))
        yield whole[: len(whole) // 2] + b"\x55\xaa" * 8 + whole[len(whole) // 2 + 16 :]
        yield encode(quadrants(8, 8), form, **options)
    for form in ("GIF", "WEBP", "PNG", "AVIF"):
        frames = [Image.fromarray(textured(seed=seed)) for seed in range(2)]
        yield encode(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    yield png(30_000, 30_000, 1, 0, [])
    yield encode(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF")
    yield encode(Image.fromarray(quadrants()), "ICO")
    yield from (
        b"",
        b"hello",
        b"<svg/>",
        b"%PDF-1.7\n",
        b"\0\0\0\x18ftypheic" + bytes(40),
        bytes(70_001),
    )


def assert_equal_answers(pool, contents, folder):
    """Files of these contents, the contents, and what opens to them come to the same."""
    files = [folder / f"{number}.jpg" for number in range(len(contents))]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    openers = [partial(bytes, content) for content in contents]
    by_path, by_bytes, by_opener = (list(pool.facts(of)) for of in (files, contents, openers))
    assert by_path == by_bytes == by_opener
    ids = [hashlib.sha256(content).hexdigest() for content in contents]
    ids[0] = "0" * 64
    for one, other in zip(pool.pixels(files, ids), pool.pixels(contents, ids), strict=True):
        assert type(one) is type(other)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    return by_path


def test_bytes_are_decoded_as_files_of_them_are(tmp_path):
    with DecodePool(DecodeConfig(num_workers=2, max_bytes=70_000)) as pool:
        answers = assert_equal_answers(pool, list(odd_files()), tmp_path)
    taken = [answer.format for answer in answers if isinstance(answer, measures.Facts)]
    reasons = {answer.reason for answer in answers if isinstance(answer, Rejection)}
    assert set(taken) == set(SAVED)
    assert reasons == {
        "empty_file", "too_many_bytes", "too_many_pixels", "too_small", "truncated", "decode_failed", "animated",
        "mode_not_allowed", "format_not_allowed", "not_an_image",
    }  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    form=st.sampled_from(sorted(SAVED)), place=st.floats(0, 0.999), damage=st.binary(min_size=1, max_size=6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_damaged_bytes_are_decoded_as_damaged_files_are(
    shared_pool, tmp_path, form, place, damage, seed
):
    data = bytearray(encode(textured(seed=seed), form, **SAVED[form]))
    at = int(place * len(data))
    data[at : at + len(damage)] = damage
    assert_equal_answers(shared_pool, [bytes(data), bytes(data[:at])], tmp_path)


def test_content_that_a_worker_has_no_room_for_costs_one_image_and_no_worker(folder):
    large = b"BM" + bytes(150_000_000)
    with DecodePool(DecodeConfig(num_workers=1, memory_bytes=100_000_000)) as pool:
        wait_ready(pool, folder)
        process = process_of(pool)
        refused, good = pool.facts([large, paths(folder)[1].read_bytes()])
        assert process_of(pool) is process
    assert (refused.reason, refused.limit) == ("out_of_memory", "100000000 bytes")
    assert isinstance(good, measures.Facts)


def test_what_cannot_be_opened_costs_one_image(folder):
    def fail():
        raise decoding.Unusable("gone", detail="no such member")

    good = paths(folder)[1]
    with DecodePool(ONE) as pool:
        first, failed, last = pool.facts([partial(Path, good), fail, good.read_bytes])
    assert failed == Rejection(reason="gone", detail="no such member")
    assert first == last
    assert isinstance(first, measures.Facts)


def test_contents_are_opened_only_when_their_turn_comes(folder):
    opened = []

    def opening(number):
        opened.append(number)
        return paths(folder)[1].read_bytes()

    with DecodePool(ONE) as pool:
        facts = pool.facts(partial(opening, number) for number in range(100))
        for _ in range(3):
            next(facts)
        assert len(opened) <= 3 + 4


def process_of(pool):
    (worker,) = pool._workers
    return worker._process


def wait_ready(pool, folder):
    assert isinstance(next(pool.facts(paths(folder)[1:2])), measures.Facts)


AS_FILES = pytest.mark.parametrize("opened", [Path, Path.read_bytes], ids=["path", "bytes"])
"""Paths and their contents. The first image has more bytes than a socket takes at once."""


@AS_FILES
def test_a_hanging_worker_costs_one_image(folder, opened):
    with DecodePool(DecodeConfig(num_workers=1, timeout_s=1.0)) as pool:
        wait_ready(pool, folder)
        hanging = process_of(pool)
        os.kill(hanging.pid, signal.SIGSTOP)
        answers = list(pool.facts(map(opened, paths(folder)[:3])))
        assert hanging.returncode == -signal.SIGKILL
    assert answers[0] == Rejection(reason="decode_timeout", value="more than 1 s", limit="1 s")
    assert all(isinstance(answer, measures.Facts) for answer in answers[1:])


@AS_FILES
def test_a_worker_that_dies_in_a_image_costs_that_image(folder, opened):
    with DecodePool(ONE) as pool:
        wait_ready(pool, folder)
        dying = process_of(pool)
        os.kill(dying.pid, signal.SIGSTOP)  # So that it has the image, and does not finish it.
        threading.Timer(0.3, os.kill, (dying.pid, signal.SIGKILL)).start()
        answers = list(pool.facts(map(opened, paths(folder)[:3])))
    assert (answers[0].reason, answers[0].value) == ("decode_crashed", "signal SIGKILL")
    assert all(isinstance(answer, measures.Facts) for answer in answers[1:])


@AS_FILES
def test_a_worker_that_dies_between_images_costs_none(folder, opened):
    with DecodePool(ONE) as pool:
        wait_ready(pool, folder)
        dead = process_of(pool)
        dead.kill()
        dead.wait()
        answers = list(pool.facts(map(opened, paths(folder)[1:4])))
    assert all(isinstance(answer, measures.Facts) for answer in answers)


@AS_FILES
@pytest.mark.parametrize("side", [3700, 6000])  # Found while decoding, and in the header.
def test_a_image_beyond_the_memory_limit_is_a_row(folder, tmp_path, side, opened):
    Image.new("RGB", (side, side)).save(tmp_path / "large.png")
    with DecodePool(DecodeConfig(num_workers=1, memory_bytes=100_000_000)) as pool:
        large, small = pool.facts(map(opened, [tmp_path / "large.png", paths(folder)[1]]))
    assert (large.reason, large.limit) == ("out_of_memory", "100000000 bytes")
    assert isinstance(small, measures.Facts)


def test_paths_are_taken_only_a_few_ahead(folder):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield paths(folder)[1]

    with DecodePool(ONE) as pool:
        pixels = pool.pixels(endless())
        for _ in range(5):
            next(pixels)
        assert taken <= 5 + 2
        facts = pool.facts(endless())
        taken = 0
        next(facts)
        assert taken <= 4


def test_closing_ends_every_worker_whatever_it_does(folder):
    with DecodePool(DecodeConfig(num_workers=2)) as pool:
        processes = [worker._process for worker in pool._workers]
        wait_ready(pool, folder)
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)

        def wait_for_ever():
            with contextlib.suppress(PipelineError, CancelledError):
                list(pool.facts(paths(folder)))

        waiting = threading.Thread(target=wait_for_ever)
        waiting.start()
        time.sleep(0.5)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert all(process.returncode is not None for process in processes)


def test_a_worker_ends_when_its_parent_is_gone(folder):
    with DecodePool(ONE) as pool:
        wait_ready(pool, folder)
        (worker,) = pool._workers
        worker._socket.close()
        assert worker._process.wait(timeout=10) == 0


def test_workers_that_cannot_start_are_an_error_and_not_a_thousand_rows(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        DecodePool(ONE) as pool,
        pytest.raises(PipelineError, match=r"did not start: exit status 1"),
    ):
        list(pool.facts(paths(folder)))


def test_a_worker_loads_neither_polars_nor_torch():
    code = "import sys, training.images.decode_pool; print(sorted({'polars', 'torch', 'scipy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
