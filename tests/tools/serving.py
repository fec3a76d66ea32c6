"""`foundry up` in the background of a test, on free ports."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import httpx

from resources.instance import instance

UP = """
import sys
from pathlib import Path
from jobs.serve import serve
sys.exit(serve(Path(sys.argv[1]), dagster_port=int(sys.argv[2]), mlflow_port=int(sys.argv[3])))
"""

LAUNCH = """mutation Launch($job: String!) { launchRun(executionParams: {selector: {repositoryLocationName: "foundry",
    repositoryName: "__repository__", pipelineName: $job}, mode: "default", runConfigData: "{}"})
    { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


@dataclass
class Up:
    """A running `foundry up`."""

    home: Path
    dagster: str
    mlflow: str
    process: subprocess.Popen[str]

    def launch(self, job: str) -> str:
        """Start a run as our own page does; return its id."""
        answer = httpx.post(
            f"{self.dagster}/graphql",
            json={"query": LAUNCH, "variables": {"job": job}},
            headers={"Origin": self.dagster, "Sec-Fetch-Site": "same-origin"},
            timeout=60,
        ).json()
        return str(answer["data"]["launchRun"]["run"]["runId"])

    def runs(self) -> dict[str, dg.DagsterRunStatus]:
        """The instance's runs, read from its files."""
        with instance(self.home) as opened:
            return {run.run_id: run.status for run in opened.get_runs()}

    def wait_for(self, run_id: str, status: dg.DagsterRunStatus, timeout_s: float = 60) -> None:
        """Wait until a run has a status."""
        with instance(self.home) as opened:
            wait_until(lambda: opened.get_run_by_id(run_id).status is status, timeout_s)

    def processes(self) -> set[int]:
        """All processes that this workspace's services started, by their environment."""
        marked = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"FOUNDRY_HOME={self.home}\0".encode() in path.read_bytes():
                    marked.add(int(path.parent.name))
        return marked


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def start_up(home: Path, code: Path) -> Up:
    """Start `foundry up` in the background as a shell script does: with SIGINT ignored."""
    ports = free_ports(2)
    process = subprocess.Popen(
        [
            "sh",
            "-c",
            'trap "" INT; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            UP,
            str(home),
            *map(str, ports),
        ],
        env={k: v for k, v in os.environ.items() if k not in ("FOUNDRY_HOME", "DAGSTER_HOME")}
        | {"PYTHONPATH": str(code)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Up(home, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", process)
