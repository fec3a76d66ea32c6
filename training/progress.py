"""Progress of long work: the library reports, whoever started it listens."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int, str], None]
"""Called with what is counted, how many are done, how many there are, and a note such as the bytes
written."""

_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Send all reports of this process to `listener` until the returned function is called."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def report(what: str, done: int, total: int, note: str = "") -> None:
    """Tell the listeners that `done` of `total` are finished."""
    for listener in _listeners:
        listener(what, done, total, note)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items`, reporting after each."""
    report(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, total)


@contextlib.contextmanager
def told(say: Callable[[str], None], *, every_s: float = 30.0) -> Iterator[None]:
    """Say in a line, at most every `every_s` seconds, how far the work within has come: for logs,
    which have no bars.

    Rate and time left are counted from the first report on.
    """
    began = last = time.monotonic()
    counted, at_first = "", 0

    def hear(what: str, done: int, total: int, note: str) -> None:
        nonlocal began, last, counted, at_first
        now = time.monotonic()
        if what != counted:
            began, counted, at_first = now, what, done
        if now - last < every_s or now == began:
            return
        last, rate = now, (done - at_first) / (now - began)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        say(f"{done} of {total} {what}, {rate:.3g}/s{left}{', ' + note if note else ''}")

    unlisten = listen(hear)
    try:
        yield
    finally:
        unlisten()
