"""What the training loop writes into its run's event log, and the words of its warnings."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config.run import RunConfig
from training.loop.dataset import Dataset, Draw
from training.loop.meters import Interval
from training.loop.startup import Start
from training.loop.state import TrainingState
from training.models.compute import Graphs
from training.models.trainables import trainable_of
from training.names import CheckpointName
from training.runs import run_folder
from training.runs.event_log import EventLog
from training.runs.run_folder import Ready, RunInputs

MAX_DATA_WAIT = 0.02
"""Share of an interval that may be spent waiting for batches without a warning,"""
MIN_DATA_WAIT_S = 1.0
"""or so many seconds of it, which no one would miss."""
_MAX_NAMED = 64
"""Images that one warning names."""


class RunLog:
    """Writes lines at the run's clock; without an event log, as on every rank but the first, it
    writes nothing."""

    def __init__(self, log: EventLog | None, state: TrainingState, dataset: Dataset) -> None:
        """Write into `log` at the clock of `state`, and name the images of `dataset`."""
        self._log, self._state, self._dataset = log, state, dataset
        self._compiled_for: set[tuple[int, ...]] = set()

    def write(self, event: str, **values: object) -> None:
        """Write one line."""
        if self._log is not None:
            self._log.write(event, samples_seen=self._state.clock.samples_seen, **values)

    def warn(self, kind: str, message: str, **values: object) -> None:
        """Write a warning."""
        self.write("warning", kind=kind, message=message, **values)

    def not_finite(self, message: str, rows: np.ndarray, **values: object) -> None:
        """Warn of a loss or a gradient that is not finite.

        Args:
            message: What it was.
            rows: The images that it is about; the first of them are named.
            values: Further fields of the line.
        """
        image_ids = [self._dataset.image_ids[row] for row in rows[:_MAX_NAMED]]
        self.warn("not_finite", message, **values, num_images=len(rows), image_ids=image_ids)

    def step(self, **values: float) -> None:
        """Write a step's numbers."""
        clock = self._state.clock
        self.write(
            "step", step=clock.step, epoch=clock.epoch, **values, num_skipped=clock.num_skipped
        )

    def epoch(self, pins: Mapping[str, Mapping[str, Any]], not_whole: list[str]) -> None:
        """Say which generations of latents an epoch reads, and which were not whole.

        Args:
            pins: The generations, by shard.
            not_whole: A line for each that was skipped.
        """
        epoch = self._state.clock.epoch
        for message in not_whole:
            self.warn("generation_not_whole", message, epoch=epoch)
        generations = {shard: pin["generation"] for shard, pin in pins.items()}
        self.write("epoch", epoch=epoch, generations=generations)

    def checkpoint(self, ready: Ready | None, stall_s: float) -> None:
        """Name a checkpoint that was written, if there is one; it has a clock of its own."""
        if ready is not None and self._log is not None:
            self._log.write(
                "checkpoint",
                samples_seen=ready.samples_seen,
                checkpoint=ready.checkpoint,
                folder=str(run_folder.checkpoint_folder(Path(), ready.samples_seen)),
                digest=ready.digest,
                validation_loss=ready.validation_loss,
                stall_s=stall_s,
            )

    def data_wait(self, interval: Interval) -> None:
        """Say how long the loop has waited for batches in an interval, and for what where it is too
        much."""
        self.write("data", **dataclasses.asdict(interval))
        if interval.share > MAX_DATA_WAIT and interval.waited_s > MIN_DATA_WAIT_S:
            message = (
                f"{interval.share:.1%} of {interval.seconds:.0f} s were spent waiting for batches; the slowest stage "
                f"of making them is {interval.slowest} ({interval.stages[interval.slowest]:.1f} s)"
            )
            self.warn("data_wait", message, epoch=self._state.clock.epoch)

    def compiled(self, graphs: Graphs | None, draw: Draw) -> None:
        """Say which graphs a micro-batch has compiled; for sizes that were trained on before there
        should be none."""
        if graphs is None:
            return
        num_graphs, causes = graphs.new()
        shape = (*draw.batch.latents.shape, draw.batch.ids[0].shape[1])
        if num_graphs:
            self.write("compiled", num_graphs=num_graphs, shape=list(shape))
            if shape in self._compiled_for:
                cause = "; ".join(causes) or "torch names no cause"
                message = (
                    f"compiled again for {in_words(draw)}, which the run was slowed by: {cause}"
                )
                self.warn("recompiled", message, epoch=self._state.clock.epoch)
        self._compiled_for.add(shape)

    def compiled_by_validation(self, graphs: Graphs | None) -> None:
        """Those of a validation are made once more in each process, without gradients: they repeat
        no step's."""
        if graphs is not None and (num_graphs := graphs.new()[0]):
            self.write("compiled", num_graphs=num_graphs, validation=True)

    def opening(
        self, start: Start, inputs: RunInputs, device: torch.device, num_ranks: int
    ) -> None:
        """Open an attempt: what is trained on what, and what was noticed meanwhile.

        Args:
            start: What the run begins or goes on with.
            inputs: Of the run.
            device: Of this rank.
            num_ranks: Of the run.
        """
        config, state, is_first = start.config, self._state, start.checkpoint is None
        self.write(
            "started" if is_first else "resumed",
            run=inputs.run,
            checkpoint=None
            if is_first
            else str(CheckpointName(inputs.run, state.clock.samples_seen)),
            fingerprint=inputs.fingerprint,
            base_digest=inputs.base_digest,
            num_samples=config.num_samples,
            num_train_images=len(start.dataset.train_rows),
            num_validation_images=len(start.dataset.validation_rows),
            num_trained_parameters=sum(weight.numel() for weight in state.parameters.values()),
            num_ranks=num_ranks,
            device=str(device),
            precision=config.precision,
            tf32=config.precision == "tf32",
            channels_last=config.compute.channels_last,
            compile=config.compute.compile,
            loss_scale=state.arithmetic.scaler_state().get("scale"),
            num_threads=torch.get_num_threads(),
            torch=torch.__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        if start.not_compiled:
            message = "compute.compile is left to the device, and nothing can be compiled here: training is slower"
            self.warn("not_compiled", message)
        for message in start.torn:
            self.warn("torn_checkpoint", message)


def in_words(draw: Draw) -> str:
    """What a micro-batch is."""
    height, width = draw.batch.bucket
    return (
        f"{len(draw.timesteps)} x {height}x{width} with {draw.batch.ids[0].shape[1]} chunks of text"
    )


def way_on(folder: Path, config: RunConfig, samples_seen: int) -> str:
    """How to go on from before a row of skipped steps; the same run would come to the same steps
    again.

    Args:
        folder: The run's folder.
        config: Of the run.
        samples_seen: Its clock before them; 0 where no step was good.
    """
    saved, base = "none was good, so begin another run", ""
    if samples_seen:
        checkpoint = run_folder.checkpoint_folder(folder, samples_seen)
        saved = f"the state before them is saved at {samples_seen} samples. Begin another run"
        if not trainable_of(config).needs_base:
            saved += " from there"
            base = f'[models] base = "{checkpoint}" in foundry.toml, and '
    return (
        f"{saved}, since a run keeps its recipe: {base}an optimizer.learning_rate below "
        f'{config.optimizer.learning_rate:g} or another precision than "{config.precision}", such as '
        '"bf16_amp" or "fp32"'
    )
