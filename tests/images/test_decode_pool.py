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

import numpy as np
import pytest
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
    (root / "05.png").write_bytes(b"no picture")
    return root


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
                    hashlib.sha256(b"no picture").hexdigest(),
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


def process_of(pool):
    (worker,) = pool._workers
    return worker._process


def wait_ready(pool, folder):
    assert isinstance(next(pool.facts(paths(folder)[1:2])), measures.Facts)


def test_a_hanging_worker_costs_one_picture(folder):
    with DecodePool(DecodeConfig(num_workers=1, timeout_s=1.0)) as pool:
        wait_ready(pool, folder)
        hanging = process_of(pool)
        os.kill(hanging.pid, signal.SIGSTOP)
        answers = list(pool.facts(paths(folder)[1:4]))
        assert hanging.returncode == -signal.SIGKILL
    assert answers[0] == Rejection(reason="decode_timeout", value="more than 1 s", limit="1 s")
    assert all(isinstance(answer, measures.Facts) for answer in answers[1:])


def test_a_worker_that_dies_in_a_picture_costs_that_picture(folder):
    with DecodePool(ONE) as pool:
        wait_ready(pool, folder)
        dying = process_of(pool)
        os.kill(dying.pid, signal.SIGSTOP)  # So that it has the picture, and does not finish it.
        threading.Timer(0.3, os.kill, (dying.pid, signal.SIGKILL)).start()
        answers = list(pool.facts(paths(folder)[1:4]))
    assert (answers[0].reason, answers[0].value) == ("decode_crashed", "signal SIGKILL")
    assert all(isinstance(answer, measures.Facts) for answer in answers[1:])


def test_a_worker_that_dies_between_pictures_costs_none(folder):
    with DecodePool(ONE) as pool:
        wait_ready(pool, folder)
        dead = process_of(pool)
        dead.kill()
        dead.wait()
        assert all(isinstance(answer, measures.Facts) for answer in pool.facts(paths(folder)[1:4]))


@pytest.mark.parametrize("side", [3700, 6000])  # Found while decoding, and in the header.
def test_a_picture_beyond_the_memory_limit_is_a_row(folder, tmp_path, side):
    Image.new("RGB", (side, side)).save(tmp_path / "large.png")
    with DecodePool(DecodeConfig(num_workers=1, memory_bytes=100_000_000)) as pool:
        large, small = pool.facts([tmp_path / "large.png", paths(folder)[1]])
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
