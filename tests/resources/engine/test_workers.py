"""Results come in the order of the batches from any number of workers; a worker that dies costs
nothing but time."""

import contextlib
import os
import signal

import engine_workers
import psutil
import pytest

from resources import devices
from resources.engine.processes import AHEAD, ProcessPool
from resources.engine.workers import Workers, WorkerSpec
from training.config.workspace import DevicesConfig
from training.errors import ModelError, WorkerLostError


@pytest.fixture
def said():
    return []


@pytest.fixture
def pool(said, request):
    """`pool(make, *arguments, num_workers=2)`: a pool that is closed when the test ends."""

    def make_pool(make, *arguments, num_workers=2):
        made = ProcessPool("test", make, arguments, ["cpu"] * num_workers, said.append)
        request.addfinalizer(made.close)
        return made

    return make_pool


def children():
    """Processes that this one has, and those that these have."""
    return set(psutil.Process().children(recursive=True))


EXPECTED = [(number, number * number) for number in range(23)]


def test_one_worker_works_in_this_process(tmp_path):
    spec = WorkerSpec(make=engine_workers.Squares, arguments=(tmp_path,), kind="annotate")
    with Workers(spec, DevicesConfig(), tmp_path) as workers:
        assert list(workers.map(range(23))) == EXPECTED
        assert [path.name for path in tmp_path.glob("made-*")] == [f"made-{os.getpid()}-0"]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_come_in_order_from_any_number_of_workers(pool, tmp_path, num_workers):
    made = pool(engine_workers.Squares, tmp_path, num_workers=num_workers)
    assert list(made.map(range(23))) == EXPECTED
    assert list(made.map(range(5))) == EXPECTED[:5], "workers stay for the next map"
    assert len(list(tmp_path.glob("made-*"))) <= num_workers


def test_no_batch_means_no_worker(tmp_path):
    spec = WorkerSpec(make=engine_workers.Squares, arguments=(tmp_path,), kind="annotate")
    with Workers(spec, DevicesConfig(), tmp_path) as workers:
        assert list(workers.map([])) == []
    assert not list(tmp_path.glob("made-*"))


def test_batches_are_taken_only_a_little_ahead_of_the_results(pool, tmp_path):
    taken = []
    made = pool(engine_workers.Squares, tmp_path)
    for given_out, _ in enumerate(made.map(taken.append(n) or n for n in range(100))):
        assert len(taken) <= given_out + 2 * AHEAD * 2


def test_large_batches_and_results_do_not_block_each_other(pool):
    batches = [bytes([number]) * 3_000_000 for number in range(8)]
    assert list(pool(engine_workers.Echo).map(batches)) == batches


def test_a_batch_whose_worker_dies_is_tried_again_on_a_new_one(pool, said, tmp_path):
    made = pool(engine_workers.Mortal, tmp_path, {5: 1, 6: 2})
    assert list(made.map(range(23))) == EXPECTED
    assert len(said) == 3
    assert all("signal SIGKILL" in line for line in said)


def test_a_batch_that_kills_every_worker_fails_by_name_with_the_reason(pool, tmp_path):
    made = pool(engine_workers.Mortal, tmp_path, {7: 99})
    found = []
    with pytest.raises(
        WorkerLostError, match=r"test: batch 7 \(7\): .*cpu of .* died 3 times"
    ) as caught:
        found.extend(made.map(range(23)))
    assert "SIGKILL" in str(caught.value)
    assert found == EXPECTED[: len(found)]
    assert len(found) <= 7
    assert list(made.map(range(5))) == EXPECTED[:5], "the others live on"


def test_a_worker_that_is_killed_between_two_maps_is_replaced(pool, said, tmp_path):
    made = pool(engine_workers.Squares, tmp_path)
    assert list(made.map(range(5))) == EXPECTED[:5]
    for path in tmp_path.glob("made-*"):
        os.kill(int(path.name.split("-")[1]), signal.SIGKILL)
    assert list(made.map(range(23))) == EXPECTED


def test_why_a_worker_cannot_be_made_is_raised_as_itself(pool):
    with pytest.raises(ModelError, match="models/clip is missing"):
        list(pool(engine_workers.Unmakeable).map(range(3)))


def test_a_worker_that_dies_before_it_is_made_is_given_up(pool):
    with pytest.raises(WorkerLostError, match="did not start: exit status 3, 3 times"):
        list(pool(engine_workers.Stillborn).map(range(3)))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_error_is_raised_as_itself_and_the_workers_stay(pool, num_devices):
    made = pool(engine_workers.Refuses, 4, num_workers=num_devices)
    with pytest.raises(RuntimeError, match="out of memory at 4"):
        list(made.map(range(9)))
    assert list(made.map([1, 2, 3])) == [1, 2, 3], "late answers of the map before are dropped"


def test_no_process_remains(tmp_path):
    before = children()
    made = ProcessPool("test", engine_workers.Squares, (tmp_path,), ["cpu"] * 2, print)
    next(made.map(range(23)))
    assert len(children() - before) >= 2
    made.close()
    assert not children() - before
    assert len(list(tmp_path.glob("closed-*"))) == 2, "each could end what it had started"


def test_a_worker_in_this_process_is_closed(tmp_path):
    spec = WorkerSpec(make=engine_workers.Squares, arguments=(tmp_path,), kind="annotate")
    with Workers(spec, DevicesConfig(), tmp_path) as workers:
        list(workers.map(range(3)))
        assert not list(tmp_path.glob("closed-*"))
    assert len(list(tmp_path.glob("closed-*"))) == 1


def test_workers_stay_until_the_devices_change_or_somebody_waits(tmp_path, monkeypatch):
    held, wanted = [("cpu",)], []

    @contextlib.contextmanager
    def hold_all(*arguments, **options):
        yield held[0]

    monkeypatch.setattr(devices, "hold_all", hold_all)
    monkeypatch.setattr(devices, "are_wanted", lambda *arguments: bool(wanted))
    spec = WorkerSpec(make=engine_workers.Squares, arguments=(tmp_path,), kind="annotate")
    with Workers(spec, DevicesConfig(), tmp_path) as workers:

        def num_made():
            assert list(workers.map(range(23))) == EXPECTED
            return len(list(tmp_path.glob("made-*")))

        assert [num_made(), num_made()] == [1, 1]
        held[0] = ("cpu:0", "cpu:1")
        assert [num_made(), num_made()] == [3, 3]
        wanted.append("cpu:1")
        assert num_made() == 3
        assert num_made() == 5, "the networks had been dropped for whoever waited"
