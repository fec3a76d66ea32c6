"""The processes of a training run: who is who, what they agree on, and how their gradients become one."""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from training.errors import TrainingError

# Rank 0 may spend long on a checkpoint or an epoch's order while the others wait.
_TIMEOUT = datetime.timedelta(hours=2)


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
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=_TIMEOUT)
            # Agreements must not wait for the GPU's queue.
            self._control = dist.new_group(backend="gloo", timeout=_TIMEOUT)

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

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all ranks, in place. Exact where each element is non-zero on one rank only."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add gradients over all ranks, in place, in one message per 256 MB (`fast`)."""
        if self.size == 1:
            return
        for chunk in _chunks(parameters, 64_000_000):
            flat = self.sum_(_flatten(chunk))
            for part, parameter in zip(flat.split([p.numel() for p in chunk]), chunk, strict=True):
                parameter.grad = part.view_as(parameter)

    def gather_gradients(self, parameters: Sequence[torch.nn.Parameter], num_ranks: int) -> list[list[torch.Tensor]]:
        """Every rank's gradients of one round of micro-batches (`canonical`).

        Args:
            parameters: Those of this rank; their `grad` is read where there is one.
            num_ranks: How many ranks, from 0, had a micro-batch in this round.

        Returns:
            For ranks 0 to num_ranks - 1 in order, one gradient per parameter.
        """
        if self.size == 1:
            return [[_gradient(parameter) for parameter in parameters]]
        own = _flatten(parameters)
        flats = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            dist.all_gather(flats, own)
        sizes = [parameter.numel() for parameter in parameters]
        return [
            [part.view_as(parameter) for part, parameter in zip(flat.split(sizes), parameters, strict=True)]
            for flat in flats[:num_ranks]
        ]

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A message that cannot be exchanged means that another rank has ended, whose own output says why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"another rank of this run was lost, the last checkpoint is kept; start the run again ({reason})"
        ) from error


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flatten(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])


def _chunks(parameters: Sequence[torch.nn.Parameter], max_numbers: int) -> list[list[torch.nn.Parameter]]:
    chunks: list[list[torch.nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if chunks[-1] and size + parameter.numel() > max_numbers:
            chunks.append([])
            size = 0
        chunks[-1].append(parameter)
        size += parameter.numel()
    return chunks
