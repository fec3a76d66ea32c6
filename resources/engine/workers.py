"""Runs a worker over batches on the devices held: in this process for one, else one worker process
per device."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_worker: Callable[[Any], Any] | None = None


def run(
    worker: Callable[..., Callable[[Batch], Result]],
    arguments: Sequence[Any],
    batches: Iterable[Batch],
    devices: Sequence[str],
) -> Iterator[Result]:
    """Yield `worker(*arguments, device)(batch)` for every batch, in the order of the batches.

    Args: worker: Class (or function) that loads its models once and is then called with batches;
        importable by name. arguments: What it is made from, before the device. batches: Work; each
        goes to one worker whole. devices: One worker per entry; a single entry works in this
        process.
    """
    if len(devices) == 1:
        ready = worker(*arguments, devices[0])
        for batch in batches:
            yield ready(batch)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    with ProcessPoolExecutor(
        len(devices), context, _start, (worker, tuple(arguments), queue)
    ) as pool:
        waiting: list[Future[Result]] = []
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * len(devices):
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _start(
    worker: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], queue: Any
) -> None:
    global _worker  # noqa: PLW0603 - one worker per process, made once
    _worker = worker(*arguments, queue.get())


def _work(batch: Any) -> Any:
    assert _worker is not None
    return _worker(batch)
