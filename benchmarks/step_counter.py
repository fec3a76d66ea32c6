"""What a step asks of its device: operations, waits of the host, copies that block, bytes; and
where its time goes.

On a CPU there is no other device, so a tensor counts as being on it if it was said to be, was made
by an operation with one that is, or was made with `device=`: what is counted is what the same code
does on a GPU.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("data", "host-to-device", "forward", "backward", "reduction", "optimizer")
"""Parts of a step, in its order."""
# They hand a tensor's values to Python; `item` and truth do so by an operation, which is counted
# itself.
_READS = frozenset({"tolist", "numpy", "__array__", "cpu"})
_NEEDS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Phases:
    """Seconds of each part of a step, on a GPU by its own clock, but for waiting for data, which
    the host does."""

    def __init__(self, device: torch.device) -> None:
        """Nothing spent."""
        self.current = ""
        """The phase that is under way; empty between them."""
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._host: Counter[str] = Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block."""
        timed_there = self._on_gpu and name != "data"
        began, self.current = time.perf_counter(), name
        start = _event() if timed_there else None
        try:
            yield
        finally:
            self.current = ""
            if start is not None:
                self._marks.append((name, start, _event()))
            else:
                self._host[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for the device."""
        if self._marks:
            torch.cuda.synchronize()
        for name, start, end in self._marks:
            self._host[name] += start.elapsed_time(end) / 1e3
        found = {name: self._host[name] for name in PHASES}
        self._marks, self._host = [], Counter()
        return found


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepCounter:
    """A context manager that counts what this thread, and backward passes that it starts, ask of
    the device."""

    def __init__(
        self,
        device: torch.device,
        present: Iterable[torch.Tensor] = (),
        phases: Phases | None = None,
    ) -> None:
        """Count nothing yet.

        Args:
            device: Where the step computes.
            present: Tensors that are on it. On a GPU that is seen.
            phases: Names the phase that bytes are counted for.
        """
        self.operations: Counter[str] = Counter()
        """Calls by the operation's name; views, which compute nothing, are left out."""
        self.host_syncs: list[str] = []
        """The line of code of each wait of the host for the device."""
        self.blocking_copies: list[str] = []
        """The line of each copy to the device from memory that is not pinned: the host waits for it
        as well."""
        self.bytes_moved: Counter[str] = Counter()
        """Bytes read and written by operations, by phase; what caches save is not known."""
        self._device, self._phases, self._inside = device, phases, False
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._modes = contextlib.ExitStack()
        self.place(present)

    def place(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are on the device, too."""
        if self._device.type == "cpu":
            for tensor in tensors:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = storage  # kept, so that no other gets its address

    def __enter__(self) -> "StepCounter":
        """Begin to count."""
        self._modes.enter_context(torch.compiler.set_stance("force_eager"))
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        """Count no more."""
        self._modes.close()

    def is_there(self, value: object) -> bool:
        """Whether it is a tensor on the device."""
        if not isinstance(value, torch.Tensor):
            return False
        if self._device.type != "cpu":
            return value.device.type == self._device.type
        return value.untyped_storage()._cdata in self._storages

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what Python code calls, and count what no operation tells."""
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        if name in _READS or (name == "to" and "cpu" in (*args[1:], kwargs.get("device"))):
            return (
                self._read(function, args, kwargs)
                if self.is_there(first)
                else function(*args, **kwargs)
            )
        target = next(_devices(args[1:] if name == "to" else (), kwargs), None)
        if (
            name in ("to", "tensor", "as_tensor")
            and target is not None
            and not self.is_there(first)
        ):
            is_pinned = isinstance(first, torch.Tensor) and first.is_pinned()
            return self._upload(function, args, kwargs, is_pinned=is_pinned)
        result = function(*args, **kwargs)
        if target is not None:
            self.place(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def operation(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and count it where it is one of the device."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = operation(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not any(self.is_there(tensor) for tensor in given):
            return result
        if not self._inside and self._waits(operation, args, given, result):
            self.host_syncs.append(_line())
        if self._device.type != "cpu" and _is_blocking_upload(operation, args, given, made):
            self.blocking_copies.append(_line())
        self.place(made)
        if not operation.is_view and operation._schema.name not in (
            "aten::detach",
            "aten::lift_fresh",
        ):
            self.operations[operation._schema.name] += 1
            self.bytes_moved[self._phases.current if self._phases else ""] += _bytes(
                operation, args, given, made
            )
        return result

    def _read(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of the device comes to the host."""
        self.host_syncs.append(_line())
        self._inside = True
        try:
            result = function(*args, **kwargs)
            return result.clone() if result is args[0] else result
        finally:
            self._inside = False

    def _upload(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_pinned: bool
    ) -> Any:
        """A tensor or number of the host goes to the device."""
        result = function(*args, **kwargs)
        if self._device.type == "cpu":  # else the operation tells
            if not is_pinned:
                self.blocking_copies.append(_line())
            result = result.clone() if args and result is args[0] else result
            self.place([result])
        return result

    def _waits(
        self, operation: Any, args: tuple[Any, ...], given: list[torch.Tensor], result: Any
    ) -> bool:
        """Whether the host needs values that the device has yet to compute."""
        if (
            operation._schema.name in _INDEXING
        ):  # by a mask: how many it holds must be known; the tags say so of all indices
            indices = tree_leaves(args[1])
            return any(
                isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
                for index in indices
            )
        if any(tag in operation.tags for tag in _NEEDS_VALUES):
            return True
        is_copy = (
            operation._schema.name in ("aten::_to_copy", "aten::copy_")
            and self._device.type != "cpu"
        )
        return (
            is_copy
            and isinstance(result, torch.Tensor)
            and result.device.type == "cpu"
            and not result.is_pinned()
        )


class _Functions(TorchFunctionMode):
    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._counter.function(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._counter.operation(operation, args, kwargs or {})


def _devices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.device]:
    """What a call is told of a device. The string `cpu` means the host, also where the device is a
    CPU itself."""
    for value in (*args, kwargs.get("device")):
        if isinstance(value, torch.device) or (isinstance(value, str) and value != "cpu"):
            yield torch.device(value)


def _is_blocking_upload(
    operation: Any, args: tuple[Any, ...], given: list[torch.Tensor], made: list[torch.Tensor]
) -> bool:
    if operation._schema.name not in ("aten::_to_copy", "aten::copy_"):
        return False
    source = args[1] if operation._schema.name == "aten::copy_" else args[0]
    on_host = source.device.type == "cpu" and source.dim() > 0
    return on_host and made[0].device.type != "cpu" and not source.is_pinned()


def _bytes(
    operation: Any, args: tuple[Any, ...], given: list[torch.Tensor], made: list[torch.Tensor]
) -> int:
    """Of all tensors that are read, and of all that are written, in place or anew."""
    written = 0
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        alias = argument.alias_info
        # The fused optimizers may unscale gradients in place, which no one asks them for.
        if alias is not None and alias.is_write and argument.name != "grads":
            written += sum(
                _size(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)
            )
    own = {id(tensor) for tensor in given}
    return (
        sum(map(_size, given))
        + written
        + sum(_size(tensor) for tensor in made if id(tensor) not in own)
    )


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _line() -> str:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__
        or f"{Path(torch.__file__).parent}/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{name}:{frame.f_lineno}"
