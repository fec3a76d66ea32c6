"""Decoding in worker processes that may hang, crash or run out of memory: each costs one image,
never the run.

A worker is a fresh interpreter that talks over a socket: requests and answers are JSON, pixels and
the content of images that lie in no file of their own are raw bytes, so that nothing from a hostile
image is ever unpickled here.
"""

import contextlib
import hashlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from training.errors import PipelineError
from training.images import decoding, measures
from training.images.measures import Facts

if TYPE_CHECKING:
    from training.config.workspace import DecodeConfig

_START_S = 120.0
"""Longest start of a worker, seconds: an interpreter, NumPy and Pillow on a busy machine."""
_ORPHAN_S = 15.0
"""A worker whose parent died in the middle of an image ends itself this long after the time limit,
seconds."""
_MAX_MESSAGE_BYTES = 1_000_000
_CHUNK_BYTES = 65_536

Opened = Path | bytes
"""A file, or the content of one that has no path of its own, such as a member of an archive."""
ImageFile = Opened | Callable[[], Opened]
"""What is decoded: opened, or opened by a thread of the pool when its turn comes, so that the content
of no more than a few images is held at a time. Opening may raise `decoding.Unusable`, which costs
that one image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why one file did not become an image; fields as in `rejected_images`."""

    reason: str
    """A value of `tables.Reason`."""
    value: str | None = None
    limit: str | None = None
    detail: str | None = None
    image_id: str | None = None
    """None when the bytes were never read."""


