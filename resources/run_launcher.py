"""Runs that are really alive: a launcher that can tell, for runs of the code server and for those
of `foundry run`.

Dagster's default launcher cannot answer, so a crash of the daemon or of `foundry run` would leave
its runs started permanently. Some imports are private to Dagster 1.13;
tests/resources/test_run_launcher.py proves them by a real kill.
"""

import os
import signal
from pathlib import Path

import dagster as dg
import grpc  # type: ignore[import-untyped]
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

HOLDER_TAG = "foundry/holder"
"""`<pid>:<start time>` of the process that carries out a run itself."""

HEALTH_TIMEOUT_S = 20
"""How long a code server may take to answer, seconds."""


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if there is none, or only its
    remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[
        2
    ].split()  # the command before it may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])  # proc(5): field 22


def holder_tags() -> dict[str, str]:
    """Tags for a run that this process carries out: who holds it, and that no daemon starts it
    again."""
    return {HOLDER_TAG: f"{os.getpid()}:{start_time(os.getpid())}", "dagster/max_retries": "0"}


def holder_pid(run: dg.DagsterRun) -> int | None:
    """Pid of the run's holder while that very process lives, else None."""
    pid, _, started = run.tags[HOLDER_TAG].partition(":")
    return int(pid) if str(start_time(int(pid))) == started else None


def report_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Report unfinished runs of dead holders as failed, or as canceled where that was asked for.

    Returns:
        Their run ids.
    """
    dead = []
    for run in instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES)):
        if HOLDER_TAG not in run.tags or holder_pid(run) is not None:
            continue
        message = (
            f"the process that carried out this run ({HOLDER_TAG}={run.tags[HOLDER_TAG]}) has ended"
        )
        if run.status is dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message)
        else:
            instance.report_run_failed(run, message)
        dead.append(run.run_id)
    return dead


class FoundryRunLauncher(DefaultRunLauncher):
    """Starts runs on the code server, as the default does, and answers whether a run is still being
    worked on."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes: that is what it is for."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Ask the run's holder, or the code server that was told to start it.

        A server that is only slow counts as healthy: calling a living run failed would start it
        twice.
        """
        if HOLDER_TAG in run.tags:
            if pid := holder_pid(run):
                return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=str(pid))
            return CheckRunHealthResult(
                WorkerStatus.NOT_FOUND, f"its process {run.tags[HOLDER_TAG]} has ended"
            )
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            return CheckRunHealthResult(
                WorkerStatus.NOT_FOUND, "no code server was told to start it"
            )
        try:
            answer = client.can_cancel_execution(
                CanCancelExecutionRequest(run_id=run.run_id), timeout=HEALTH_TIMEOUT_S
            )
        except DagsterUserCodeUnreachableError as error:
            cause = error.__cause__
            if isinstance(cause, grpc.Call) and cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return CheckRunHealthResult(
                    WorkerStatus.RUNNING, "its code server is slow to answer"
                )
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server has ended")
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server no longer knows it")

    def terminate(self, run_id: str) -> bool:
        """Cancel a run; one that is carried out by its holder gets what Ctrl-C sends."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished or HOLDER_TAG not in run.tags:
            return bool(super().terminate(run_id))
        self._instance.report_run_canceling(run)
        pid = holder_pid(run)
        if pid is None:
            self._instance.report_run_canceled(run, "the process that carried it out has ended")
            return False
        os.kill(pid, signal.SIGINT)
        return True
