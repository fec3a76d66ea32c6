"""What the training loop itself adds to a step: all that is neither model, optimizer nor waiting for data.

Usage: python benchmarks/bench_step_loop.py [--samples N]

Trains the tests' tiny SDXL on their random latents on one thread and subtracts, step by step, the loop's processor time
in forward and backward passes with their losses, and in the optimizer with clipping and averages. What is left is
order, stop requests, sums over ranks, learning rates, meters and the log; none of it grows with the model. Waiting for
batches takes no processor time; `bench_training_data.py` prints how long it is.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"
MAX_OVERHEAD_MS = 2.0
WARM_UP_STEPS = 10


class Clock:
    """Processor seconds of this thread inside of the wrapped calls; a call within another counts once."""

    def __init__(self) -> None:
        """Nothing spent."""
        self.seconds, self._depth = 0.0, 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            began, self._depth = time.thread_time(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - began

        return counted


def measure(num_samples: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each step outside of model code, and of each whole step."""
    import conftest

    from training import trainer as loop

    clock, overheads, steps = Clock(), list[float](), list[float]()
    changes = {
        "num_samples": num_samples, "reduction": "fast", "batch.global_batch_size": 8, "batch.micro_batch_size": 4,
        "validation.every_samples": 10**9, "checkpoints.every_samples": 10**9,
    }  # fmt: skip

    def prepare(trainer: Any) -> None:
        arithmetic, state = trainer.state.arithmetic, trainer.state
        for name in ("unscale_and_clip", "step", "clear_gradients"):
            setattr(arithmetic, name, clock.timed(getattr(arithmetic, name)))
        if state.ema is not None:
            state.ema.update = clock.timed(state.ema.update)

    step = loop.Trainer._step

    def timed_step(self: Any, draws: Any) -> bool:
        clock.seconds, began = 0.0, time.thread_time()
        going_on = step(self, draws)
        spent = time.thread_time() - began
        overheads.append(spent - clock.seconds)
        steps.append(spent)
        return going_on

    loop.Trainer._pass = clock.timed(loop.Trainer._pass)  # type: ignore[method-assign]
    loop.Trainer._step = timed_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        base = conftest.write_tiny_sdxl(Path(folder) / "base")
        run = conftest.build_run(Path(folder), base, "bench", changes)
        conftest.train_here(run, prepare=prepare)
    return overheads[WARM_UP_STEPS:], steps[WARM_UP_STEPS:]


def main() -> None:
    """Print the loop's own time beside its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1600)
    overheads, steps = measure(parser.parse_args().samples)
    own, whole = statistics.median(overheads) * 1e3, statistics.median(steps) * 1e3
    worst = sorted(overheads)[int(0.95 * len(overheads))] * 1e3
    print(f"step of 2 micro-batches: {whole:.1f} ms of processor time, {len(steps)} steps")
    print(f"the loop's own time: {own:.2f} ms (limit {MAX_OVERHEAD_MS:.0f}), 95 % of the steps below {worst:.2f} ms")


if __name__ == "__main__":
    main()
