"""`foundry up`: Dagster and MLflow of one workspace, on 127.0.0.1 behind the guard, until Ctrl-C.

Four children, each in a session of its own: a code server that webserver and daemon share, the two,
and MLflow. This process starts, watches and ends them; when it dies by kill -9, the kernel tells
each child, which takes its own process group with it. A trainer is a session of its own and
outlives all of them.
"""

import contextlib
import ctypes
import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from resources import torchrun
from training.commit import full_disk, lock
from training.errors import ConfigError, PipelineError

HOST = "127.0.0.1"
START_TIMEOUT_S = 180
"""How long the pages may take to answer, seconds; 10 is usual on two cores."""
STOP_TIMEOUT_S = 15
"""How long children may take to end before they are killed, seconds."""
FIRST_PAGES = {"Dagster": "asset-groups", "MLflow": ""}
"""The asset graph, and MLflow's page, which `resources.mlflow.page` opens on the workspace's
runs."""
LAST_LINES = 12
"""How much of a dead child's log is shown."""
PR_SET_PDEATHSIG = 1

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ports(NamedTuple):
    """Where the pages are."""

    dagster: int
    mlflow: int


def serve(home: Path, *, dagster_port: int = 3000, mlflow_port: int = 5000) -> int:
    """Serve the workspace's pages until a signal asks to stop or a child ends by itself.

    Returns:
        Exit status: 0 after a signal, 1 after a child's end.

    Raises:
        ConfigError: a port cannot be used.
        LockedError: the workspace is served already.
    """
    home = home.resolve()
    with lock(home / "locks" / "up.lock", f"`foundry up` on {home}", wait_s=0):
        _check_port(dagster_port, "Dagster", "--port")
        _check_port(mlflow_port, "MLflow", "--mlflow-port")
        with _signals() as asked, tempfile.TemporaryDirectory(prefix="foundry-") as sockets:
            children = _Children(
                home, Ports(dagster_port, mlflow_port), Path(sockets) / "code.sock"
            )
            try:
                for name in CHILDREN:
                    children.start(name)
                return _watch(children, asked, {"Dagster": dagster_port, "MLflow": mlflow_port})
            finally:
                children.stop(asked)
                for folder in sorted((home / "runs").glob("*/")):
                    if torchrun.is_running(folder):
                        follow = (
                            f"foundry train --home {shlex.quote(str(home))} --run {folder.name}"
                        )
                        print(
                            f"Training run {folder.name} goes on; follow it with `{follow}`",
                            flush=True,
                        )


