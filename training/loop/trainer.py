"""The training loop, read in one piece: order, batches, gradients, steps, and what is due at the
border of a step."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from training.config.run import RunConfig
from training.errors import TrainingError
from training.loop import noise
from training.loop.checkpoint import Writer, record_validation
from training.loop.conditioning import make_time_ids, predict
from training.loop.dataset import Draw
from training.loop.device_defaults import record
from training.loop.epochs import open_epoch, prepare_epoch
from training.loop.loss import mse_per_sample, prediction_target, timestep_weights
from training.loop.meters import Meters
from training.loop.prefetch import Prefetch, Sender
from training.loop.run_log import RunLog, in_words, way_on
from training.loop.startup import prepare
from training.loop.validate import FixedList, ListLosses
from training.models.compute import Graphs
from training.optimization.optim import schedule_factor, set_learning_rates
from training.optimization.ranks import Ranks
from training.runs.event_log import EventLog
from training.runs.run_folder import Ready, RunInputs
from training.seeds import Purpose

MAX_SKIPPED_IN_ROW = 8
"""Steps that are not finite, one after the other, that end a run."""

Sent = tuple[Draw, torch.cuda.Event | None]
"""A draw on its way to the device, and the mark behind its copies."""


class Trainer:
    """One process of a run: what it holds, and the loop."""

    def __init__(
        self,
        *,
        folder: Path,
        config: RunConfig,
        inputs: RunInputs,
        ranks: Ranks,
        log: EventLog | None,
        stop_requested: Callable[[], bool],
    ) -> None:
        """Check everything that the run needs and load it.

        Args:
            folder: The run's folder.
            config: Its config, as it stands in the folder; `auto` is resolved here.
            inputs: Its inputs.
            ranks: This process among the others.
            log: The event log on rank 0, None elsewhere.
            stop_requested: Asked between micro-batches; any rank's yes stops all.

        Raises:
            PipelineError: what is missing, damaged, or does not fit together.
        """
        start = prepare(folder, config, inputs, ranks)
        config = start.config
        self.folder, self.config, self.inputs, self.ranks = folder, config, inputs, ranks
        self.stop_requested, self.device_name = stop_requested, start.device.name
        self.state, self.dataset, self.flops = start.state, start.dataset, start.flops
        self.log = RunLog(log, self.state, self.dataset)
        scheduler = self.state.parts.noise_scheduler_config
        self.prediction_type = scheduler.get("prediction_type", "epsilon")
        self.signal = noise.alphas_cumprod(scheduler).to(ranks.device)  # (T,)
        self.weights = timestep_weights(
            config.loss, self.signal, self.prediction_type, config.rules_version
        )  # (T,)
        self.meters = Meters(
            device=ranks.device, num_samples=config.num_samples, peak_flops=start.peak_flops
        )
        self.sender, self.worker = (
            Sender(ranks.device),
            ThreadPoolExecutor(1, thread_name_prefix="batches"),
        )
        self.graphs = Graphs() if config.compute.compile else None
        self.held_out, self.stable = (
            FixedList(rows[: config.validation.num_images], self.dataset, ranks, len(self.signal))
            for rows in (self.dataset.validation_rows, self.dataset.stable_rows)
        )
        self.writer = Writer(folder, config, inputs)
        self.saved_at, self.stall_s = self.state.clock.samples_seen, 0.0
        self.last_good = dataclasses.replace(self.state.clock)
        self._open_epoch()
        self.log.opening(start, inputs, ranks.device, ranks.size)
        self._log_epoch()

    def run(self) -> str:
        """Train to the end or to a stop request; returns `finished` or `stopped`, which is also
        logged.

        Raises:
            TrainingError: too many steps in a row were not finite; the last good state is saved.
            PipelineError: a file could not be read or written.
        """
        try:
            began = time.monotonic()
            ending = self._run()
            self._finish_checkpoint()
            self.log.write(ending, seconds=time.monotonic() - began)
            return ending
        finally:
            self.writer.close()
            self.worker.shutdown(cancel_futures=True)
            if self.graphs is not None:
                self.graphs.close()

    def _run(self) -> str:
        config, clock = self.config, self.state.clock
        owed = clock.validation_owed
        if owed or clock.samples_seen == 0:
            if not self._validate():
                return self._stop()
            if owed and self.ranks.rank == 0:
                self._log_checkpoint(record_validation(self.folder, clock))
        if self.ranks.rank == 0 and clock.samples_seen == 0:
            record(self.folder, config, self.device_name)
        while clock.samples_seen < config.num_samples:
            if clock.step_in_epoch == self.order.num_steps:
                clock.epoch, clock.step_in_epoch = clock.epoch + 1, 0
                self._open_epoch()
                self._log_epoch()
            upcoming = self._upcoming()
            if upcoming:
                self.dataset.prompt_maker.expect(np.concatenate(upcoming), clock.epoch)
            with Prefetch(self._draw, upcoming, self.worker, config.compute.prefetch) as draws:
                while (
                    clock.step_in_epoch < self.order.num_steps
                    and clock.samples_seen < config.num_samples
                ):
                    if not self.order.step_size(clock.step_in_epoch):
                        clock.step_in_epoch += 1  # all of its images were forgotten
                        continue
                    before = clock.samples_seen
                    if not self._step(draws):
                        return self._stop()
                    self._log_checkpoint(self.writer.done())
                    is_last = clock.samples_seen >= config.num_samples
                    validates = is_last or _is_due(
                        before, clock.samples_seen, config.validation.every_samples
                    )
                    if validates:
                        self.log.data_wait(self.meters.interval(self.dataset.times.seconds))
                        if not self._validate():
                            return self._stop()
                    # After skipped steps the next finite one saves, so that every resume does a row
                    # of them again.
                    good, every = self.last_good.samples_seen, config.checkpoints.every_samples
                    if is_last or (
                        clock.skipped_in_row == 0 and _is_due(good, clock.samples_seen, every)
                    ):
                        self._save()
        return "finished"

    def _stop(self) -> str:
        """Save the state after the last finished step; skipped ones after it are done again by the
        next launch."""
        if self.state.clock.skipped_in_row:
            self._rewind()
        self._save()
        return "stopped"

    def _rewind(self) -> None:
        """Set clock and scaler back to before a row of skipped steps, which changed nothing
        else."""
        self.state.clock = self.last_good
        self.state.arithmetic.restore_scaler(self.last_good.scaler)

    def _step(self, draws: Prefetch[Sent]) -> bool:
        """One optimizer step; False when a stop request dropped it, with nothing changed."""
        clock, arithmetic = self.state.clock, self.state.arithmetic
        gradients = arithmetic.gradients
        began, waited, flops, num_truncated = time.monotonic(), draws.waited_s, 0.0, 0
        if clock.skipped_in_row == 0:
            self.last_good = dataclasses.replace(clock, scaler=arithmetic.scaler_state())
        micro_batches, size = (
            self.order.micro_batches(clock.step_in_epoch),
            self.order.step_size(clock.step_in_epoch),
        )
        offsets = np.cumsum([0, *(len(rows) for rows in micro_batches)])
        losses = torch.zeros(size, device=self.ranks.device)
        gradients.begin()
        for first in range(0, len(micro_batches), self.ranks.size):
            if self.ranks.any(self.stop_requested()):
                return False
            index = first + self.ranks.rank
            if index < len(micro_batches):
                if first + self.ranks.size >= len(micro_batches):
                    gradients.expect_last()
                draw = self._receive(next(draws))
                own = self._pass(draw, size)
                losses[offsets[index] : offsets[index + 1]] = own
                flops += len(own) * self.flops(*draw.batch.bucket, draw.batch.ids[0].shape[1]).model
                num_truncated += draw.batch.num_truncated
                self.log.compiled(self.graphs, draw)
            gradients.end_round(len(micro_batches) - first)
        gradients.finish()

        # The one place where the host waits for the device: what the log says, and whether the step
        # is finite.
        *read, grad_norm = torch.cat([losses, arithmetic.norm().reshape(1)]).tolist()
        numbers = self.ranks.sum_(torch.tensor([*read, flops, num_truncated], dtype=torch.float64))
        losses, loss = numbers[:size], numbers[:size].mean().item()
        if self.ranks.any(not (math.isfinite(loss) and math.isfinite(grad_norm))):
            self._skip(size, losses, np.concatenate(micro_batches))
            return True
        self._wait_until_copied()
        arithmetic.unscale_and_clip(grad_norm, self.config.optimizer.max_grad_norm)
        factor = schedule_factor(
            self.config.optimizer, clock.samples_trained + size / 2, self.config.num_samples
        )
        rates = set_learning_rates(self.state.optimizer, factor)
        arithmetic.step(self.state.optimizer, functools.partial(self._average, size))
        self.state.sharding.publish()
        self._advance(size)
        clock.samples_trained += size
        clock.skipped_in_row = 0
        flops, truncated = numbers[size:].tolist()
        measured = self.meters.step(
            size=size, seconds=time.monotonic() - began, waited_s=draws.waited_s - waited, flops=flops,
            samples_seen=clock.samples_seen,
        )  # fmt: skip
        self.log.step(loss=loss, grad_norm=grad_norm, num_truncated=truncated, **rates, **measured)
        return True

    def _average(self, num_samples: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Move the averages, where there are any, of some weights that a step of so many samples
        has changed."""
        clock = self.state.clock
        if self.state.ema is not None:
            before = clock.step - clock.num_skipped if self.config.optimizer.ema_warmup else None
            self.state.ema.update(weights, num_samples, before)

    def _wait_until_copied(self) -> None:
        """Let a checkpoint that is being copied have the state as it was; what that takes is part
        of its stall."""
        began = time.monotonic()
        self.writer.wait_until_copied()
        self.stall_s += time.monotonic() - began

    def _advance(self, size: int) -> None:
        clock = self.state.clock
        clock.samples_seen += size
        clock.step += 1
        clock.step_in_epoch += 1

    def _skip(self, size: int, losses: torch.Tensor, rows: np.ndarray) -> None:
        """Leave a step out whose loss or gradient is not finite; all ranks do, or none."""
        clock, step_in_epoch = self.state.clock, self.state.clock.step_in_epoch
        self._advance(size)
        clock.num_skipped += 1
        clock.skipped_in_row += 1
        bad = rows[~losses.isfinite().numpy()]
        what = f"loss of {len(bad)} samples" if len(bad) else "gradient"
        message = f"step {clock.step} skipped: {what} not finite ({clock.skipped_in_row} in a row)"
        named = bad if len(bad) else rows
        self.log.not_finite(message, named, epoch=clock.epoch, step_in_epoch=step_in_epoch)
        self.state.arithmetic.skip()
        collapsed = self.state.arithmetic.collapsed
        if clock.skipped_in_row >= MAX_SKIPPED_IN_ROW or collapsed:
            self._rewind()
            self._save()
            self._finish_checkpoint()
            reason = "the gradient scaler fell below 1" if collapsed else (
                f"{MAX_SKIPPED_IN_ROW} steps in a row had a loss or gradient that is not finite"
            )  # fmt: skip
            good = self.last_good.samples_seen
            raise TrainingError(f"{reason}; {way_on(self.folder, self.config, good)}")

    def _draw(self, rows: np.ndarray) -> Sent:
        """A training batch with its timesteps and noise, on its way to the device, ahead of the
        step that uses it."""
        seed, epoch = self.config.seed, self.state.clock.epoch
        batch = self.dataset.batch(rows, epoch)
        offset, shape = self.config.loss.noise_offset, batch.latents.shape[1:]
        with self.dataset.times.stage("noise"):
            timesteps = noise.draw_timesteps(seed, epoch, batch.image_ids, len(self.signal))
            own = noise.draw_noise(
                seed, Purpose.NOISE, epoch, batch.image_ids, shape, offset=offset
            )
        with self.dataset.times.stage("sending"):
            return Draw(batch=batch, timesteps=timesteps, noise=own).moved(
                self.sender.send
            ), self.sender.sent()

    def _receive(self, sent: Sent) -> Draw:
        draw, mark = sent
        self.sender.receive(mark, draw.tensors())
        return draw

    def _pass(self, draw: Draw, size: int) -> torch.Tensor:
        """Forward and backward of a micro-batch of a step of `size` samples; its losses `(B,)`
        without their graph."""
        with self._compiling(draw):
            losses = self._losses(draw)
            self.state.arithmetic.backward(losses.sum() / size)
        return losses.detach()

    def _losses_of(self, draw: Draw) -> torch.Tensor:
        """What a validation asks for: the plain losses `(B,)` of a draw."""
        with self._compiling(draw):
            return self._plain_losses(draw)

    @contextlib.contextmanager
    def _compiling(self, draw: Draw) -> Iterator[None]:
        """Within, what cannot be compiled is named with the option that asks for it."""
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(
                f'compute.compile="{self.config.compute.compile}": {in_words(draw)} cannot be compiled; set it to '
                f"false, which may be changed in a run ({reason})"
            ) from error

    def _losses(self, draw: Draw) -> torch.Tensor:
        """Weighted loss per sample `(B,)` fp32, with gradients."""
        return self._plain_losses(draw) * self.weights[draw.timesteps]

    def _plain_losses(self, draw: Draw) -> torch.Tensor:
        """Loss per sample `(B,)` fp32 of one forward pass, not weighted by timestep."""
        batch, timesteps = draw.batch, draw.timesteps
        noised = noise.add_noise(batch.latents, draw.noise, timesteps, self.signal)
        target = prediction_target(
            self.prediction_type, batch.latents, draw.noise, timesteps, self.signal
        )
        time_ids = make_time_ids(batch.original_size, batch.crop_top_left, batch.target_size)
        with self.state.arithmetic.autocast():
            prediction = predict(
                self.state.parts, noised, timesteps, batch.ids, time_ids,
                clip_skip=self.config.clip_skip, zeroed=batch.zeroed,
            )  # fmt: skip
        return mse_per_sample(prediction, target, batch.mask)

    def _open_epoch(self) -> None:
        """Fix order and latents of the clock's epoch unless an earlier attempt has, and read
        them."""
        epoch = self.state.clock.epoch
        if self.ranks.rank == 0:
            self.pins, self.passed_over = prepare_epoch(
                self.folder,
                epoch,
                self.dataset,
                self.config,
                self.inputs.fingerprint,
                self.inputs.num_left_out,
            )
        self.ranks.barrier()
        self.order = open_epoch(self.folder, epoch, self.state.clock.step_in_epoch, self.dataset)

    def _log_epoch(self) -> None:
        if self.ranks.rank == 0:
            self.log.epoch(self.pins, self.passed_over)

    def _upcoming(self) -> list[np.ndarray]:
        """This rank's micro-batches from the clock's step to the end of the epoch."""
        steps = range(self.state.clock.step_in_epoch, self.order.num_steps)
        own = (self.order.micro_batches(step)[self.ranks.rank :: self.ranks.size] for step in steps)
        return list(itertools.chain.from_iterable(own))

    def _validate(self) -> bool:
        """The plain loss on both lists, of the raw and of the averaged weights; the clock keeps the
        first.

        False when a stop request dropped it, with nothing logged: then a resume owes it.
        """
        clock, began = self.state.clock, time.monotonic()
        clock.validation_owed = True
        raw = self._both_lists()
        if raw is None:
            return False
        values = self._views(*raw)
        if self.state.ema is not None:
            with self.state.averaged():
                averaged = self._both_lists()
            if averaged is None:
                return False
            values |= {f"ema_{name}": value for name, value in self._views(*averaged).items()}
        clock.validation_owed, clock.validation_loss = False, raw[0].mean
        self.log.compiled_by_validation(self.graphs)
        self.log.write("validation", **values, seconds=time.monotonic() - began)
        return True

    def _both_lists(self) -> tuple[ListLosses, ListLosses] | None:
        """Losses of the held-out and of the stable images by the weights that the model holds; None
        when stopped."""
        found = []
        for name, images in (("held-out", self.held_out), ("stable", self.stable)):
            losses = images.losses(self._losses_of, self.worker, self.sender, self.stop_requested)
            if losses is None:
                return None
            if losses.not_finite:
                message = f"validation: loss of {len(losses.not_finite)} of {len(images.rows)} {name} images not finite"
                self.log.not_finite(message, images.rows[losses.not_finite])
            found.append(losses)
        return found[0], found[1]

    def _views(self, held_out: ListLosses, stable: ListLosses) -> dict[str, object]:
        """What a validation logs of one model's losses."""
        return {
            "loss": held_out.mean, "stable_loss": stable.mean, "stable_weighted_loss": stable.weighted(self.weights),
            "t": held_out.by_bin(self.config.validation.num_bins), "bucket": held_out.by_bucket(),
        }  # fmt: skip

    def _save(self) -> None:
        """Begin to write a checkpoint at the clock unless there is one; the base model is not
        written again."""
        clock, began = self.state.clock, time.monotonic()
        if clock.samples_seen == self.saved_at:
            return
        self._finish_checkpoint()
        self.writer.begin(self.state)
        self.saved_at = clock.samples_seen
        self.stall_s = time.monotonic() - began

    def _finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written, on all ranks."""
        self._log_checkpoint(self.writer.finish())
        self.ranks.barrier()

    def _log_checkpoint(self, ready: Ready | None) -> None:
        self.log.checkpoint(ready, self.stall_s)


def _is_due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` samples lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every
