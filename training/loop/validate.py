"""The plain loss on fixed lists of images, with the same prompts, noise and timesteps every time.

Two lists: held-out images, and the stable list of training images; a gap between them is
overfitting.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from training.loop import noise
from training.loop.dataset import Dataset, Draw, Pins
from training.loop.prefetch import Prefetch, Sender
from training.optimization.ranks import Ranks
from training.seeds import Purpose

PlainLosses = Callable[[Draw], torch.Tensor]
"""A draw on the device to the unweighted loss per sample, `(B,)`; on a CPU several may be asked for
at a time."""
_MOST_APART = 8
"""Threads that compute a micro-batch each; more of them compute each one together, which takes less
memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListLosses:
    """The plain loss of every image of a list; equal on all ranks."""

    losses: torch.Tensor
    """`(N,)` fp64, in the list's order."""
    timesteps: torch.Tensor
    """`(N,)` int64: one from each of N equal slices of the schedule, the same at every
    validation."""
    buckets: np.ndarray
    """`(N, 2)` heights and widths, pixels."""
    num_timesteps: int
    """Of the noise schedule."""

    @property
    def mean(self) -> float | None:
        """Over samples; None for an empty list."""
        return _mean(self.losses)

    @property
    def not_finite(self) -> list[int]:
        """Positions in the list of losses that are infinite or no number; means that they enter are
        None."""
        return np.flatnonzero(~self.losses.isfinite().numpy()).tolist()

    def weighted(self, weights: torch.Tensor) -> float | None:
        """The mean of the losses times the training loss's weights of their timesteps.

        Args:
            weights: `(T,)`, of every timestep.
        """
        return _mean(self.losses * weights.cpu()[self.timesteps])

    def by_bin(self, num_bins: int) -> dict[str, float | None]:
        """The mean in each of so many equal ranges of timesteps, named `000-099`; ranges without
        images are absent."""
        bins = self.timesteps * num_bins // self.num_timesteps
        means: dict[str, float | None] = {}
        for number in bins.unique().tolist():
            first, last = (
                -(-edge * self.num_timesteps // num_bins) for edge in (number, number + 1)
            )
            means[f"{first:03d}-{last - 1:03d}"] = _mean(self.losses[bins == number])
        return means

    def by_bucket(self) -> dict[str, float | None]:
        """The mean of each bucket, named height x width."""
        sizes, member_of = np.unique(self.buckets, axis=0, return_inverse=True)
        members = torch.from_numpy(member_of.reshape(-1))
        return {
            f"{height}x{width}": _mean(self.losses[members == number])
            for number, (height, width) in enumerate(sizes.tolist())
        }


class FixedList:
    """A list of images with their batches, which are made once and then kept.

    A batch is kept in memory that the device reads by itself: half a megabyte per image of 1024 x
    1024.
    """

    def __init__(
        self, rows: np.ndarray, dataset: Dataset, ranks: Ranks, num_timesteps: int
    ) -> None:
        """Take a list.

        Args:
            rows: Rows of the training set, in order; the timesteps' strata are dealt over them.
            dataset: What they are rows of.
            ranks: Each takes every `size`-th micro-batch.
            num_timesteps: Of the noise schedule.
        """
        self.rows = rows
        self._dataset, self._ranks, self._num_timesteps = dataset, ranks, num_timesteps
        image_ids = [dataset.image_ids[row] for row in rows]
        self._timesteps = noise.stratified_timesteps(dataset.config.seed, image_ids, num_timesteps)
        self._micro_batches: list[np.ndarray] | None = None
        self._made: dict[int, Draw] = {}
        self._pins: Pins | None = None

    def losses(
        self,
        losses_of: PlainLosses,
        worker: ThreadPoolExecutor,
        sender: Sender,
        stop_requested: Callable[[], bool],
    ) -> ListLosses | None:
        """The plain loss of each image. All ranks call it and get the same numbers.

        Args:
            losses_of: One forward pass.
            worker: Makes batches ahead of their use.
            sender: Brings them to the device.
            stop_requested: Asked between micro-batches; any rank's yes stops all.

        Returns:
            None when a stop request came first.
        """
        ranks = self._ranks
        if self._micro_batches is None:
            self._micro_batches = _micro_batches(self.rows, self._dataset) if len(self.rows) else []
        if self._pins != self._dataset.pins:  # other latents
            self._made, self._pins = {}, self._dataset.pins
        micro_batches, losses = (
            self._micro_batches,
            torch.zeros(len(self.rows), dtype=torch.float32),
        )

        def make(number: int) -> tuple[Draw, torch.cuda.Event | None]:
            if number not in self._made:
                self._made[number] = self._make(micro_batches[number]).moved(sender.pin)
            return self._made[number].moved(sender.send), sender.sent()

        own = range(ranks.rank, len(micro_batches), ranks.size)
        compute, found = (
            self._dataset.config.compute,
            list[tuple[np.ndarray, Callable[[], torch.Tensor]]](),
        )
        apart = ranks.device.type == "cpu" and not compute.compile
        with (
            Prefetch(make, own, worker, compute.prefetch) as draws,
            _passes(losses_of, apart=apart) as begin,
        ):
            for first in range(0, len(micro_batches), ranks.size):
                if ranks.any(stop_requested()):
                    return None
                if first + ranks.rank < len(micro_batches):
                    draw, mark = next(draws)
                    sender.receive(mark, draw.tensors())
                    found.append((micro_batches[first + ranks.rank], begin(draw)))
            # Read after the last one was queued: a device is not waited for in between.
            for positions, values in found:
                losses[positions] = values().cpu()
        # Every element comes from one rank, so the sum is exact and does not depend on the number
        # of ranks.
        return ListLosses(
            losses=ranks.sum_(losses).double(), timesteps=self._timesteps, buckets=self._dataset.buckets[self.rows],
            num_timesteps=self._num_timesteps,
        )  # fmt: skip

    def _make(self, positions: np.ndarray) -> Draw:
        dataset = self._dataset
        batch = dataset.batch(self.rows[positions], None)
        draw = noise.draw_noise(
            dataset.config.seed, Purpose.VALIDATION, 0, batch.image_ids, batch.latents.shape[1:]
        )  # fmt: skip
        return Draw(batch=batch, timesteps=self._timesteps[positions], noise=draw)


@contextlib.contextmanager
def _passes(
    losses_of: PlainLosses, *, apart: bool
) -> Iterator[Callable[[Draw], Callable[[], torch.Tensor]]]:
    """How forward passes are computed: a function that begins one and returns what waits for its
    losses.

    A CPU's few threads compute a micro-batch each. Together on each one, they would wait for one
    another at every small operation, on a machine that does other work nearly all the time; and
    each sum has the bits of one thread.

    Args:
        losses_of: One forward pass.
        apart: Threads may compute one each.
    """

    def compute(draw: Draw) -> torch.Tensor:
        with torch.no_grad():
            return losses_of(draw).float()

    def at_once(draw: Draw) -> Callable[[], torch.Tensor]:
        losses = compute(draw)
        return lambda: losses

    num_threads = torch.get_num_threads()
    if not apart or not 1 < num_threads <= _MOST_APART:
        yield at_once
        return
    ahead = deque[Future[torch.Tensor]]()
    with ThreadPoolExecutor(
        num_threads, "validation", initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:

        def begin(draw: Draw) -> Callable[[], torch.Tensor]:
            if len(ahead) == num_threads:
                ahead.popleft().result()
            ahead.append(pool.submit(compute, draw))
            return ahead[-1].result

        try:
            yield begin
        finally:
            torch.set_num_threads(num_threads)  # what threads that are made from now on begin with


def _mean(losses: torch.Tensor) -> float | None:
    """None for no losses, and where one of them is infinite or no number: a log cannot hold
    that."""
    mean = losses.mean().item() if len(losses) else math.nan
    return mean if math.isfinite(mean) else None


def _micro_batches(rows: np.ndarray, dataset: Dataset) -> list[np.ndarray]:
    """Positions in `rows`, cut into micro-batches of one bucket and one number of chunks."""
    keys = np.column_stack([dataset.buckets[rows], dataset.count_chunks(rows, None)])
    groups, member_of = np.unique(keys, axis=0, return_inverse=True)
    size = dataset.config.batch.micro_batch_size
    cut: list[np.ndarray] = []
    for group in range(len(groups)):
        members = np.flatnonzero(member_of.reshape(-1) == group)
        cut += np.split(members, range(size, len(members), size))
    return cut
