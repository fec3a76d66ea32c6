"""Progress of long work: the library reports, whoever started it listens."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int, str], None]
"""Called with what is counted, how many are done, how many there are, and a note such as the bytes written."""

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
