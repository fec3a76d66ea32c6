"""A process per device that works off batches. One that dies is started again, and its batch tried
again.

A process is a fresh interpreter that talks over a socket. Batches and results are pickled: both
sides run the same code for the same user.
"""

import contextlib
import multiprocessing.connection
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from training.errors import WorkerLostError

Batch = TypeVar("Batch")
Result = TypeVar("Result")

AHEAD = 2
"""Batches that a worker has at a time: the one that it works on, and those that wait."""
ATTEMPTS = 3
"""Workers that may die at one batch, or before they are ready, until the map fails."""
_END_S = 5.0
"""How long workers may take to end by themselves, seconds; all together."""
_MAX_NAME = 200
_READY, _DONE, _RAISED = "ready", "done", "raised"


@dataclass(slots=True)
class _Task(Generic[Batch]):
    number: int
    batch: Batch
    deaths: list[str] = field(default_factory=list)
    """How each worker ended that died at this batch."""


class ProcessPool(Generic[Batch, Result]):
    """One worker process per device."""

    def __init__(
        self,
        name: str,
        make: Callable[..., Callable[[Batch], Result]],
        arguments: tuple[Any, ...],
        devices: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        """Start the processes; they load while the caller goes on.

        Args:
            name: What the work is, for messages.
            make: See `WorkerSpec`.
            arguments: See `WorkerSpec`.
            devices: One process each; the same device may occur more than once.
            say: Told when a process was lost.
        """
        self._name, self._say = name, say
        self._request = pickle.dumps((make, arguments))
        self._failed_starts = 0
        self._workers: list[_Process[Batch]] = []
        for device in devices:
            self._workers.append(_Process(self._request, device))

    def map(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """See `Workers.map`. At most `2 * AHEAD` batches per worker are taken from `batches` and
        not yet given out."""
        source = enumerate(batches)
        returned: deque[_Task[Batch]] = deque()
        done: dict[int, Result] = {}
        num_given_out, num_taken, window = 0, 0, 2 * AHEAD * len(self._workers)
        try:
            while True:
                while worker := self._with_room():
                    if returned:
                        worker.give(returned.popleft())
                    elif num_taken < num_given_out + window and (item := next(source, None)):
                        num_taken += 1
                        worker.give(_Task(*item))
                    else:
                        break
                if num_given_out in done:
                    yield done.pop(num_given_out)
                    num_given_out += 1
                    continue
                if not any(worker.has_work for worker in self._workers):
                    return
                for task, result in self._answers(returned):
                    done[task.number] = result
        finally:
            for worker in self._workers:
                worker.abandon()

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        deadline = time.monotonic() + _END_S
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.end(patience_s=max(deadline - time.monotonic(), 0.0))
        self._workers.clear()

    def _with_room(self) -> "_Process[Batch] | None":
        """The worker with the fewest batches, if it can take one more."""
        worker = min(self._workers, key=lambda one: len(one.tasks))
        return worker if len(worker.tasks) < AHEAD else None

    def _answers(self, returned: deque[_Task[Batch]]) -> Iterator[tuple[_Task[Batch], Result]]:
        """Wait for workers to answer; the batches of one that died are put into `returned`."""
        by_channel = {worker.channel: worker for worker in self._workers}
        for channel in multiprocessing.connection.wait(list(by_channel)):
            worker = by_channel[channel]  # type: ignore[index]
            try:
                kind, value = pickle.loads(worker.channel.recv_bytes())  # noqa: S301 - our own code
            except (EOFError, OSError):
                returned.extendleft(reversed(self._replace(worker)))
                continue
            if kind == _READY:
                worker.is_ready, self._failed_starts = True, 0
                continue
            task = worker.tasks.popleft() if worker.is_ready else None
            if kind == _RAISED and (task is not None or not worker.is_ready):
                raise value
            if task is not None:
                yield task, value

    def _replace(self, worker: "_Process[Batch]") -> list[_Task[Batch]]:
        """Start another process in the place of one that died; returns the batches it had.

        Only the batch that it worked on counts the death.

        Raises:
            WorkerLostError: that was once too often.
        """
        how = worker.end(patience_s=_END_S)
        self._workers[self._workers.index(worker)] = _Process(self._request, worker.device)
        where = f"{worker.device} of {socket.gethostname()}"
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise WorkerLostError(
                    f"{self._name}: a worker on {where} did not start: {how}, {ATTEMPTS} times"
                )
            self._say(f"{self._name}: a worker on {where} did not start ({how}); starting another")
        elif worker.tasks and (task := worker.tasks[0]) is not None:
            task.deaths.append(how)
            name = f"batch {task.number} ({str(task.batch)[:_MAX_NAME]})"
            if len(task.deaths) >= ATTEMPTS:
                raise WorkerLostError(
                    f"{self._name}: {name}: its worker on {where} died {ATTEMPTS} times: "
                    f"{', '.join(task.deaths)}"
                )
            self._say(f"{self._name}: the worker on {where} died at {name} ({how}); trying again")
        return [task for task in worker.tasks if task is not None]


class _Process(Generic[Batch]):
    """One process, the socket to it, and the batches that it has."""

    def __init__(self, request: bytes, device: str) -> None:
        self.device = device
        self.is_ready = False
        self.tasks: deque[_Task[Batch] | None] = deque()
        """In the order in which they are worked off; None for one that no one waits for."""
        ours, theirs = socket.socketpair()
        self.channel = Connection(ours.detach())
        paths = [path or os.getcwd() for path in sys.path]
        code = (
            f"import sys; sys.path[:] = {paths!r}; "
            f"from resources.engine.processes import serve; serve({theirs.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the caller; a worker ends when its socket closes.
        )
        theirs.close()
        with contextlib.suppress(OSError):  # It died at once, which the next wait sees.
            self.channel.send_bytes(request)
            self.channel.send_bytes(device.encode())

    @property
    def has_work(self) -> bool:
        """Whether it has a batch that somebody waits for."""
        return any(task is not None for task in self.tasks)

    def give(self, task: _Task[Batch]) -> None:
        """Send a batch. Its process reads at any time, so this does not wait for it."""
        message = pickle.dumps(task.batch)
        self.tasks.append(task)
        with contextlib.suppress(OSError):  # It died, which the next wait sees.
            self.channel.send_bytes(message)

    def abandon(self) -> None:
        """Wait for none of its batches any more."""
        self.tasks = deque([None] * len(self.tasks))

    def ask_to_end(self) -> None:
        """Close the socket: the process ends as soon as it notices."""
        self.channel.close()

    def end(self, patience_s: float) -> str:
        """Kill the process, unless it ends by itself in time; how it ended."""
        for wait_s in (patience_s, _END_S):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=wait_s)
                break
            self._process.kill()
        self.channel.close()
        status = self._process.returncode
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-status).name}"
        return f"exit status {status}"


