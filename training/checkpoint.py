"""Checkpoints: a complete diffusers folder, with `state/` what a resume needs besides, and READY.json last.

Written under a temporary name and renamed. Safetensors and JSON only: nothing in a checkpoint can run code.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training import commit, run_folder, toml
from training.ema import Ema
from training.errors import DamageError, TrainingError
from training.models.unet import PipelineParts, save_diffusers_folder
from training.run_config import FREE_KEYS, RunConfig
from training.run_folder import STATE, Ready, RunInputs

EMA_FOLDER = "ema"
_CLOCK = "clock.json"
_OPTIMIZER = "optimizer.safetensors"
_EMA_STATE = "ema.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True, kw_only=True)
class Clock:
    """Where a run stands: the border after its last finished step."""

    samples_seen: int = 0
    """Samples that steps were made from, skipped steps included: the run's clock."""
    samples_trained: int = 0
    """Without those of skipped steps: the learning rate's clock."""
    step: int = 0
    """Steps behind us."""
    epoch: int = 0
    """The epoch of the next step."""
    step_in_epoch: int = 0
    """The next step's place in its epoch."""
    num_skipped: int = 0
    """Steps that were not finite."""
    skipped_in_row: int = 0
    """Of those, since the last finite one."""
    validation_loss: float | None = None
    """The last plain one on the held-out images."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Everything that steps change."""

    parts: PipelineParts
    parameters: dict[str, torch.nn.Parameter]
    """The trained ones, by name."""
    optimizer: torch.optim.AdamW
    ema: Ema | None
    clock: Clock


def save(folder: Path, state: TrainingState, config: RunConfig, inputs: RunInputs) -> Ready:
    """Write the checkpoint of a run at its clock, then free the state of those that are too old.

    Args:
        folder: The run's folder.
        state: What is saved; unchanged afterwards.
        config: Recorded; its retention rule applies.
        inputs: Recorded.

    Raises:
        WorkspaceError: the disk is full; earlier checkpoints stay.
    """
    clock = state.clock
    target = run_folder.checkpoint_folder(folder, clock.samples_seen)
    if target.exists():
        # Whole checkpoints are resumed from and never written again, so this one is torn or rotten.
        shutil.rmtree(target)
    for left in target.parent.glob(f"{commit.TEMPORARY_PREFIX}*"):
        shutil.rmtree(left)  # of a trainer that was killed: only the holder of the run's lock writes here
    with commit.atomic_folder(target) as temporary:
        save_diffusers_folder(state.parts, temporary, torch.float32)
        if state.ema is not None:
            with state.ema.swapped(state.parameters):
                save_diffusers_folder(state.parts, temporary / EMA_FOLDER, torch.float32)
        files = _entries(temporary)
        _save_state(temporary / STATE, state)
        ready = Ready(
            run=inputs.run,
            checkpoint=f"{inputs.run}@{clock.samples_seen}",
            samples_seen=clock.samples_seen,
            files=files,
            state_files=_entries(temporary / STATE, prefix=f"{STATE}/"),
            digest=_weights_digest(files),
            fingerprint=inputs.fingerprint,
            base_digest=inputs.base_digest,
            validation_loss=clock.validation_loss,
            config=toml.dump(config),
        )
        run_folder.write_ready(temporary, ready)
    for old in run_folder.checkpoints(folder)[: -config.checkpoints.keep_last]:
        shutil.rmtree(old / STATE, ignore_errors=True)
    return ready


def find_resumable(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, state included, by the digests of all its files.

    Returns:
        Its folder, or None to begin from the base model; and a line for each newer one that is torn.
    """
    torn = []
    for path in sorted((folder / run_folder.CHECKPOINTS).glob("samples_*"), reverse=True):
        try:
            run_folder.check_checkpoint(path)
        except DamageError as error:
            torn.append(f"ignored an incomplete checkpoint: {error}")
        else:
            if (path / STATE).exists():
                return path, torn
    return None, torn


def check_same_run(checkpoint: Path, config: RunConfig, inputs: RunInputs) -> None:
    """Refuse to go on with another training set or other values than the checkpoint was made with.

    Raises:
        TrainingError: names the difference; intervals, retention and the number of ranks may change.
    """
    ready = run_folder.read_ready(checkpoint)
    if ready.fingerprint != inputs.fingerprint:
        raise TrainingError(
            f"{checkpoint} was trained on set {ready.fingerprint}, inputs.json names {inputs.fingerprint}: "
            "a run keeps its training set"
        )
    old, new = toml.flatten(ready.config), toml.flatten(toml.dump(config))
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]
    if changed:
        raise TrainingError(f"a run keeps its config, but {checkpoint} differs: {'; '.join(changed)}")


def restore_state(checkpoint: Path, state: TrainingState) -> None:
    """Fill optimizer, averaged weights and clock from `state/`; the weights are loaded already.

    Raises:
        DamageError: a tensor is missing or of another shape.
    """
    folder = checkpoint / STATE
    tensors = load_file(folder / _OPTIMIZER)
    expected = {f"{moment}.{name}" for moment in _MOMENTS for name in state.parameters}
    if expected != set(tensors):
        different = sorted(expected ^ set(tensors))
        raise DamageError(f"{folder / _OPTIMIZER}: {len(different)} tensors differ, such as {different[0]}")
    for name, parameter in state.parameters.items():
        moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        state.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    if state.ema is not None:
        shadows = load_file(folder / _EMA_STATE)
        state.ema.shadows = {name: shadows[name].to(parameter.device) for name, parameter in state.parameters.items()}
    state.clock = Clock(**json.loads((folder / _CLOCK).read_bytes()))


def _save_state(folder: Path, state: TrainingState) -> None:
    folder.mkdir()
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in state.parameters.items():
        # A parameter has no moments before its first finite step.
        own: Mapping[str, torch.Tensor] = state.optimizer.state.get(parameter) or {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros((), dtype=torch.float32),
        }
        moments |= {f"{moment}.{name}": own[moment].detach().cpu().contiguous() for moment in _MOMENTS}
    save_file(moments, folder / _OPTIMIZER)
    if state.ema is not None:
        shadows = {name: shadow.cpu().contiguous() for name, shadow in state.ema.shadows.items()}
        save_file(shadows, folder / _EMA_STATE)
    (folder / _CLOCK).write_text(json.dumps(dataclasses.asdict(state.clock), indent=1, sort_keys=True) + "\n")


def _weights_digest(files: Sequence[commit.Entry]) -> str:
    """Over the trained model alone: configs name the versions of libraries, and the average is another model."""
    weights = (entry for entry in files if entry.name.endswith(".safetensors"))
    return commit.json_digest(
        [[entry.name, entry.sha256] for entry in weights if not entry.name.startswith(f"{EMA_FOLDER}/")]
    )


def _entries(folder: Path, prefix: str = "") -> tuple[commit.Entry, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        commit.Entry(
            name=prefix + path.relative_to(folder).as_posix(),
            sha256=commit.sha256_file(path),
            bytes=path.stat().st_size,
        )
        for path in paths
    )