class DecodePool:
    """Worker processes that decode images; a context manager.

    Answers come in the order of the files, and no more than a few images are under way at a time,
    so memory does not grow with their number.
    """

    def __init__(self, config: "DecodeConfig") -> None:
        """`config` gives limits and number of workers."""
        self._config = config
        self._closed = False
        self._workers: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="decode")

    def __enter__(self) -> "DecodePool":
        """Start the workers; they load while the caller goes on."""
        for _ in range(self._config.num_workers):
            self._idle.put(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all workers, whatever they are doing."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._workers):
            worker.end()

    def facts(self, files: Iterable[ImageFile]) -> Iterator[Facts | Rejection]:
        """Decode and measure each file; pixels never leave the workers."""
        requests = (_Request(file, "facts") for file in files)
        for answer in self._stream(requests, ahead=4 * self._config.num_workers):
            assert not isinstance(answer, np.ndarray)
            yield answer

    def pixels(
        self, files: Iterable[ImageFile], image_ids: Iterable[str] | None = None
    ) -> Iterator[np.ndarray | Rejection]:
        """Decode each file.

        Args:
            files: Paths, contents, or what opens to either.
            image_ids: What the bytes of each must hash to; a file that was replaced since is
                rejected as `changed_while_read`. None: not checked.

        Returns:
            (H, W, 3) uint8 upright sRGB, or why not, in order.
        """
        if image_ids is None:
            requests = (_Request(file, "pixels") for file in files)
        else:
            requests = (
                _Request(file, "pixels", image_id)
                for file, image_id in zip(files, image_ids, strict=True)
            )
        for answer in self._stream(requests, ahead=self._config.num_workers + 1):
            assert not isinstance(answer, Facts)
            yield answer

    def _stream(
        self, requests: Iterable["_Request"], ahead: int
    ) -> Iterator[Facts | Rejection | np.ndarray]:
        pending: deque[Future[Facts | Rejection | np.ndarray]] = deque()
        try:
            for request in requests:
                pending.append(self._threads.submit(self._ask, request))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _start(self) -> "_Worker":
        worker = _Worker(self._config)
        self._workers.add(worker)
        if self._closed:
            worker.kill()
        return worker

    def _ask(self, request: "_Request") -> Facts | Rejection | np.ndarray:
        """Open one image and have it done by an idle worker; a worker that is lost is replaced."""
        try:
            opened = request.file() if callable(request.file) else request.file
            if isinstance(opened, bytes):
                decoding.check_length(len(opened), self._config)
        except decoding.Unusable as unusable:
            return _rejection(unusable)
        worker = self._idle.get()
        try:
            while True:
                try:
                    return worker.ask(request, opened)
                except _DeadBefore:  # It ended between two images: not this one's fault.
                    worker = self._replace(worker)
                except TimeoutError:
                    worker = self._replace(worker)
                    limit = f"{self._config.timeout_s:g} s"
                    return Rejection(
                        reason="decode_timeout", value=f"more than {limit}", limit=limit
                    )
                except (EOFError, OSError, ValueError) as error:
                    status = worker.end(patience_s=2.0)
                    worker = self._replace(worker)
                    return Rejection(
                        reason="decode_crashed",
                        value=_how_it_ended(status),
                        detail=str(error) or None,
                    )
        finally:
            self._idle.put(worker)

    def _replace(self, worker: "_Worker") -> "_Worker":
        worker.end()
        self._workers.discard(worker)
        if self._closed:
            raise PipelineError("the decoding pool was closed while images were under way")
        return self._start()


class _Request(NamedTuple):
    """What is wanted of one image."""

    file: ImageFile
    want: str
    """`facts` or `pixels`."""
    image_id: str | None = None
    """What its bytes must hash to; None for anything."""


class _DeadBefore(Exception):  # noqa: N818 - a state of the worker, handled in this module.
    """The worker was gone before it got the request."""


class _Worker:
    """One process and the socket to it; used by one thread at a time."""

    def __init__(self, config: "DecodeConfig") -> None:
        self._config = config
        self._ready = False
        self._socket, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        limits = json.dumps(asdict(config))
        code = (
            f"import sys; sys.path.insert(0, {package_root!r}); "
            f"from training.images.decode_pool import serve; serve({theirs.fileno()}, {limits!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent: a worker ends when its socket closes.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()

    def ask(self, request: _Request, opened: Opened) -> Facts | Rejection | np.ndarray:
        """Send a request, with the content where there is no path to it, and wait for its answer,
        no longer than the time limit."""
        self._await_start()
        deadline = time.monotonic() + self._config.timeout_s
        where = {"num_bytes": len(opened)} if isinstance(opened, bytes) else {"path": str(opened)}
        message = {"want": request.want, "image_id": request.image_id, **where}
        try:
            _send(self._socket, message, deadline)
        except (BrokenPipeError, ConnectionResetError):
            raise _DeadBefore from None
        if isinstance(opened, bytes):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(opened)
        answer = _receive(self._socket, deadline)
        if "rejection" in answer:
            return Rejection(**answer["rejection"])
        if "facts" in answer:
            return Facts(**answer["facts"])
        height, width = (int(side) for side in answer["size"])
        if not 0 < height * width <= self._config.max_pixels:
            raise ValueError(f"worker announced {height}x{width} px")
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        _receive_into(self._socket, pixels.data.cast("B"), deadline)
        return pixels

    def _await_start(self) -> None:
        if self._ready:
            return
        try:
            _receive(self._socket, time.monotonic() + _START_S)
        except (EOFError, OSError) as error:
            ended = _how_it_ended(self.end(patience_s=2.0))
            raise PipelineError(
                f"a decoding worker did not start: {ended} ({error or 'no answer'})"
            ) from None
        self._ready = True

    def kill(self) -> None:
        """End the process, from any thread; who waits for its answer gets EOFError."""
        self._process.kill()

    def end(self, patience_s: float = 0.0) -> int | None:
        """Kill the process, unless it ends by itself in time, and close the socket.

        Returns:
            Its exit status; None when even killing takes longer than a few seconds.
        """
        for wait_s in (patience_s, 5.0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=wait_s)
            self._process.kill()
        self._socket.close()
        return self._process.returncode


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


def _send(channel: socket.socket, message: dict[str, Any], deadline: float | None) -> None:
    data = json.dumps(message).encode()
    channel.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
    channel.sendall(len(data).to_bytes(4, "big") + data)


def _receive(channel: socket.socket, deadline: float | None) -> dict[str, Any]:
    """One JSON message.

    Raises:
        TimeoutError: it is not whole at the deadline (`time.monotonic()`; None waits permanently).
        EOFError: the other side closed.
        ValueError: it is no message.
    """
    head = bytearray(4)
    _receive_into(channel, memoryview(head), deadline)
    length = int.from_bytes(head, "big")
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {length} bytes announced")
    body = bytearray(length)
    _receive_into(channel, memoryview(body), deadline)
    return cast(dict[str, Any], json.loads(body))


def _receive_into(channel: socket.socket, view: memoryview, deadline: float | None) -> None:
    while len(view):
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        channel.settimeout(remaining)
        count = channel.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]


def _receive_content(channel: socket.socket, count: int) -> bytes:
    """The content of an image, in one object of its size: without a second copy, as from a file.

    Raises:
        EOFError: the other side closed.
        MemoryError: there is no room for it. It is taken off the socket all the same, so that the
            next request is read from its beginning.
    """
    data, num_read = b"", 0
    try:
        while num_read < count:
            # One call fills it, but for content beyond 2 GB: the system's limit of a call.
            more = channel.recv(count - num_read, socket.MSG_WAITALL)
            if not more:
                raise EOFError
            num_read += len(more)
            data += more
    except MemoryError:
        while num_read < count:
            skipped = len(channel.recv(min(_CHUNK_BYTES, count - num_read)))
            if not skipped:
                raise EOFError from None
            num_read += skipped
        raise
    return data


def serve(descriptor: int, limits: str) -> None:
    """Body of a worker process: answer requests until the parent closes its end."""
    config = cast("DecodeConfig", SimpleNamespace(**json.loads(limits)))
    channel = socket.socket(fileno=descriptor)
    _limit_memory(config.memory_bytes)
    with contextlib.suppress(EOFError, OSError):
        _send(channel, {"ready": True}, None)
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 2
        )  # Decoders in C write their complaints to stderr.
        while True:
            request = _receive(channel, None)
            # The default action of SIGALRM ends the process, even in the middle of a decoder's C
            # code.
            signal.setitimer(signal.ITIMER_REAL, config.timeout_s + _ORPHAN_S)
            answer, pixels = _answer(request, channel, config)
            _send(channel, answer, None)
            if pixels is not None:
                channel.sendall(pixels.data.cast("B"))
            del pixels
            signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(more_bytes: int) -> None:
    """Cap the address space at what is in use now plus `more_bytes`; where the system can tell
    (Linux)."""
    with contextlib.suppress(FileNotFoundError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        cap = pages * resource.getpagesize() + int(more_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))


def _answer(
    request: dict[str, Any], channel: socket.socket, config: "DecodeConfig"
) -> tuple[dict[str, Any], np.ndarray | None]:
    """What to say of one image, and its pixels when they were asked for."""
    image_id = None
    try:
        if "path" in request:
            data = decoding.read_file(Path(request["path"]), config)
        else:
            data = _receive_content(channel, request["num_bytes"])
        image_id = hashlib.sha256(data).hexdigest()
        if request["image_id"] not in (None, image_id):
            raise decoding.Unusable("changed_while_read", value=image_id, limit=request["image_id"])
        decoded = decoding.decode(data, config)
        if request["want"] == "pixels":
            del data
            return {"size": decoded.pixels.shape[:2]}, decoded.pixels
        return {"facts": asdict(measures.measure(data, image_id, decoded))}, None
    except decoding.Unusable as unusable:
        found = unusable
    except MemoryError:
        found = decoding.out_of_memory(config)
    return {"rejection": asdict(_rejection(found, image_id))}, None


def _rejection(unusable: decoding.Unusable, image_id: str | None = None) -> Rejection:
    return Rejection(
        reason=unusable.reason,
        value=unusable.value,
        limit=unusable.limit,
        detail=unusable.detail,
        image_id=image_id,
    )
