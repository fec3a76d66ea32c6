"""Checkpoints: a complete diffusers folder, with `state/` what a resume needs besides, and
READY.json last.

Training goes on while one is written: a thread copies the state to the CPU while the next step's
gradients are made, which change nothing of it, then writes it under a temporary name and renames
it. Safetensors and JSON only: nothing in a checkpoint can run code.
"""

import dataclasses
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file

from training import commit, manifests, toml
from training.config import older_runs
from training.config.run import FREE_KEYS, RunConfig
from training.errors import ConfigError, DamageError, ModelError, TrainingError
from training.loop.state import Capture, Clock, Snapshot, TrainingState
from training.names import CheckpointName
from training.optimization.optim import restore_optimizer
from training.runs import run_folder
from training.runs.resumable import check_version
from training.runs.retention import apply_retention
from training.runs.run_folder import STATE, Ready, RunInputs

EMA_FOLDER = "ema"
_CLOCK = "clock.json"
_OPTIMIZER = "optimizer.safetensors"
_OLD_EMA = "ema.safetensors"
"""Where older versions kept the averages a second time."""
_IN_READY = ("validation_loss", "validation_owed")
"""What the clock takes from READY.json: a validation that a resume makes up for is recorded
there."""


class Writer:
    """Writes one checkpoint at a time in a thread; a context manager that waits for the last
    one."""

    def __init__(self, folder: Path, config: RunConfig, inputs: RunInputs) -> None:
        """Name the run's folder, and what is recorded in every checkpoint."""
        self._folder, self._config, self._inputs = folder, config, inputs
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Ready | None] | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, state: TrainingState) -> None:
        """Begin to copy and write the state; the checkpoint before must have been taken by `done`
        or `finish`."""
        assert self._pending is None, "two checkpoints at once"
        self._copied.clear()
        self._pending = self._pool.submit(self._save, Capture(state))

    def wait_until_copied(self) -> None:
        """Wait until the state may change again."""
        self._copied.wait()

    def _save(self, capture: Capture) -> Ready | None:
        try:
            snapshot = capture.copy()
        finally:
            self._copied.set()
        return (
            None if snapshot is None else write(self._folder, snapshot, self._config, self._inputs)
        )

    def done(self) -> Ready | None:
        """What has been written since it was last asked, without waiting.

        Raises:
            WorkspaceError: the disk is full; earlier checkpoints stay.
        """
        return self.finish() if self._pending is not None and self._pending.done() else None

    def finish(self) -> Ready | None:
        """Wait for the checkpoint in work, if there is one; raises as `done`."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """End the thread after the checkpoint in work."""
        self._pool.shutdown(wait=True)


def write(folder: Path, snapshot: Snapshot, config: RunConfig, inputs: RunInputs) -> Ready:
    """Write the checkpoint of a run, then free what its retention rule no longer keeps.

    Args:
        folder: The run's folder.
        snapshot: What is saved.
        config: Recorded; its retention rule applies.
        inputs: Recorded.

    Raises:
        WorkspaceError: the disk is full, or a whole checkpoint is in the way; earlier ones stay.
    """
    clock = snapshot.clock
    target = run_folder.checkpoint_folder(folder, clock.samples_seen)
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    for left in target.parent.glob(f"{commit.TEMPORARY_PREFIX}*"):
        shutil.rmtree(
            left
        )  # of a trainer that was killed: only the holder of the run's lock writes here
    with commit.atomic_folder(target) as temporary:
        for path, weights in (
            (temporary, snapshot.weights),
            (temporary / EMA_FOLDER, snapshot.averages),
        ):
            if weights:
                snapshot.trainable.save(
                    path, snapshot.parts, snapshot.frozen | weights, inputs.base_digest
                )
        files = _entries(temporary)
        _write_state(temporary / STATE, snapshot)
        ready = Ready(
            run=inputs.run,
            checkpoint=str(CheckpointName(inputs.run, clock.samples_seen)),
            samples_seen=clock.samples_seen,
            files=files,
            state_files=_entries(temporary / STATE, prefix=f"{STATE}/"),
            digest=_weights_digest(files),
            fingerprint=inputs.fingerprint,
            base_digest=inputs.base_digest,
            validation_loss=clock.validation_loss,
            validation_owed=clock.validation_owed,
            config=toml.dump(config),
        )
        run_folder.write_ready(temporary, ready)
    apply_retention(folder, config.checkpoints)
    return ready


def record_validation(folder: Path, clock: Clock) -> Ready:
    """Write the validation that a resume made up for into the checkpoint at the clock, as if it had
    not been dropped.

    Args:
        folder: The run's folder.
        clock: At the checkpoint that was resumed from.
    """
    path = run_folder.checkpoint_folder(folder, clock.samples_seen)
    values = {name: getattr(clock, name) for name in _IN_READY}
    ready = dataclasses.replace(run_folder.read_ready(path), **values)
    run_folder.write_ready(path, ready)
    return ready


def _is_whole(path: Path) -> bool:
    check_version(path)
    try:
        run_folder.check_checkpoint(path)
    except DamageError:
        return False
    return True


def check_same_run(checkpoint: Path, config: RunConfig, inputs: RunInputs) -> None:
    """Refuse to go on with another run's checkpoint, or another set or other values than it was
    made with.

    Raises:
        TrainingError: names the difference; intervals, retention, layout and the number of ranks
            may change.
    """
    ready = run_folder.read_ready(checkpoint)
    if ready.run != inputs.run:
        raise TrainingError(
            f"{checkpoint} is a checkpoint of run {ready.run}, inputs.json names run {inputs.run}"
        )
    if ready.base_digest != inputs.base_digest:
        raise TrainingError(
            f"{checkpoint} was trained from base model {ready.base_digest[:16]}, inputs.json names "
            f"{inputs.base_digest[:16]}: it may be of another architecture; a run keeps its base model"
        )
    if ready.fingerprint != inputs.fingerprint:
        raise TrainingError(
            f"{checkpoint} was trained on set {ready.fingerprint}, inputs.json names {inputs.fingerprint}: "
            "a run keeps its training set"
        )
    try:
        before = older_runs.build(ready.config)
    except ConfigError as error:
        raise TrainingError(
            f"{checkpoint} was made by another version of this code, which named {error}"
        ) from None
    old, new = toml.flatten(toml.dump(before)), toml.flatten(toml.dump(config))
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]
    if changed:
        raise TrainingError(
            f"a run keeps its config, but {checkpoint} differs: {'; '.join(changed)}"
        )


def restore_state(checkpoint: Path, state: TrainingState) -> None:
    """Fill this rank's share of optimizer and averages, and the clock; the weights are loaded
    already.

    Raises:
        DamageError: a tensor is missing or of another shape.
    """
    folder = checkpoint / STATE
    try:
        restore_optimizer(state.optimizer, state.arithmetic.weights, load_file(folder / _OPTIMIZER))
        if state.ema is not None:
            old = folder / _OLD_EMA
            state.ema.restore(
                load_file(old)
                if old.is_file()
                else state.trainable.load(checkpoint / EMA_FOLDER, state.ema.shadows)
            )
    except (KeyError, ValueError, ModelError) as error:
        raise DamageError(f"{folder} does not hold the state of this model: {error}") from None
    ready = run_folder.read_ready(checkpoint)
    written = json.loads((folder / _CLOCK).read_bytes())
    state.clock = Clock(**written | {name: getattr(ready, name) for name in _IN_READY})
    state.arithmetic.restore_scaler(state.clock.scaler)


def _write_state(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir()
    save_file(snapshot.optimizer, folder / _OPTIMIZER)
    clock = {
        name: value
        for name, value in dataclasses.asdict(snapshot.clock).items()
        if name not in _IN_READY
    }
    (folder / _CLOCK).write_text(json.dumps(clock, indent=1, sort_keys=True) + "\n")


def _weights_digest(files: Sequence[manifests.Entry]) -> str:
    """Over the trained model alone: configs name the versions of libraries, and the average is
    another model."""
    weights = (entry for entry in files if entry.name.endswith(".safetensors"))
    return commit.json_digest(
        [
            [entry.name, entry.sha256]
            for entry in weights
            if not entry.name.startswith(f"{EMA_FOLDER}/")
        ]
    )


def _entries(folder: Path, prefix: str = "") -> tuple[manifests.Entry, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        manifests.Entry(
            name=prefix + path.relative_to(folder).as_posix(),
            sha256=commit.sha256_file(path),
            bytes=path.stat().st_size,
        )
        for path in paths
    )
