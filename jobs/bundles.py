"""Takes a training run out of its workspace: brings what it trains on up to date, then writes the
bundle."""

from pathlib import Path

from assets.checkpoints import prepare
from jobs import pipeline
from resources import torchrun
from resources.workspace.store import Store
from training.commit import write_json
from training.errors import ConfigError
from training.latents.generations import generations
from training.runs.event_log import has_finished
from training.runs.run_folder import BUNDLED, EVENTS, read_config


def write(home: Path, run: str, target: Path, *, started: pipeline.Started) -> int:
    """Write a configured run into a new folder; returns its size, bytes. Until it comes back, it is
    not trained here.

    Args:
        home: The workspace.
        run: Name of the run.
        target: Must not exist, or be empty.
        started: Told of each stage that has work before it begins.

    Raises:
        ConfigError: the run has finished or is being trained, or the target is in the way.
        DataError: images of its set have no latents.
    """
    from training.runs.bundle import write_bundle

    store = Store(home)
    folder = store.paths.run_folder(run)
    if has_finished(folder / EVENTS) or torchrun.is_running(folder):
        state = "has finished" if has_finished(folder / EVENTS) else "is being trained here"
        raise ConfigError(
            f"--bundle: run {run!r} {state}; bundle a run that is still to be trained"
        )
    pipeline.bring_up_to_date(
        home, select="training_set,base_model,tag_vocabulary", started=started
    )
    store = Store(home)
    config = read_config(folder)
    prepare(store, run, config)
    num_bytes = write_bundle(folder, target)
    events, taken = folder / EVENTS, target / "latents" / config.encoding
    written = {
        "folder": str(target),
        "event_bytes": events.stat().st_size if events.exists() else 0,
        "latents": {shard.name: generations(shard) for shard in sorted(taken.glob("*"))},
    }
    write_json(folder / BUNDLED, written)
    return num_bytes
