import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resources import torchrun
from training import commit
from training.runs import run_folder
from training.runs.event_log import EventLog, read_events

LONG = {"num_samples": 4000, "validation.every_samples": 4000, "checkpoints.every_samples": 22}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # Bits depend on the number of threads, and two ranks share one core here.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def ranks_of(handle):
    """Process ids of the ranks; each is the leader of a session of its own."""
    listed = subprocess.run(
        ["pgrep", "-P", str(handle.process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def kill(handle):
    """torchrun and all ranks at once, as when a machine goes down."""
    for pid in (*ranks_of(handle), handle.process.pid):
        os.kill(pid, signal.SIGKILL)
    handle.process.wait()
    while handle.is_alive():
        time.sleep(0.05)


@pytest.fixture
def start():
    """Starts trainers and leaves none behind."""
    handles = []

    def begin(run, num_processes=1):
        handle = torchrun.start_or_attach(run.folder, num_processes)
        handles.append(handle)
        return handle

    yield begin
    for handle in handles:
        if handle.process is not None and handle.process.poll() is None:
            kill(handle)


def until(handle, event):
    return next(line for line in handle.events() if line["event"] == event)


def contents(run, samples_seen):
    ready = run_folder.read_ready(run_folder.checkpoint_folder(run.folder, samples_seen))
    return {entry.name: entry.sha256 for entry in (*ready.files, *ready.state_files)}


def output(run):
    return (run.folder / run_folder.OUTPUT).read_text()


def test_two_ranks_make_the_bits_of_one(unbroken, make_run, start):
    run = make_run("two", num_processes=2)
    assert start(run, 2).wait()["event"] == "finished", output(run)
    assert read_events(run.folder / run_folder.EVENTS)[0]["num_ranks"] == 2
    assert contents(run, 52) == contents(unbroken, 52)
    losses = [
        [
            event["loss"].hex()
            for event in read_events(one.folder / run_folder.EVENTS)
            if "loss" in event
        ]
        for one in (run, unbroken)
    ]
    assert losses[0] == losses[1]


def test_a_trainer_is_attached_to_stopped_resumed_and_ends_with_a_killed_rank(make_run, start):
    run = make_run(**LONG)
    first = start(run)
    until(first, "step")
    assert torchrun.is_running(run.folder)
    assert os.getsid(first.process.pid) == first.process.pid != os.getsid(0)

    second = torchrun.start_or_attach(run.folder, 1)
    assert second.process is None
    assert next(second.events())["event"] == "started"
    ending = second.stop()
    assert ending["event"] == "stopped"
    assert first.wait() == ending
    assert not torchrun.is_running(run.folder)
    saved = run_folder.checkpoints(run.folder)[-1]
    assert run_folder.read_ready(saved).samples_seen == ending["samples_seen"]

    third = start(run, 2)
    resumed = until(third, "resumed")
    assert resumed["samples_seen"] == ending["samples_seen"]
    until(third, "checkpoint")
    until(third, "step")
    (other,) = [pid for pid in ranks_of(third) if pid != resumed["pid"]]
    began = time.monotonic()
    os.kill(other, signal.SIGKILL)
    killed = third.wait()
    assert killed["event"] == "failed"
    assert "another rank of this run was lost" in killed["reason"]
    assert time.monotonic() - began < 60
    assert not torchrun.is_running(run.folder)

    fourth = start(run)
    resumed = until(fourth, "resumed")
    assert resumed["samples_seen"] % 22 in (0, 8, 16)
    assert resumed["samples_seen"] > ending["samples_seen"]
    # torchrun's own way of stopping, as a machine's shutdown uses it.
    fourth.process.send_signal(signal.SIGTERM)
    assert fourth.wait()["event"] == "stopped", output(run)
    events = read_events(run.folder / run_folder.EVENTS)
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_two_killed_and_resumed_ranks_make_the_bits_of_an_unbroken_one(unbroken, make_run, start):
    run = make_run("broken")
    for num_processes in (2, 1):
        handle = start(run, num_processes)
        until(handle, "checkpoint" if num_processes == 2 else "step")
        kill(handle)
    assert start(run, 2).wait()["event"] == "finished", output(run)
    assert contents(run, 52) == contents(unbroken, 52)


def test_a_trainer_that_was_killed_has_failed_and_says_where_to_look(tmp_path):
    (tmp_path / run_folder.OUTPUT).write_text("loading\nout of memory\n")
    with EventLog(tmp_path / run_folder.EVENTS) as log:
        log.write("started", samples_seen=0)
        log.write("step", samples_seen=8)
    ending = torchrun.TrainerHandle(tmp_path, None, 0).wait()
    assert (ending["event"], ending["samples_seen"]) == ("failed", 8)
    assert "ended without a last line" in ending["reason"]
    assert ending["reason"].endswith("trainer.log: out of memory")


def standby_pid():
    return torchrun._standby[0]._process.pid


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # its parent has ended too, and no one has adopted it


def test_one_rank_runs_by_itself(make_run, start):
    run = make_run(num_samples=8)
    handle = start(run)
    opening = until(handle, "started")
    assert opening["pid"] == handle.process.pid
    assert opening["num_ranks"] == 1
    assert handle.wait()["event"] == "finished", output(run)
    assert "torch.distributed" not in output(run)


def test_a_trainer_stands_by_and_is_the_one_that_trains(unbroken, make_run):
    run = make_run("early")
    with torchrun.standing_by(run.folder, 1):
        pid = standby_pid()
        assert os.getsid(pid) == pid
        assert not (run.folder / run_folder.OUTPUT).exists(), (
            "nothing is written before it is told its run"
        )
        assert not torchrun.is_running(run.folder)
        handle = torchrun.start_or_attach(run.folder, 1)
        assert handle.process.pid == pid
    assert until(handle, "started")["pid"] == pid
    assert handle.wait()["event"] == "finished", output(run)
    assert handle.process.wait() == 0
    assert contents(run, 52) == contents(unbroken, 52)


def test_a_trainer_that_stands_by_ends_with_a_launcher_that_needs_none(make_run):
    run = make_run()
    with torchrun.standing_by(run.folder, 1):
        pid = standby_pid()
    assert is_gone(pid)
    assert not torchrun._standby
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.toml",
        "inputs.json",
        "vocabulary.parquet",
    ]


def test_a_trainer_that_stands_by_ends_with_a_killed_launcher(make_run):
    code = (
        "import sys, time; from pathlib import Path; from resources import torchrun\n"
        "with torchrun.standing_by(Path(sys.argv[1]), 1):\n"
        "    print(torchrun._standby[0]._process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(make_run().folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        pid = int(launcher.stdout.readline())
        launcher.kill()
    deadline = time.monotonic() + 20
    while not is_gone(pid):
        assert time.monotonic() < deadline, "it is left behind"
        time.sleep(0.05)


def test_a_trainer_that_died_standing_by_is_replaced(make_run):
    run = make_run(num_samples=8)
    with torchrun.standing_by(run.folder, 1):
        pid = standby_pid()
        os.kill(pid, signal.SIGKILL)
        torchrun._standby[0]._process.wait()
        handle = torchrun.start_or_attach(run.folder, 1)
        assert handle.process.pid != pid
    assert handle.wait()["event"] == "finished", output(run)


def test_nobody_stands_by_for_nothing(unbroken, make_run, monkeypatch):
    def stands_by(folder, num_processes=1):
        with torchrun.standing_by(folder, num_processes):
            return bool(torchrun._standby)

    run = make_run()
    assert not stands_by(unbroken.folder)
    assert not stands_by(run.folder, 2)
    with commit.lock(run.folder / run_folder.LOCK, "the run"):
        assert not stands_by(run.folder)
    monkeypatch.setattr(torchrun.devices, "has_cards", lambda: True)
    assert not stands_by(run.folder)


def test_a_run_that_cannot_start_says_why_in_one_line(make_run, start):
    run = make_run()
    text = (run.folder / run_folder.CONFIG).read_text()
    (run.folder / run_folder.CONFIG).write_text(text.replace("num_samples", "num_sampels"))
    ending = start(run).wait()
    assert ending["event"] == "failed"
    assert "num_sampels" in ending["reason"]
    assert f"training failed: {ending['reason']}" in output(run)
    assert "training.errors" not in output(run)


def test_importing_the_launcher_leaves_torch_alone():
    code = "import resources.torchrun, sys; sys.exit('torch' in sys.modules or 'dagster' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
