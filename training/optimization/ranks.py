"""The processes of a training run: who is who, what they agree on, and how their gradients become
one."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from training.errors import TrainingError

T = TypeVar("T")
Pending = dist.Work
"""A sum over ranks that is under way."""

# Rank 0 may spend long on a checkpoint or an epoch's order while the others wait.
_TIMEOUT = datetime.timedelta(hours=2)
# A sum that overlaps the backward pass waits in a GPU's queue for ranks that are still at theirs,
# which may compile a graph or fetch latents meanwhile. A lost rank is noticed on the CPUs' network,
# long before NCCL's watchdog gives up.
_GPU_TIMEOUT = datetime.timedelta(minutes=30)


class Ranks:
    """This process among the `size` of a run; with one process nothing is ever sent."""

    def __init__(self) -> None:
        """Read torchrun's environment and join the group: NCCL between GPUs, gloo between CPUs."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._control: dist.ProcessGroup | None = None
        self._bulk: dist.ProcessGroup | None = None
        if self.size > 1:
            on_gpus = self.device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpus else "gloo", timeout=_GPU_TIMEOUT if on_gpus else _TIMEOUT
            )
            # Agreements must not wait for the GPU's queue.
            self._control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            self._bulk = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        with _peers():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, where alone it is called, on all ranks."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.rank == 0 else None]
        with _peers():
            dist.broadcast_object_list(values, src=0, group=self._control)
        return cast(T, values[0])

    def broadcast_(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Overwrite tensors with those of one rank, in one message per 256 MB; between GPUs after
        `meet`."""
        for chunk in _chunks(tensors, 64_000_000) if self.size > 1 and tensors else ():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in chunk])
            with _peers():
                dist.broadcast(flat, source)
            for part, tensor in zip(
                flat.split([tensor.numel() for tensor in chunk]), chunk, strict=True
            ):
                tensor.detach().copy_(part.view_as(tensor))

    def collect(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All ranks' tensors on the CPU, under names that no two of them share, on rank 0;
        elsewhere nothing.

        May run in a thread beside other messages: it has a group of its own.
        """
        if self.size == 1:
            return own
        listed = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()]
        lists: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(lists, listed, group=self._bulk)
            for source in range(1, self.size):
                for name, shape, dtype in lists[source]:
                    if self.rank == source:
                        dist.send(own[name], 0, group=self._bulk)
                    elif self.rank == 0:
                        own[name] = torch.empty(shape, dtype=dtype)
                        dist.recv(own[name], source, group=self._bulk)
        return own if self.rank == 0 else {}

    def sum_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add a tensor on the CPU over all ranks, in place. Exact where each element is non-zero on
        one rank only."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(numbers, group=self._control)
        return numbers

    def begin_sum(self, values: torch.Tensor) -> Pending:
        """Begin to add a tensor over all ranks, in place; all ranks begin the same sums in the same
        order.

        The caller must not touch it before `wait`.
        """
        with _peers():
            return cast(Pending, dist.all_reduce(values, async_op=True))

    def wait(self, sums: Sequence[Pending]) -> None:
        """Let what follows read the sums. Between GPUs the host goes on as soon as every rank has
        begun them all."""
        if sums and self.device.type == "cuda":
            self.barrier()  # here a lost rank is noticed; its sums would hang in the queue until NCCL's timeout
        with _peers():
            for pending in sums:
                pending.wait()

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of equal shape from every rank, in the order of ranks; without others the tensor
        itself."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        self.meet()
        with _peers():
            dist.all_gather(gathered, values)
        return gathered

    def meet(self) -> None:
        """Before messages between GPUs: wait for all ranks where a lost one is noticed at once.

        NCCL does not notice it: the others would wait in the GPU's queue, deaf to torchrun, until a
        timeout.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A message that cannot be exchanged means that another rank has ended, whose own output says
    why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"another rank of this run was lost, the last checkpoint is kept; start the run again ({reason})"
        ) from error


def _chunks(tensors: Sequence[torch.Tensor], max_numbers: int) -> list[list[torch.Tensor]]:
    chunks: list[list[torch.Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if chunks[-1] and size + tensor.numel() > max_numbers:
            chunks.append([])
            size = 0
        chunks[-1].append(tensor)
        size += tensor.numel()
    return chunks
