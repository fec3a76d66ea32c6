"""Everything a run needs, checked and loaded before its first step."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from training import toml
from training.config.run import RunConfig
from training.curation import vocabulary
from training.errors import TrainingError
from training.estimates.flops import Flops, peak_flops, read_model_configs, training_flops
from training.latents.source import LatentSource
from training.loop import checkpoint
from training.loop.dataset import Dataset
from training.loop.device_defaults import CPU, Device, recorded_in, resolve
from training.loop.loading import check_digest, fill, load_model
from training.loop.requirements import check_trainable
from training.loop.state import Clock, TrainingState
from training.models.compute import apply_compute, why_not_compiled
from training.models.trainable import Trainable
from training.models.trainables import trainable_of
from training.models.unet import PipelineParts
from training.optimization.ema import Ema
from training.optimization.optim import make_optimizer
from training.optimization.precision import Arithmetic
from training.optimization.ranks import Ranks
from training.optimization.sharding import Sharding
from training.runs import run_folder
from training.runs.resumable import find_resumable
from training.runs.run_folder import READY, RunInputs, checked_training_set
from training.runs.training_set import require_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins or goes on."""

    config: RunConfig
    """The run's, with what `auto` comes to on this machine."""
    device: Device
    """This rank's."""
    not_compiled: bool
    """Whether the run was to be compiled by default and cannot be."""
    state: TrainingState
    dataset: Dataset
    flops: Callable[[int, int, int], Flops]
    """What a sample of (height, width, number of chunks) takes; height and width in pixels."""
    peak_flops: float | None
    """Floating-point operations a second of all devices of the run together; None where that is not
    known."""
    checkpoint: Path | None
    """What it resumes from; None for the base model."""
    torn: list[str]
    """A line for each newer checkpoint that is not whole."""


def prepare(folder: Path, config: RunConfig, inputs: RunInputs, ranks: Ranks) -> Start:
    """Load the newest whole checkpoint, or the base model, and the training set; called by all
    ranks.

    Raises:
        ConfigError: a rule between options that only the model or the number of ranks decides.
        TrainingError: the checkpoint belongs to another set or config, or other machines see
            another run folder.
        ModelError: the base model or the VAE is not the one that `inputs.json` names, or cannot be
            loaded.
        DamageError: the training set's file is gone or changed.
        DataError: nothing to train on, or images of the set were forgotten.
    """
    resumed, torn = ranks.from_first(lambda: find_resumable(folder))
    _check_shared(folder, config, resumed, ranks)
    ready = None if resumed is None else run_folder.read_ready(resumed)
    by_default = config.compute.compile == "auto"
    device, recorded = describe(ranks.device), {} if ready is None else recorded_in(ready.config)
    config = ranks.from_first(lambda: resolve(config, device, recorded))
    if resumed is not None:
        checkpoint.check_same_run(resumed, config, inputs)
    require_whole(inputs)
    trainable = trainable_of(config)
    whole = None if trainable.needs_base else resumed
    source = whole or inputs.base_model
    with _digests_checked(inputs if whole is None and ranks.rank == 0 else None):
        model = read_model_configs(source)
        check_trainable(source, model, config, ranks.size)
        parts = load_model(source, None if whole else inputs.vae, config, ranks.device)
    fetched = folder / run_folder.FETCHED if config.latents_url else inputs.latents
    dataset = Dataset(
        checked_training_set(inputs),
        vocabulary.read(inputs.vocabulary, inputs.vocabulary_sha256),
        LatentSource(fetched, config.latents_url, inputs.vae_digest),
        config,
        parts.tokenizers,
        parts.vae.config.scaling_factor,
    )
    state = _make_state(parts, trainable, config, resumed, ranks)
    peak = peak_flops(ranks.device, config.precision)
    return Start(
        config=config,
        device=device,
        not_compiled=by_default and device.is_gpu and not config.compute.compile,
        state=state,
        dataset=dataset,
        flops=training_flops(model, config),
        peak_flops=None if peak is None else peak * ranks.size,
        checkpoint=resumed,
        torn=torn,
    )


def _make_state(
    parts: PipelineParts,
    trainable: Trainable,
    config: RunConfig,
    resumed: Path | None,
    ranks: Ranks,
) -> TrainingState:
    """Put what is trained into a model, and what steps change around it, as at the start or as a
    checkpoint has it."""
    parameters = trainable.inject(parts)
    if resumed is not None and trainable.needs_base:
        fill(parameters, trainable, resumed)
    apply_compute(parts, config.compute, micro_batch_size=config.batch.micro_batch_size)
    sharding = Sharding(parameters, ranks, config)
    arithmetic = Arithmetic(
        config, parts, parameters, sharding.owned, ranks=ranks, keep_frozen=not trainable.needs_base
    )
    half_life = config.optimizer.ema_half_life_samples
    state = TrainingState(
        trainable=trainable,
        parts=parts,
        parameters=parameters,
        sharding=sharding,
        arithmetic=arithmetic,
        optimizer=make_optimizer(config.optimizer, arithmetic.weights),
        ema=Ema(arithmetic.values(), half_life) if half_life else None,
        clock=Clock(),
    )
    if resumed is not None:
        checkpoint.restore_state(resumed, state)
    return state


def describe(device: torch.device) -> Device:
    """What a run's defaults ask of its device."""
    if device.type != "cuda":
        return dataclasses.replace(CPU, not_compiled=lambda: why_not_compiled(device))
    # bf16 and TF32 came with Ampere, compute capability 8.0; torch emulates bf16 on older cards.
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return Device(
        name=torch.cuda.get_device_name(device), is_gpu=True, has_bf16=ampere, has_tf32=ampere,
        not_compiled=lambda: why_not_compiled(device),
    )  # fmt: skip


def _check_shared(folder: Path, config: RunConfig, resumed: Path | None, ranks: Ranks) -> None:
    """Check that this rank's machine sees what rank 0's sees.

    Raises:
        TrainingError: it does not.
    """
    name, first = ranks.from_first(
        lambda: (None if resumed is None else resumed.name, toml.dump(config))
    )
    here = None if name is None else folder / run_folder.CHECKPOINTS / name / READY
    if first != toml.dump(config) or (here is not None and not here.is_file()):
        raise TrainingError(
            f"rank {ranks.rank} sees another run folder {folder} than rank 0, which has "
            f"{'no checkpoint' if name is None else name}: all machines of a run must share its folder"
        )


@contextlib.contextmanager
def _digests_checked(inputs: RunInputs | None) -> Iterator[None]:
    """Hash what a run begins from while it is loaded; what has changed is told of first, whatever
    else goes wrong.

    Raises:
        ModelError: the base model or the VAE is not the one that `inputs.json` names.
    """

    def check(inputs: RunInputs) -> None:
        check_digest("base model", inputs.base_model, inputs.base_digest)
        if inputs.vae is not None:
            check_digest("VAE", inputs.vae, inputs.vae_digest)

    if inputs is None:
        yield
        return
    with ThreadPoolExecutor(1, "digests") as pool:
        checked = pool.submit(check, inputs)
        try:
            yield
        finally:
            checked.result()