class _Children:
    """The processes of one `foundry up`."""

    def __init__(self, home: Path, ports: Ports, code_socket: Path):
        self._home = home
        self._ports = ports
        self._socket = code_socket
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start one of `CHILDREN`."""
        arguments = [name, self._home, *self._ports, self._socket, os.getpid()]
        with self._log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                # -P: the folder that the user happens to be in is no place to import from.
                [sys.executable, "-P", "-m", "jobs.serve", *map(str, arguments)],
                cwd=self._home,
                env=os.environ
                | {"FOUNDRY_HOME": str(self._home), "DAGSTER_HOME": str(self._home / "dagster")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ended(self) -> str | None:
        """Which child has ended by itself and what it said last, or None."""
        for name, process in self._running.items():
            if (status := process.poll()) is not None:
                said = f"{name} ended by itself (status {status}), so all is stopped"
                if full := full_disk(self._home):  # so that its log may lack the reason
                    return f"{said}: {full}"
                lines = self._log(name).read_text(errors="replace").splitlines()[-LAST_LINES:]
                return "\n  ".join([f"{said}; {self._log(name)} ends with:", *lines])
        return None

    def _log(self, name: str) -> Path:
        return self._home / "dagster" / f"{name.replace(' ', '_').lower()}.log"

    def stop(self, asked: list[int]) -> None:
        """End all children and what they started; a second Ctrl-C does not wait for them."""
        patience = len(asked) + 1
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self._signal(signal.SIGTERM)
        while any(_group_lives(process) for process in self._running.values()):
            if time.monotonic() > deadline or len(asked) > patience:
                break
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        for process in self._running.values():
            process.wait()

    def _signal(self, number: int) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether the child, or a run that it started, is still there."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _watch(children: _Children, asked: list[int], ports: dict[str, int]) -> int:
    """Wait until the pages answer, say where they are, and wait for the end."""
    waiting = dict(ports)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not asked:
        if ended := children.ended():
            print(ended, file=sys.stderr, flush=True)
            return 1
        if waiting and time.monotonic() > deadline:
            print(
                f"{', '.join(waiting)} did not answer within {START_TIMEOUT_S} s",
                file=sys.stderr,
                flush=True,
            )
            return 1
        if waiting:
            waiting = {name: port for name, port in waiting.items() if not _answers(port)}
            if not waiting:
                for name, port in ports.items():
                    print(f"{name:8}http://{HOST}:{port}/{FIRST_PAGES[name]}", flush=True)
                print("Ctrl-C stops both.", flush=True)
        time.sleep(0.2)
    return 0


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _check_port(port: int, name: str, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} for {name} cannot be used ({error}); choose another: `foundry up {option} PORT`"
            ) from None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop; a shell that starts us with `&` has SIGINT ignored,
    which ends here."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_server(home: Path, ports: Ports, code_socket: Path) -> None:
    from dagster._cli.api import grpc_command

    from resources.applications import LOCATION
    from resources.instance import instance

    with instance(home):
        pass  # creates the databases, which several processes at once could not: the others wait for the socket
    # Imported by name, because imports point the other way; before Dagster does, because its error
    # hides the cause.
    root = Path(str(import_module("jobs.definitions").__file__)).parents[1]
    arguments = [
        "--socket",
        str(code_socket),
        "--location-name",
        LOCATION,
        "--log-level",
        "warning",
    ]
    arguments += ["--module-name", "jobs.definitions", "--working-directory", str(root)]
    grpc_command.main(arguments, standalone_mode=False)


def _webserver(home: Path, ports: Ports, code_socket: Path) -> None:
    from resources.applications import dagster_application

    _wait_for(code_socket)
    with dagster_application(code_socket, ports.dagster, mlflow_port=ports.mlflow) as application:
        _run_uvicorn(application, ports.dagster)


def _daemon(home: Path, ports: Ports, code_socket: Path) -> None:
    import dagster as dg
    from dagster._daemon.controller import daemon_controller_from_instance
    from dagster._utils.interrupts import capture_interrupts, setup_interrupt_handlers

    from resources.applications import code_location

    _wait_for(code_socket)
    setup_interrupt_handlers()
    with (
        contextlib.suppress(KeyboardInterrupt),
        capture_interrupts(),
        dg.DagsterInstance.get() as instance,
        daemon_controller_from_instance(
            instance, code_location(code_socket), log_level="error"
        ) as controller,
    ):
        controller.check_daemon_loop()


def _mlflow(home: Path, ports: Ports, code_socket: Path) -> None:
    from resources.applications import mlflow_application

    _run_uvicorn(mlflow_application(home, ports.mlflow, dagster_port=ports.dagster), ports.mlflow)


CHILDREN: dict[str, Callable[[Path, Ports, Path], None]] = {
    "code server": _code_server,
    "Dagster": _webserver,
    "daemon": _daemon,
    "MLflow": _mlflow,
}


def _run_uvicorn(application: object, port: int) -> None:
    import uvicorn

    uvicorn.run(
        application,  # type: ignore[arg-type]
        host=HOST,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        timeout_graceful_shutdown=2,
    )


def _wait_for(code_socket: Path) -> None:
    """Wait for the code server; `foundry up` ends us when it ends."""
    while True:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(code_socket))
            return
        time.sleep(0.1)


def _die_with(parent: int, sockets: Path) -> None:
    """End this process and all that it started when `parent` ends, even by kill -9."""

    def end(*_: object) -> None:
        shutil.rmtree(sockets, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGHUP, end)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:
        end()


def main(
    name: str, home: str, dagster_port: str, mlflow_port: str, code_socket: str, parent: str
) -> None:
    """What a child process does."""
    _die_with(int(parent), Path(code_socket).parent)
    try:
        CHILDREN[name](Path(home), Ports(int(dagster_port), int(mlflow_port)), Path(code_socket))
    except PipelineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
