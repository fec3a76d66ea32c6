"""Makes the next batch in a thread while the present one trains."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over `make(item)` that is always one item ahead; a context manager that ends the thread."""

    def __init__(self, make: Callable[[Any], T], items: Iterable[Any]) -> None:
        """Start making the first item."""
        self.waited_s = 0.0
        """Seconds that callers of `next` have waited so far."""
        self._make, self._items = make, iter(items)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead = self._submit()

    def __enter__(self) -> "Prefetch[T]":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the item in work and drop it."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> T:
        """The next result, in order; what `make` raised is raised here.

        Raises:
            StopIteration: there are no more items.
        """
        if self._ahead is None:
            raise StopIteration
        present, began = self._ahead, monotonic()
        result = present.result()
        self.waited_s += monotonic() - began
        self._ahead = self._submit()
        return result

    def _submit(self) -> Future[T] | None:
        for item in self._items:
            return self._pool.submit(self._make, item)
        return None
