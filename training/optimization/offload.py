"""Copies of device tensors in main memory, made in slices while the device computes."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

_SLICE_BYTES = 64_000_000


class Mark(Protocol):
    """A point in a device's queue."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Offload:
    """Copies what a device holds once the work that is queued now is done; the tensors must not
    change meanwhile."""

    def __init__(self, device: torch.device) -> None:
        """Mark where the present work ends; called by the thread that queues it."""
        self._device = device
        self._mark = (
            torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        )

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies on the CPU; may be called in another thread than the one that made
        this.

        From a GPU they come through two pinned slices, filled by turns: the model's memory need not
        be pinned, and the device goes on.
        """
        if self._mark is None:
            return {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in tensors.items()
            }
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._mark)
        slices = [torch.empty(_SLICE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        with torch.cuda.stream(stream):
            return copy_in_slices(tensors, slices, stream.record_event)


def copy_in_slices(
    tensors: Mapping[str, torch.Tensor], slices: Sequence[torch.Tensor], mark: Callable[[], Mark]
) -> dict[str, torch.Tensor]:
    """Contiguous copies of tensors, through buffers that are filled by turns.

    Args:
        tensors: Of any type and layout.
        slices: Buffers `(N,)` uint8.
        mark: Called after each begun copy to a buffer; the buffer may be read once its mark is
            reached.
    """
    copies: dict[str, torch.Tensor] = {}
    under_way = deque[tuple[torch.Tensor, torch.Tensor, Mark]]()

    def land() -> None:
        target, filled, reached = under_way.popleft()
        reached.synchronize()
        target.copy_(filled)

    turn, size = 0, slices[0].numel()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        copies[name] = torch.empty(whole.shape, dtype=whole.dtype)
        source, target = (part.reshape(-1).view(torch.uint8) for part in (whole, copies[name]))
        for here, there in zip(source.split(size), target.split(size), strict=True):
            if len(under_way) == len(slices):
                land()
            filled = slices[turn % len(slices)][: here.numel()]
            filled.copy_(here, non_blocking=True)
            under_way.append((there, filled, mark()))
            turn += 1
    while under_way:
        land()
    return copies
