"""Starts the trainer as a process session of its own, follows its event log, and asks it to stop.

The trainer outlives whoever started it; another process attaches to it by its lock and its log.
Several ranks run under torchrun, one runs by itself. Free of torch.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from resources import devices
from training.commit import full_disk
from training.errors import TrainingError
from training.runs import run_folder
from training.runs.event_log import ENDINGS, OPENINGS, Event, has_finished, parse_line

POLL_S = 0.2
# torchrun kills after this what it asked to end; a checkpoint of a large model is written
# meanwhile.
_SHUTDOWN_TIMEOUT_S = 3600
_HOLDER = re.compile(r"pid (\d+) on (\S+) since")


def is_running(folder: Path) -> bool:
    """Whether a trainer holds the run's lock."""
    path = folder / run_folder.LOCK
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            # Shared, so that two who ask at once do not take each other for the trainer.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class _Standby:
    """A trainer that imports its libraries, seconds of work, before it is known what it trains."""

    def __init__(self) -> None:
        """Start it, in a session of its own."""
        self._trains = False
        # Whole messages, and an end of file when this process ends, however it does.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.loop.run", "--wait", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, pass_fds=(theirs.fileno(),), env=_environment(1),
            )  # fmt: skip

    def train(self, folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes] | None:
        """Tell it its run; None where it has ended, of which an ordinary start tells the reason."""
        try:
            socket.send_fds(self._socket, [os.fsencode(folder.resolve())], [output.fileno()])
        except OSError:
            return None
        self._trains = True
        return self._process

    def close(self) -> None:
        """Let it go: it ends at once unless it trains."""
        self._socket.close()
        if not self._trains:
            self._process.kill()
            self._process.wait()


_standby: list[_Standby] = []
"""At most one: Dagster's run, which takes it, is in this process and knows nothing of it."""


@contextlib.contextmanager
def standing_by(folder: Path, num_processes: int) -> Iterator[None]:
    """Let a trainer import its libraries while this process still checks and writes what it will
    train on.

    Nothing is started where it would not be of use: for a run that is finished or being trained,
    for several ranks, and on a machine with cards, whose trainer may see the chosen ones only, from
    its start.

    Args:
        folder: Of the run that is to be started.
        num_processes: Its ranks on this machine.
    """
    useful = (
        num_processes == 1
        and not has_finished(folder / run_folder.EVENTS)
        and not is_running(folder)
    )
    if not useful or devices.has_cards():
        yield
        return
    _standby.append(_Standby())
    try:
        yield
    finally:
        _standby.pop().close()


class TrainerHandle:
    """A trainer that was started here, or one found running."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None, offset: int) -> None:
        """Made by `start_or_attach`: the run's folder, what was started here, and where its log
        lines begin."""
        self.folder = folder
        self.process = process
        self._offset = offset
        self._last: Event | None = None

    def is_alive(self) -> bool:
        """Whether what was started here or the holder of the lock still runs."""
        started_here = self.process is not None and self.process.poll() is None
        return started_here or is_running(self.folder)

    def events(self) -> Iterator[Event]:
        """Yield the lines of this attempt, those already written first, until the trainer has
        ended."""
        while True:
            # Asked before reading: what was written before the end is read in the same round.
            alive = self.is_alive()
            yield from self._read_new()
            if not alive:
                return
            time.sleep(POLL_S)

    def wait(self) -> Event:
        """Wait for the end and return how it ended: a `finished`, `stopped` or `failed` line.

        A trainer that was killed wrote none; for it a `failed` one is made here, and not logged.
        """
        for _ in self.events():
            pass
        if self._last is not None and self._last["event"] in ENDINGS:
            return self._last
        samples_seen = 0 if self._last is None else self._last["samples_seen"]
        reason = full_disk(self.folder) or (
            f"the trainer ended without a last line; see {self.folder / run_folder.OUTPUT}{self._output_tail()}"
        )
        return {"event": "failed", "samples_seen": samples_seen, "reason": reason}

    def stop(self) -> Event:
        """Ask the trainer to save and stop, wait until it has, and return how it ended.

        Raises:
            TrainingError: it runs on another machine.
        """
        holder = (
            _HOLDER.match(_read_text(self.folder / run_folder.LOCK))
            if is_running(self.folder)
            else None
        )
        if holder is not None:
            if holder[2] != socket.gethostname():
                raise TrainingError(
                    f"run {self.folder.name} is trained on {holder[2]}, stop it there: kill {holder[1]}"
                )
            # Rank 0 alone: all ranks agree on its wish, and torchrun has no deadline then.
            with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
                os.kill(int(holder[1]), signal.SIGTERM)
        elif self.process is not None:
            self.process.terminate()  # still starting: nothing to save
        return self.wait()

    def _read_new(self) -> Iterator[Event]:
        path = self.folder / run_folder.EVENTS
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole, newline, _ = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            event = parse_line(line)
            if event is not None:
                self._last = event
                yield event

    def _output_tail(self) -> str:
        lines = _read_text(self.folder / run_folder.OUTPUT).strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


def start_or_attach(
    folder: Path, num_processes: int, cards: Sequence[str] = (), locks: Sequence[int] = ()
) -> TrainerHandle:
    """Start the trainer of a run, or attach to the one that runs.

    Args:
        folder: Has `config.toml` and `inputs.json`.
        num_processes: Ranks on this machine, when it is started.
        cards: What CUDA_VISIBLE_DEVICES becomes; empty leaves it as it is.
        locks: Descriptors that the process inherits, and with them the cards, for as long as it
            lives.
    """
    if is_running(folder):
        return TrainerHandle(folder, None, _attempt_offset(folder / run_folder.EVENTS))
    command = [sys.executable, "-m"]
    if num_processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        command += ["--shutdown-timeout", str(_SHUTDOWN_TIMEOUT_S), "-m"]
    command += ["training.loop.run", str(folder.resolve())]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards else {}
    events = folder / run_folder.EVENTS
    offset = events.stat().st_size if events.is_file() else 0
    with (folder / run_folder.OUTPUT).open("ab") as output:
        early = _standby and num_processes == 1 and not cards
        process = _standby[0].train(folder, output) if early else None
        if process is None:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(locks),
                env=_environment(num_processes) | visible,
            )
    return TrainerHandle(folder, process, offset)


def _environment(num_processes: int) -> dict[str, str]:
    """Of a trainer: as many threads for each rank as there are cores for it."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _attempt_offset(path: Path) -> int:
    """Where the last attempt's lines begin in a log."""
    offset = position = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        event = parse_line(line)
        if event is not None and event["event"] in OPENINGS:
            offset = position
        position += len(line)
    return offset


def _read_text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""
