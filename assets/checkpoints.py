"""`checkpoints`: a training run. Starts the trainer, or attaches to it where it already runs, and
follows its log."""

import time
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.partitions import mirror
from assets.run_settings import TrainSettings, configure, is_new
from resources import devices, torchrun
from resources.graph import Reads, Scope, Stage
from resources.mlflow.catch_up import catch_up
from resources.mlflow.tracking import Tracking, workspace_tracking
from resources.workspace.run_files import own_files
from resources.workspace.setup import leave_out_forgotten
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.commit import lock
from training.config.run import RunConfig
from training.errors import ConfigError, DataError, TrackingError, TrainingError
from training.estimates.cost import warmup_lines
from training.images import figures
from training.progress import report
from training.runs.event_log import has_finished, read_events
from training.runs.run_folder import (
    BUNDLED,
    EVENTS,
    INPUTS,
    READY,
    VOCABULARY,
    RunInputs,
    adopt,
    checkpoint_folder,
    is_away,
    read_config,
    read_inputs,
    read_ready,
    write_inputs,
)
from training.runs.run_folder import checkpoints as ready_checkpoints
from training.runs.training_set import require_whole
from training.tables.schemas import TABLES

FORWARD_EVERY_S = 10.0
LOG_EVERY_S = 15.0


