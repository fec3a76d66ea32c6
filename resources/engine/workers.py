"""The one way to map a worker over batches. It holds the devices that `[devices]` allows and runs
one worker per device: in this process where there is one, else in a process each. Who calls it
cannot tell which."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

from resources import devices
from resources.engine.processes import ProcessPool
from training.config.workspace import DevicesConfig

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
_NOTHING = object()


class Worker(Protocol[Batch_contra, Result_co]):
    """Works off one batch after the other; what it loads, it keeps for the next ones."""

    def __call__(self, batch: Batch_contra, /) -> Result_co:
        """The batch's result: a pure function of the batch, whichever worker makes it."""
        ...

    def close(self) -> None:
        """End what the worker started."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec(Generic[Batch, Result]):
    """How a worker is made, and what for."""

    make: Callable[..., Worker[Batch, Result]]
    """Class or function that is importable by name; called as `make(*arguments, device)` once per
    worker."""
    arguments: tuple[Any, ...] = ()
    """Plain values and paths; never tensors, never the store."""
    kind: devices.Kind
    """Which line of `[devices]` says where it may run."""
    gives_way: bool = False
    """Whether it takes no device that other work waits for."""


class Workers(Generic[Batch, Result]):
    """Workers on all devices that are to be had; a context manager.

    Devices are held while a map runs and not between two maps. Workers, with all that they have
    loaded, stay from one map to the next as long as the devices are the same and no one waits for
    one of them.
    """

    def __init__(
        self,
        spec: WorkerSpec[Batch, Result],
        config: DevicesConfig,
        home: Path,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        """Nothing is held, started or loaded before the first batch.

        Args:
            spec: The worker.
            config: The workspace's `[devices]`.
            home: The workspace, named to whoever waits for a device.
            say: Told whom we wait for, and which worker was lost.
        """
        self._spec, self._config, self._home, self._say = spec, config, home, say
        self._held: tuple[str, ...] = ()
        self._pool: _InProcess[Batch, Result] | ProcessPool[Batch, Result] | None = None

    def __enter__(self) -> "Workers[Batch, Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all workers."""
        self._close()

    def map(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Yield the result of every batch, in the order of the batches.

        No more than a few batches are taken ahead of the results that were given out. An error that
        a worker raises is raised here at once, as itself. A batch whose worker dies is tried again
        on a new one.

        Raises:
            WorkerLostError: workers died repeatedly at one batch, or do not start.
            ConfigError: `[devices]` names no device of this machine.
        """
        remaining = iter(batches)
        if (first := next(remaining, _NOTHING)) is _NOTHING:
            return
        hold = devices.hold_all(
            self._spec.kind,
            self._config,
            self._home,
            gives_way=self._spec.gives_way,
            say=self._say,
        )
        with hold as held:
            try:
                yield from self._on(held).map(itertools.chain([cast(Batch, first)], remaining))
            finally:
                if devices.are_wanted(self._spec.kind, self._config, held):
                    self._close()  # Whoever waits needs the memory too.

    def _on(
        self, held: tuple[str, ...]
    ) -> "_InProcess[Batch, Result] | ProcessPool[Batch, Result]":
        """The workers on the devices held: those of the map before where they are the same."""
        if self._pool is None or held != self._held:
            self._close()
            self._held, self._pool = held, _open(self._spec, held, self._say)
        return self._pool

    def _close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def _open(
    spec: WorkerSpec[Batch, Result], held: tuple[str, ...], say: Callable[[str], None]
) -> "_InProcess[Batch, Result] | ProcessPool[Batch, Result]":
    if len(held) == 1:
        return _InProcess(spec.make(*spec.arguments, held[0]))
    return ProcessPool(spec.kind, spec.make, spec.arguments, held, say)


class _InProcess(Generic[Batch, Result]):
    """One worker in this process."""

    def __init__(self, worker: Worker[Batch, Result]) -> None:
        self._worker = worker

    def map(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """See `Workers.map`."""
        return map(self._worker, batches)

    def close(self) -> None:
        """Let the worker end what it started."""
        self._worker.close()
