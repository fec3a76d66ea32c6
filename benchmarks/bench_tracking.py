"""How fast event logs reach MLflow, and whether a trainer's steps notice MLflow: running, stopped
or hung.

Usage: python benchmarks/bench_tracking.py [NUM_METRICS]

The trainer is a process of small but real steps on one thread that writes its event log as the
trainer does; beside it, a process forwards that log every second, ten times as often as
`checkpoints` does, to a server in each state. Rounds take turns, so that what else the machine does
falls on all of them alike. Times are wall clock; of a busy machine the processor seconds beside
them tell: a step that waited for MLflow would show it in the first alone, one that worked for
MLflow in both. The limit is on MLflow stopped or hung against MLflow running, a forwarder beside
all three: against none, a step also shares cores and caches with one more process.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from mlflow_world import Server, prepare_run  # noqa: E402 - the tests' server, importable by the line above

from resources.mlflow.tracking import Tracking, workspace_tracking  # noqa: E402
from training.errors import TrackingError  # noqa: E402
from training.runs import run_folder  # noqa: E402
from training.runs.event_log import EventLog  # noqa: E402

NUM_METRICS = 30_000
METRICS_PER_STEP = 9
MIN_PER_S = 1_000
ROUNDS, STEPS = 3, 200
MAX_RATIO = 1.05
STATES = ("no forwarder", "running", "stopped", "hung")


class Taken(NamedTuple):
    """What one step took, seconds."""

    wall: float
    processor: float
    log: float
    """Of the wall clock, for its line of the event log."""


def write_step(log: EventLog, step: int, loss: float) -> None:
    """The line of a step, with as many numbers as the trainer's."""
    log.write(
        "step", samples_seen=step * 8, step=step, epoch=0, loss=loss, learning_rate=1e-4, grad_norm=0.4,
        images_per_s=11.0, data_wait=0.01, eta_s=90.0, num_skipped=0,
    )  # fmt: skip


def forwarding(
    home: Path, tracking: Tracking, num_metrics: int, processor_s: Callable[[], float]
) -> str:
    """Metrics per second of a run that is sent whole."""
    folder = prepare_run(home, tracking.experiment)
    with EventLog(folder / run_folder.EVENTS) as log:
        log.write("started", samples_seen=0, run=folder.name)
        for step in range(1, num_metrics // METRICS_PER_STEP + 1):
            write_step(log, step, 1 / step)
    tracking.run_url(folder.name)
    began, worked = time.monotonic(), processor_s()
    sent = tracking.forward(folder)
    took, worked = time.monotonic() - began, processor_s() - worked
    return f"{sent / took:,.0f}/s (limit {MIN_PER_S:,}), {sent / worked:,.0f} per processor second"


def forward_for_ever(folder: Path, tracking: Tracking) -> None:
    """What `checkpoints` does beside a trainer, more often."""
    while True:
        with contextlib.suppress(TrackingError):
            tracking.forward(folder)
        time.sleep(1)


def train(folder: Path, times: "multiprocessing.Queue[list[Taken]]") -> None:
    """Small real steps; sends what each took, the line of the log included."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = 512
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    taken = []
    with EventLog(folder / run_folder.EVENTS) as log:
        log.write("started", samples_seen=0, run=folder.name)
        for step in range(1, STEPS + 1):
            began, worked = time.monotonic(), time.process_time()
            loss = model(torch.randn(256, width)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = float(loss.detach())
            done = time.monotonic()
            write_step(log, step, value)
            taken.append(
                Taken(
                    time.monotonic() - began, time.process_time() - worked, time.monotonic() - done
                )
            )
    times.put(taken[STEPS // 10 :])


def steps_beside(home: Path, name: str, tracking: Tracking | None) -> list[Taken]:
    """Times of a trainer's steps, with a forwarder beside it."""
    context = multiprocessing.get_context("spawn")
    folder = prepare_run(home, name)
    times: multiprocessing.Queue[list[Taken]] = context.Queue()
    forwarder = context.Process(target=forward_for_ever, args=(folder, tracking), daemon=True)
    if tracking is not None:
        forwarder.start()
        time.sleep(6)  # it has imported MLflow by then
    trainer = context.Process(target=train, args=(folder, times), daemon=True)
    trainer.start()
    taken = times.get()
    trainer.join()
    if tracking is not None:
        forwarder.kill()
        forwarder.join()
    return taken


def step_times(home: Path, server: Server) -> None:
    """Medians of all rounds by the state of MLflow; the server runs at first and at last."""
    tracking = Tracking(uri=server.url, experiment="steps")
    taken: dict[str, list[Taken]] = {state: [] for state in STATES}
    for number in range(ROUNDS):
        for state in STATES:
            if state == "stopped":
                server.end()
            if state == "hung":
                server.start()
                server.send(signal.SIGSTOP)
            beside = None if state == "no forwarder" else tracking
            taken[state] += steps_beside(home, f"{state.replace(' ', '-')}-{number}", beside)
        server.send(signal.SIGCONT)
    usual = middle(taken["no forwarder"])
    print(
        f"a step without a forwarder: {usual.wall * 1000:.2f} ms, of these {usual.processor * 1000:.2f} ms processor "
        f"and {usual.log * 1e6:.0f} us for its line of the log (medians of {ROUNDS} rounds of {STEPS})"
    )
    for state in STATES[1:]:
        now = middle(taken[state])
        print(
            f"  MLflow {state:8} {now.wall / usual.wall:.3f} x, processor {now.processor / usual.processor:.3f} x, "
            f"line of the log {now.log * 1e6:.0f} us"
        )
    running = middle(taken["running"]).wall
    for state in ("stopped", "hung"):
        print(
            f"  MLflow {state} against running: {middle(taken[state]).wall / running:.3f} x (limit {MAX_RATIO})"
        )


def middle(taken: list[Taken]) -> Taken:
    """Medians."""
    return Taken(*(statistics.median(values) for values in zip(*taken, strict=True)))


def main() -> None:
    """Print all numbers and their limits."""
    num_metrics = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_METRICS
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "space"
        home.mkdir()
        print(f"{num_metrics} metrics, batches of 1,000:")
        direct = workspace_tracking(home)
        print(f"  into SQLite:      {forwarding(home, direct, num_metrics, time.process_time)}")
        server = Server(home)
        server.start()
        try:
            remote = Tracking(uri=server.url, experiment="remote")
            remote.experiment_url()
            rate = forwarding(
                home, remote, num_metrics, lambda: time.process_time() + server.processor_s()
            )
            print(f"  through a server: {rate}, the server's included")
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"  # ours
            step_times(home, server)
        finally:
            server.end(signal.SIGKILL)


if __name__ == "__main__":
    main()