@Stage(
    version=1,
    scope=Scope.RUN,
    group="train",
    kinds=("pytorch", "huggingface"),
    # A run keeps what it was frozen with at its first launch: what changes afterwards is another run's.
    follows=(Reads("training_set"), Reads("base_model"), Reads("tag_vocabulary")),
)
def checkpoints(
    context: dg.AssetExecutionContext, config: TrainSettings, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per checkpoint of a training run, in diffusers layout, with the fingerprint of what
    it was trained on."""

    def make(key: str) -> Made:
        configure(store, key, config)
        if config.without_forgotten:
            context.log.info(
                f"run {key} goes on without {leave_out_forgotten(store, key)} forgotten images"
            )
        folder = store.paths.run_folder(key)
        if is_away(folder):
            raise ConfigError(
                f"run {key} was bundled to be trained elsewhere: copy its folder back, or remove {folder / BUNDLED} to "
                "train it here"
            )
        run = read_config(folder)
        for line in warmup_lines(run.optimizer, run.num_samples):
            context.log.warning(line)
        prepare(store, key, run)
        tracking = workspace_tracking(store.home, store.config.tracking.uri)
        ending = follow(context, store, folder, run, tracking)
        catch_up(store, context.log)
        if ending["event"] != "finished":
            reason = ending.get("reason", "it was asked to")
            raise TrainingError(
                f"run {key} {ending['event']} at {ending['samples_seen']} samples: {reason}"
            )
        return Made(frame=table(folder), report=_report(folder, tracking, key))

    result = materialize(context, store, checkpoints, make, new=lambda key: is_new(config))
    mirror(context.instance, store)
    return result


def prepare(store: Store, key: str, run: RunConfig) -> None:
    """Write the run's inputs at its first launch: from then on it keeps its training set, whatever
    becomes current.

    A run that was trained elsewhere and copied back is pointed to this workspace's files.

    Raises:
        DataError: the encoding has no training set yet, the run that came back has another one, or
            images of its set were forgotten.
    """
    from training.curation import vocabulary
    from training.prompts.samples import Samples

    folder = store.paths.run_folder(key)
    if (folder / INPUTS).exists():
        adopt(folder, **own_files(store, run))
        if not has_finished(folder / EVENTS):
            require_whole(read_inputs(folder))
        return
    manifest, known = (
        store.manifest("training_set", run.encoding),
        store.manifest("tag_vocabulary", "all"),
    )
    if manifest is None:
        raise DataError(
            f"run {key}: encoding {run.encoding!r} has no training set; run `foundry run` first"
        )
    with lock(store.home / "locks" / f"run.{key}.lock", f"run {key}"):
        samples = Samples(store.tables.file("training_set", run.encoding))
        words = vocabulary.from_tables(
            store.read("tag_vocabulary"), samples.tag_names, samples.word_names
        )
        inputs = RunInputs(
            run=key,
            training_set=store.tables.file("training_set", run.encoding),
            training_set_sha256=manifest.files[0].sha256,
            fingerprint=manifest.digest,
            vocabulary=folder / VOCABULARY,
            vocabulary_sha256=vocabulary.write(folder / VOCABULARY, words),
            latents=store.home / "latents" / run.encoding,
            base_model=store.models.base_path(run.base),
            base_digest=store.models.base_digest(run.base),
            vae=store.models.vae_of_run(run.encoding, run.base),
            vae_digest=store.models.vae_digest(run.encoding),
            tag_vocabulary=known.digest if known else "absent",
        )
        write_inputs(folder, inputs)


def follow(
    context: dg.AssetExecutionContext,
    store: Store,
    folder: Path,
    run: RunConfig,
    tracking: Tracking,
) -> dict[str, Any]:
    """Start or attach, show progress until the trainer ends, and return its last line.

    A cancellation in the UI asks the trainer to stop and waits for it; the end of this process
    alone leaves it be.
    """
    if has_finished(folder / EVENTS):
        ending = dict(read_events(folder / EVENTS)[-1])
        require_last_checkpoint(folder, ending["samples_seen"])
        return ending
    handle = start(store, folder, run)
    # MLflow is imported with the first lines that it gets: not at once, the trainer needs the cores
    # for its first step.
    forwarded, logged = time.monotonic(), 0.0
    try:
        for event in handle.events():
            report("samples", min(event.get("samples_seen", 0), run.num_samples), run.num_samples)
            now = time.monotonic()
            if event["event"] not in ("step", "progress") or now - logged > LOG_EVERY_S:
                logged = now
                context.log.info(
                    " ".join(
                        f"{name}={value}" for name, value in event.items() if name != "config"
                    )[:500]
                )
            if now - forwarded > FORWARD_EVERY_S:
                forwarded = now
                forward(context, tracking, folder)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        asked = context.instance.get_run_by_id(context.run_id)
        if asked is not None and asked.status == dg.DagsterRunStatus.CANCELING:
            handle.stop()
        raise
    return dict(handle.wait())


def start(store: Store, folder: Path, run: RunConfig) -> torchrun.TrainerHandle:
    """Attach to the run's trainer, or start one that holds its cards for as long as it lives."""
    if torchrun.is_running(folder):
        return torchrun.start_or_attach(folder, run.num_processes)
    with devices.hold_for_trainer(store.config.devices, store.home, run.num_processes) as (
        cards,
        locks,
    ):
        return torchrun.start_or_attach(folder, run.num_processes, cards, locks)


def require_last_checkpoint(folder: Path, samples_seen: int) -> None:
    """Check that the weights that a finished run ended with are there.

    Raises:
        DataError: they are not; a finished run is not trained on.
    """
    path = checkpoint_folder(folder, samples_seen)
    if not (path / READY).is_file():
        raise DataError(
            f"run {folder.name} has finished, but its last checkpoint {path} is missing: bring it back, or remove "
            f"{folder} and launch the run with its recipe to train it anew"
        )


def forward(context: dg.AssetExecutionContext, tracking: Tracking, folder: Path) -> None:
    """Send new events to MLflow; when it is away, say so and go on: the log keeps everything."""
    try:
        tracking.forward(folder)
    except TrackingError as error:
        context.log.warning(f"MLflow: {error}")


def table(folder: Path) -> pl.DataFrame:
    """Rows of the table `checkpoints` for a run."""
    rows = []
    for path in ready_checkpoints(folder):
        ready = read_ready(path)
        rows.append(
            {
                "checkpoint": ready.checkpoint,
                "run": ready.run,
                "samples_seen": ready.samples_seen,
                "folder": path.name,
                "digest": ready.digest,
                "training_set": ready.fingerprint,
                "validation_loss": ready.validation_loss,
            }
        )
    return pl.DataFrame(rows, schema=TABLES["checkpoints"].schema)


def _report(folder: Path, tracking: Tracking, run: str) -> dict[str, Any]:
    """Curves of the run and the way to MLflow."""
    events = read_events(folder / EVENTS)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return {
        "numbers": {"samples seen": events[-1]["samples_seen"] if events else 0},
        "pictures": {"training loss": figures.sparkline(losses)} if losses else {},
        "links": {"MLflow run": url, "MLflow, all runs": tracking.experiment_url()}
        if (url := tracking.run_url(run))
        else {},
    }
