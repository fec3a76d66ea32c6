"""A run that was started from Dagster's page: `foundry up` dies and comes again, and the trainer
does not notice."""

import contextlib
import itertools
import os
import signal
from pathlib import Path

import dagster as dg
import httpx
import pytest
from serving import start_up, wait_until
from tiny_runs import build_run

from assets.partitions import mirror
from resources import torchrun
from resources.instance import instance, write_instance
from resources.workspace.store import Store
from training.runs.event_log import read_events
from training.runs.run_folder import EVENTS, LOCK

LAUNCH = """mutation Launch($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params)
    { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
TERMINATE = "mutation Terminate($run: String!) { terminateRun(runId: $run) { __typename } }"


def ask(up, query, **variables):
    """A mutation as our own page sends it."""
    headers = {"Origin": up.dagster, "Sec-Fetch-Site": "same-origin"}
    body = {"query": query, "variables": variables}
    return httpx.post(f"{up.dagster}/graphql", json=body, headers=headers, timeout=60).json()[
        "data"
    ]


def launch(up):
    """Materialize `checkpoints` of the run `demo`; returns the id of Dagster's run."""
    selector = {
        "repositoryLocationName": "foundry", "repositoryName": "__repository__", "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["checkpoints"]}],
    }  # fmt: skip
    tags = {"tags": [{"key": "dagster/partition", "value": "demo"}]}
    params = {
        "selector": selector,
        "mode": "default",
        "runConfigData": {},
        "executionMetadata": tags,
    }
    return ask(up, LAUNCH, params=params)["launchPipelineExecution"]["run"]["runId"]


def serve(home):
    up = start_up(home, Path(__file__).parents[2])
    assert [up.process.stdout.readline().split()[0] for _ in range(3)] == [
        "Dagster",
        "MLflow",
        "Ctrl-C",
    ]
    return up


def pid_of(up, child):
    """A child of `foundry up`."""
    asked = f"jobs.serve\0{child}\0".encode()
    return next(pid for pid in up.processes() if asked in Path(f"/proc/{pid}/cmdline").read_bytes())


def followers(up, first):
    """Runs after the first one that have attached to the trainer: they repeat the lines of its
    log."""
    with instance(up.home) as opened:
        later = [run.run_id for run in opened.get_runs() if run.run_id != first]
        return [
            run_id
            for run_id in later
            if any("event=started" in one.user_message for one in opened.all_logs(run_id))
        ]


def steps(folder):
    return [
        event["samples_seen"] for event in read_events(folder / EVENTS) if event["event"] == "step"
    ]


@pytest.mark.slow
def test_the_trainer_does_not_notice_that_ui_and_daemon_die_and_come_again(tmp_path, tiny_sdxl):
    write_instance(tmp_path)
    toml = f'format = 1\nsources = []\n[models]\nbase = "{tiny_sdxl}"\n[encodings.tiny.buckets]\nplan = "sdxl_paper"\n'
    (tmp_path / "foundry.toml").write_text(toml)
    never = {"validation.every_samples": 10**9, "checkpoints.every_samples": 10**9}
    folder = build_run(tmp_path, tiny_sdxl, "demo", {"num_samples": 10**9, **never}).folder
    with instance(tmp_path) as opened:
        mirror(opened, Store(tmp_path))
    up = serve(tmp_path)
    try:
        first = launch(up)
        wait_until(lambda: len(steps(folder)) > 2, 120)
        trainer = (folder / LOCK).read_text().split()[1]

        os.kill(pid_of(up, "daemon"), signal.SIGKILL)
        assert "Training run demo goes on" in up.process.communicate(timeout=60)[0]
        assert up.runs()[first] is dg.DagsterRunStatus.FAILURE
        before = len(steps(folder))
        wait_until(lambda: len(steps(folder)) > before + 2)

        up = serve(tmp_path)
        # The daemon repeats the run that died, which finds the trainer by its lock.
        wait_until(lambda: followers(up, first), 120)
        second = followers(up, first)[0]
        before = len(steps(folder))
        wait_until(lambda: len(steps(folder)) > before + 2)
        assert (folder / LOCK).read_text().split()[1] == trainer
        assert ask(up, TERMINATE, run=second)["terminateRun"]["__typename"] == "TerminateRunSuccess"
        up.wait_for(second, dg.DagsterRunStatus.CANCELED)
        assert not torchrun.is_running(folder), "the cancelled run waits for its trainer"
    finally:
        for pid in {up.process.pid, *up.processes()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        up.process.communicate()
    events = read_events(folder / EVENTS)
    assert [event["event"] for event in events if event["event"] in ("started", "resumed")] == [
        "started"
    ]
    assert events[-1]["event"] == "stopped"
    # 22 images an epoch by steps of up to 8: none was left out or done twice.
    sizes = [after - before for before, after in itertools.pairwise([0, *steps(folder)])]
    assert sizes == [8, 8, 6] * (len(sizes) // 3) + [8, 8, 6][: len(sizes) % 3]