def serve(descriptor: int) -> None:
    """Body of a worker process: make the worker, then work off batches until the caller closes its
    end."""
    channel = Connection(descriptor)
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, inbox), daemon=True).start()
    request, device = inbox.get(), inbox.get()
    if request is None or device is None:
        return
    try:
        make, arguments = pickle.loads(request)  # noqa: S301 - our own code
        worker = make(*arguments, device.decode())
    except Exception as error:
        _send(channel, _RAISED, _told(error))
        return
    _send(channel, _READY, None)
    with contextlib.closing(worker):
        while (message := inbox.get()) is not None:
            try:
                answer = _DONE, worker(pickle.loads(message))  # noqa: S301 - our own code
            except Exception as error:
                answer = _RAISED, _told(error)
            _send(channel, *answer)


def _receive(channel: Connection, inbox: "queue.SimpleQueue[bytes | None]") -> None:
    """Read at any time, so that the caller never waits for a batch to be done before it can send
    the next."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(channel.recv_bytes())
    inbox.put(None)


def _send(channel: Connection, kind: str, value: Any) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # No one waits for it.
        channel.send_bytes(pickle.dumps((kind, value)))


def _told(error: Exception) -> Exception:
    """The error as the caller can have it: with the trace that is lost on the way, and as another
    type where its own cannot travel."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
