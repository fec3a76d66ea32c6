"""The gradients of a rank in one fp32 buffer, and how those of all ranks become one sum.

Whatever the model computes in, sums over micro-batches and ranks are never rounded to 16 bits. In
the `fast` mode the sum over ranks overlaps the backward pass of a rank's last micro-batch; in the
`canonical` one it is made micro-batch by micro-batch in the order of the epoch, so that its bits do
not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from training.config.run import SLICE_NUMBERS
from training.optimization.ranks import Pending, Ranks

Mode = Literal["canonical", "fast"]


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """A range of the buffer that is sent in one message."""

    start: int
    end: int
    waiting: int = 0
    """Its parameters that have no gradient yet in a rank's last backward pass of a step."""


class Gradients:
    """Gradients of a step: `begin`, for each round of micro-batches a backward pass and
    `end_round`, then `finish`."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        device: torch.device,
        ranks: Ranks | None = None,
        mode: Mode = "fast",
        slice_numbers: int = SLICE_NUMBERS,
    ) -> None:
        """Lay the buffer out and hang it on the parameters.

        A parameter in fp32 accumulates into its view by itself. One in 16 bits hands over each new
        gradient, which is added in fp32 and let go: a gradient of another type than its parameter
        is nothing that graphs can be made of.

        Args:
            parameters: The trained ones, in an order that all ranks share.
            device: Where they are.
            ranks: Of the run; None for one.
            mode: How ranks' gradients are summed.
            slice_numbers: Gradients in one message, at most, but for those of a single larger
                parameter.
        """
        self._parameters, self._ranks, self._mode, self._slice = (
            list(parameters),
            ranks,
            mode,
            slice_numbers,
        )
        self.flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
        """All gradients, in the order of the parameters; what is done to it is done to them."""
        self.views = self._cut()
        """One per parameter, laid out in memory as that is: fused kernels ask for it."""
        shared = ranks is not None and ranks.size > 1
        self._total = torch.zeros_like(self.flat) if shared and mode == "canonical" else None
        self._buckets, self._bucket_of = (
            self._make_buckets() if shared and mode == "fast" else ([], [])
        )
        self._armed, self._sent, self._rounds = False, 0, 0
        self._pending: list[Pending] = []
        for number, parameter in enumerate(self._parameters):
            if parameter.dtype == torch.float32:
                parameter.grad = self.views[number]
            if parameter.dtype != torch.float32 or self._buckets:
                parameter.register_post_accumulate_grad_hook(self._arrival(number))

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self.flat.zero_()
        self._armed, self._sent, self._rounds = False, 0, 0
        self._pending.clear()

    def expect_last(self) -> None:
        """The next backward pass is this rank's last of the step: what it completes may be sent at
        once."""
        if self._buckets:
            self._armed = True
            for bucket in self._buckets:
                bucket.waiting = 0
            for bucket in self._bucket_of:
                bucket.waiting += 1

    def end_round(self, num_micro_batches: int) -> None:
        """Each of the first ranks has done one micro-batch: `canonical` adds them up, in the order
        of the ranks.

        Args:
            num_micro_batches: Of this round; ranks beyond have had none.
        """
        if self._total is None or self._ranks is None:
            return
        for part, total in zip(
            self.flat.split(self._slice), self._total.split(self._slice), strict=True
        ):
            for number, gathered in enumerate(self._ranks.gather(part)[:num_micro_batches]):
                if self._rounds == number == 0:
                    total.copy_(gathered)
                else:
                    total.add_(gathered)
        self._rounds += 1
        self.flat.zero_()

    def finish(self) -> None:
        """The buffer holds the sum of all micro-batches of all ranks, on each of them."""
        if self._total is not None:
            self.flat.copy_(self._total)
        elif self._buckets and self._ranks is not None:
            self._send(len(self._buckets))
            self._ranks.wait(self._pending)
            self._pending.clear()

    def _cut(self) -> list[torch.Tensor]:
        views, offset = [], 0
        for parameter in self._parameters:
            views.append(self.flat.as_strided(parameter.size(), parameter.stride(), offset))
            offset += parameter.numel()
        return views

    def _make_buckets(self) -> tuple[list[_Bucket], list[_Bucket]]:
        """Ranges from the end of the buffer to its start, since backward passes reach the last
        parameters first.

        Returns:
            The buckets, and that of each parameter.
        """
        buckets: list[_Bucket] = []
        owners: list[_Bucket] = []
        end = self.flat.numel()
        for parameter in reversed(self._parameters):
            if not buckets or buckets[-1].end - end + parameter.numel() > self._slice:
                buckets.append(_Bucket(start=end, end=end))
            end -= parameter.numel()
            buckets[-1].start = end
            owners.append(buckets[-1])
        return buckets, owners[::-1]

    def _arrival(self, number: int) -> Callable[[torch.Tensor], None]:
        """What is done when a backward pass has the whole gradient of a parameter."""
        view, parameter = self.views[number], self._parameters[number]
        hands_over = parameter.dtype != torch.float32

        def arrived(_: torch.Tensor) -> None:
            if hands_over and parameter.grad is not None:
                view.add_(parameter.grad)
                parameter.grad = None
            if self._armed:
                self._bucket_of[number].waiting -= 1
                ready = self._sent
                while ready < len(self._buckets) and not self._buckets[ready].waiting:
                    ready += 1
                self._send(ready)

        return arrived

    def _send(self, end: int) -> None:
        """Begin to sum the buckets before `end`; all ranks do so in the same order, whichever is
        complete first."""
        assert self._ranks is not None
        for bucket in self._buckets[self._sent : end]:
            self._pending.append(self._ranks.begin_sum(self.flat[bucket.start : bucket.end]))
        self._sent = end
