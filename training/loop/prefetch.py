"""Makes the next batches in a thread while the present one trains, and sends them to the device
ahead of their use."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over `make(item)` that stays several items ahead; a context manager that drops
    what is left."""

    def __init__(
        self, make: Callable[[Any], T], items: Iterable[Any], worker: ThreadPoolExecutor, depth: int
    ) -> None:
        """Start making the first items.

        Args:
            make: Called in the worker's thread, for one item after the other.
            items: In order.
            worker: Of one thread.
            depth: Items that are made or waiting at most.
        """
        self.waited_s = 0.0
        """Seconds that callers of `next` have waited so far."""
        self._make, self._items, self._worker = make, iter(items), worker
        self._ahead = deque[Future[T]]()
        for _ in range(depth):
            self._submit()

    def __enter__(self) -> "Prefetch[T]":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the item in work and drop it and all others."""
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)

    def __next__(self) -> T:
        """The next result, in order; what `make` raised is raised here.

        Raises:
            StopIteration: there are no more items.
        """
        if not self._ahead:
            raise StopIteration
        began = monotonic()
        result = self._ahead[0].result()
        self._ahead.popleft()
        self.waited_s += monotonic() - began
        self._submit()
        return result

    def _submit(self) -> None:
        for item in self._items:
            self._ahead.append(self._worker.submit(self._make, item))
            return


class Sender:
    """Tensors on their way to a GPU: pinned, copied by a stream of their own. On a CPU they stay
    where they are."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that the device can read by itself."""
        return tensor if self._stream is None or tensor.is_pinned() else tensor.pin_memory()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor; it is there once `receive` has been called after the copies."""
        if self._stream is None:
            return tensor
        with torch.cuda.stream(self._stream):
            return self.pin(tensor).to(self._device, non_blocking=True)

    def sent(self) -> torch.cuda.Event | None:
        """A mark behind all copies that were begun so far."""
        return None if self._stream is None else self._stream.record_event()

    def receive(self, mark: torch.cuda.Event | None, tensors: Iterable[torch.Tensor]) -> None:
        """Let what this thread queues from now on read the tensors, without waiting for them on the
        host."""
        if mark is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_event(mark)
            for tensor in tensors:
                tensor.record_stream(present)


@dataclass(slots=True)
class StageTimes:
    """Seconds that each stage of making batches has taken."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block."""
        began = monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - began
