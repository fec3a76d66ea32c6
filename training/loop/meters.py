"""What a run says of its own speed: images a second, time left, waiting for data, memory, how busy
its devices are."""

import collections
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

_WINDOW_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the time of this rank's steps went since the last one."""

    seconds: float
    """Of all its steps."""
    waited_s: float
    """Of them, spent waiting for batches."""
    share: float
    """Of waiting in all."""
    stages: dict[str, float]
    """Seconds that each stage of making batches took, in its thread."""

    @property
    def slowest(self) -> str:
        """The stage that took most."""
        return max(self.stages, key=lambda name: (self.stages[name], name), default="no stage")


@dataclass(slots=True, kw_only=True)
class Meters:
    """Numbers of the last steps, of this rank's device."""

    device: torch.device
    num_samples: int
    """Length of the run."""
    peak_flops: float | None
    """Floating-point operations a second that all devices of the run could do; None where that is
    not known."""
    recent: collections.deque[tuple[int, float, float]] = field(
        default_factory=lambda: collections.deque(maxlen=_WINDOW_STEPS)
    )
    """Samples, seconds and floating-point operations of steps."""
    seconds: float = 0.0
    """Of the steps of this interval."""
    waited_s: float = 0.0
    """Of them, spent waiting for batches."""
    stages_before: dict[str, float] = field(default_factory=dict)
    """What making batches had taken when the interval began."""

    def step(
        self, *, size: int, seconds: float, waited_s: float, flops: float, samples_seen: int
    ) -> dict[str, float]:
        """Count a step.

        Args:
            size: Its samples, over all ranks.
            seconds: How long it took.
            waited_s: How long this rank waited for batches meanwhile.
            flops: What its forward and backward passes take at least, over all ranks; recomputation
                is not counted.
            samples_seen: The clock after it.

        Returns:
            Fields of the step's line in the log: images_per_s and eta_s over the last steps,
            data_wait as a share, memory_bytes at most so far, and mfu (model FLOPs utilization)
            where the device's peak is known.

        Source: MFU as in PaLM, arXiv:2204.02311, appendix B.
        """
        self.recent.append((size, seconds, flops))
        self.seconds += seconds
        self.waited_s += waited_s
        sizes, times, operations = (sum(values) for values in zip(*self.recent, strict=True))
        rate = sizes / times
        numbers = {
            "images_per_s": rate,
            "eta_s": max(self.num_samples - samples_seen, 0) / rate,
            "data_wait": waited_s / seconds,
            "memory_bytes": self._memory_bytes(),
        }
        if self.peak_flops:
            numbers["mfu"] = operations / times / self.peak_flops
        return numbers

    def interval(self, stages: Mapping[str, float]) -> Interval:
        """Close an interval.

        Args:
            stages: Seconds that each stage of making batches has taken since the process began.
        """
        taken = {
            name: seconds - self.stages_before.get(name, 0.0) for name, seconds in stages.items()
        }
        found = Interval(
            seconds=self.seconds,
            waited_s=self.waited_s,
            share=self.waited_s / max(self.seconds, 1e-9),
            stages=taken,
        )
        self.seconds, self.waited_s, self.stages_before = 0.0, 0.0, dict(stages)
        return found

    def _memory_bytes(self) -> int:
        """The most that this process has held: of the device where it is a GPU, else of main
        memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
