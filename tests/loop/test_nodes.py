"""Two machines by torchrun's c10d rendezvous, here two agents of one: one is killed, both are
started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.runs import bundle, run_folder
from training.runs.event_log import read_events


def contents(run, samples_seen):
    ready = run_folder.read_ready(run_folder.checkpoint_folder(run, samples_seen))
    return {entry.name: entry.sha256 for entry in (*ready.files, *ready.state_files)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def machines(tmp_path):
    """`machines(bundle)` starts the bundle's `start.sh` as on each of two machines; none is left
    behind."""
    started = []

    def start(folder):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "NODES": "2", "GPUS": "1",
            "HEAD": f"127.0.0.1:{free_port()}",
        }  # fmt: skip
        agents = []
        for number in range(2):
            with (tmp_path / f"agent{len(started)}-{number}.log").open("w") as output:
                agents.append(
                    subprocess.Popen(
                        [folder / "start.sh"],
                        cwd=tmp_path,
                        env=environment,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        started.append(agents)
        return agents

    yield start
    for agent in (agent for agents in started for agent in agents if agent.poll() is None):
        kill(agent)


def ranks_of(agent):
    """Ids of the processes that train under an agent; each leads a session of its own."""
    listed = subprocess.run(
        ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def kill(agent):
    """A machine goes down: its agent and its rank at once."""
    for pid in (*ranks_of(agent), agent.pid):
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def outputs(tmp_path):
    return "".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("agent*.log")))


def wait_for(run, event, agents, tmp_path):
    """The first line of the log that has this event."""
    for _ in range(2400):
        found = [line for line in read_events(run / run_folder.EVENTS) if line["event"] == event]
        if found:
            return found[-1]
        assert all(agent.poll() is None for agent in agents), outputs(tmp_path)
        time.sleep(0.05)
    raise AssertionError(f"no {event}: {outputs(tmp_path)}")


def test_two_machines_make_the_bits_of_one(unbroken, make_run, machines, tmp_path):
    bundle.write_bundle(make_run("nodes").folder, tmp_path / "bundle")
    agents = machines(tmp_path / "bundle")
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], outputs(tmp_path)
    run = tmp_path / "bundle" / "runs" / "nodes"
    assert read_events(run / run_folder.EVENTS)[0]["num_ranks"] == 2
    assert contents(run, 52) == contents(unbroken.folder, 52)


@pytest.mark.slow
def test_a_run_whose_second_machine_goes_down_ends_in_the_bits_of_an_unbroken_one(
    make_run, train, machines, tmp_path
):
    long = {"num_samples": 200, "validation.every_samples": 200, "checkpoints.every_samples": 24}
    whole, made = make_run("whole", **long), make_run("nodes", **long)
    assert train(whole) == "finished"
    end = read_events(whole.folder / run_folder.EVENTS)[-1]["samples_seen"]
    bundle.write_bundle(made.folder, tmp_path / "bundle")
    run = tmp_path / "bundle" / "runs" / "nodes"

    agents = machines(tmp_path / "bundle")
    started = wait_for(run, "started", agents, tmp_path)
    wait_for(run, "checkpoint", agents, tmp_path)
    lost = next(agent for agent in agents if started["pid"] not in ranks_of(agent))
    kill(lost)
    other = next(agent for agent in agents if agent is not lost)
    assert other.wait(timeout=120) != 0, "the machine that is left must not go on alone"
    events = read_events(run / run_folder.EVENTS)
    assert events[-1]["event"] == "failed"
    assert "another rank of this run was lost" in events[-1]["reason"]
    assert events[-1]["samples_seen"] < end, "it was killed before its end"

    agents = machines(tmp_path / "bundle")
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], outputs(tmp_path)
    events = read_events(run / run_folder.EVENTS)
    assert [event["event"] for event in events if event["event"] in ("resumed", "finished")] == [
        "resumed",
        "finished",
    ]
    assert contents(run, end) == contents(whole.folder, end)
