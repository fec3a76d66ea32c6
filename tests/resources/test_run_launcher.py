"""A run whose process was killed does not stay started permanently, whoever carried it out."""

import os
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest

from resources.instance import instance, write_instance
from resources.run_launcher import HOLDER_TAG, holder_tags, report_dead_runs, start_time

HOLDER = """
import sys, time
from pathlib import Path
import dagster as dg
from resources.instance import instance
from resources.run_launcher import holder_tags

@dg.op
def slow():
    print("started", flush=True)
    while True:
        time.sleep(0.02)

@dg.job
def slow_job():
    slow()

with instance(Path(sys.argv[1])) as opened:
    slow_job.execute_in_process(instance=opened, tags=holder_tags(), raise_on_error=False)
"""


@pytest.fixture
def opened(tmp_path):
    write_instance(tmp_path)
    with instance(tmp_path) as opened:
        yield opened


@pytest.fixture
def held_run(opened, tmp_path):
    """A run in progress and the process that carries it out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    yield opened.get_runs()[0], process
    process.kill()
    process.communicate()


def test_start_times_tell_processes_apart():
    assert start_time(os.getpid()) == start_time(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.05)
    assert start_time(child.pid) >= start_time(os.getpid())
    child.kill()
    while (state := start_time(child.pid)) is not None:
        time.sleep(0.01)
    assert state is None, "a zombie is no holder"
    child.communicate()
    assert start_time(child.pid) is None


def test_a_killed_holder_ends_its_runs(opened, held_run):
    run, process = held_run
    assert run.status is dg.DagsterRunStatus.STARTED
    assert report_dead_runs(opened) == []
    assert opened.run_launcher.check_run_worker_health(run).status.name == "RUNNING"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert opened.run_launcher.check_run_worker_health(run).status.name == "NOT_FOUND"
    assert report_dead_runs(opened) == [run.run_id]
    assert opened.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.FAILURE
    assert report_dead_runs(opened) == []


def test_cancelling_reaches_the_holder(opened, held_run):
    run, process = held_run
    assert opened.run_launcher.terminate(run.run_id)
    process.wait(20)
    assert opened.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.CANCELED


def test_cancelling_a_dead_run_cancels_it(opened, held_run):
    run, process = held_run
    process.kill()
    process.wait()
    assert not opened.run_launcher.terminate(run.run_id)
    assert opened.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.CANCELED


@dg.op
def nothing() -> None:
    pass


@dg.job
def empty_job() -> None:
    nothing()


def test_a_pid_that_came_back_and_other_runs(opened):
    pid, _, started = holder_tags()[HOLDER_TAG].partition(":")
    reused = opened.create_run_for_job(empty_job, tags={HOLDER_TAG: f"{pid}:{int(started) - 1}"})
    living = opened.create_run_for_job(empty_job, tags=holder_tags())
    foreign = opened.create_run_for_job(empty_job)
    opened.report_run_canceling(
        canceling := opened.create_run_for_job(empty_job, tags={HOLDER_TAG: f"{pid}:1"})
    )
    finished = empty_job.execute_in_process(instance=opened, tags={HOLDER_TAG: f"{pid}:1"}).run_id
    assert set(report_dead_runs(opened)) == {reused.run_id, canceling.run_id}
    statuses = {run.run_id: run.status.name for run in opened.get_runs()}
    assert statuses == {
        reused.run_id: "FAILURE",
        canceling.run_id: "CANCELED",
        living.run_id: "NOT_STARTED",
        foreign.run_id: "NOT_STARTED",
        finished: "SUCCESS",
    }
    health = opened.run_launcher.check_run_worker_health(foreign)
    assert (health.status.name, health.msg) == ("NOT_FOUND", "no code server was told to start it")
