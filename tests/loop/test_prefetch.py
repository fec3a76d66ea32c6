"""Batches are made ahead, in order, by one thread, and no further ahead than asked for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from training.loop.prefetch import Prefetch, Sender, StageTimes


@pytest.fixture
def worker():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_items_come_in_order_and_so_many_are_made_ahead(worker, depth):
    made, threads = [], set()

    def make(item):
        threads.add(threading.get_ident())
        made.append(item)
        return item * 10

    with Prefetch(make, range(6), worker, depth) as results:
        wait_for(lambda: len(made) == min(depth, 6))
        assert next(results) == 0
        wait_for(lambda: len(made) == min(depth + 1, 6))
        assert [next(results) for _ in range(5)] == [10, 20, 30, 40, 50]
        with pytest.raises(StopIteration):
            next(results)
    assert made == [*range(6)]
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_a_slow_item_is_hidden_by_those_that_are_ready(worker):
    slow = threading.Event()

    def make(item):
        if item == 3:
            slow.wait(20)
        return item

    with Prefetch(make, range(5), worker, 4) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2], (
            "none of them had to wait for the slow one"
        )
        slow.set()
        assert [next(results), next(results)] == [3, 4]


def test_what_making_raised_is_raised_in_its_turn(worker):
    def make(item):
        if item == 1:
            raise ValueError("no such file")
        return item

    with Prefetch(make, range(3), worker, 3) as results:
        assert next(results) == 0
        with pytest.raises(ValueError, match="no such file"):
            next(results)


def test_leaving_drops_what_was_not_begun_and_waits_for_the_rest(worker):
    made, running = [], threading.Event()

    def make(item):
        running.set()
        time.sleep(0.05)
        made.append(item)

    with Prefetch(make, range(100), worker, 50):
        running.wait(20)
    count = len(made)
    assert 1 <= count < 50
    assert worker.submit(lambda: len(made)).result() == count, "nothing of it runs any more"


def test_waiting_is_measured(worker):
    with Prefetch(lambda _: time.sleep(0.05), range(2), worker, 1) as results:
        next(results)
        next(results)
        assert results.waited_s == pytest.approx(0.1, abs=0.06)


def test_on_a_cpu_tensors_stay_where_they_are():
    sender, tensor = Sender(torch.device("cpu")), torch.ones(3)
    assert sender.pin(tensor) is tensor
    assert sender.send(tensor) is tensor
    sender.receive(sender.sent(), [tensor])


@pytest.mark.gpu
def test_on_a_gpu_batches_are_pinned_and_their_readers_wait():
    sender = Sender(torch.device("cuda", 0))
    tensor = torch.randn(1_000_000)
    assert sender.pin(tensor).is_pinned()
    sent = sender.send(tensor)
    sender.receive(sender.sent(), [sent])
    assert torch.equal(sent.cpu(), tensor)


def test_stages_add_up():
    times = StageTimes()
    for _ in range(2):
        with times.stage("prompts"):
            time.sleep(0.01)
    with times.stage("latents"):
        pass
    assert times.seconds["prompts"] > 0.015
    assert times.seconds["latents"] < 0.01
