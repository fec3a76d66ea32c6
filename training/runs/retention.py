"""Which checkpoints of a run stay, by the recipe's rule, and the removal of the others."""

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training import commit
from training.config.run import CheckpointConfig
from training.runs import run_folder

_WANTED = "WANTED."


def weights_to_keep(
    saved: Sequence[tuple[int, float | None]], config: CheckpointConfig
) -> set[int]:
    """The checkpoints whose weights stay, by their samples_seen.

    Args:
        saved: samples_seen and validation loss of each, oldest first.
        config: The newest `keep_last` stay, the first at or after each multiple of
            `keep_every_samples` (all for 0), and the one with the lowest validation loss, of equal
            ones the oldest.
    """
    if not config.keep_every_samples:
        return {samples_seen for samples_seen, _ in saved}
    kept = {samples_seen for samples_seen, _ in saved[-config.keep_last :]}
    before = 0
    for samples_seen, _ in saved:
        if samples_seen // config.keep_every_samples > before // config.keep_every_samples:
            kept.add(samples_seen)
        before = samples_seen
    judged = [(loss, samples_seen) for samples_seen, loss in saved if loss is not None]
    return kept | {min(judged)[1]} if judged else kept


def apply_retention(folder: Path, config: CheckpointConfig) -> list[int]:
    """Free the optimizer's state of all but the newest checkpoints of a run, and remove those that
    no rule keeps.

    One that is being read, or that somebody wants, as an evaluation does or the champion is, is
    left for the next time.

    Returns:
        samples_seen of those that were removed.
    """
    saved = [(path, run_folder.read_ready(path)) for path in run_folder.checkpoints(folder)]
    for path, _ in saved[: -config.keep_last]:
        shutil.rmtree(path / run_folder.STATE, ignore_errors=True)
    kept = weights_to_keep(
        [(ready.samples_seen, ready.validation_loss) for _, ready in saved], config
    )
    removed = []
    for path, ready in saved:
        if ready.samples_seen not in kept and _remove(path):
            removed.append(ready.samples_seen)
    return removed


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed while it is read, by any number of processes."""
    with (checkpoint / run_folder.READY).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def want(checkpoint: Path, purpose: str) -> None:
    """Keep a checkpoint from being removed until `release` is called for the same purpose.

    Raises:
        FileNotFoundError: it has been removed.
    """
    with reading(checkpoint):
        commit.write_bytes(checkpoint / f"{_WANTED}{purpose}", b"")


def release(checkpoint: Path, purpose: str) -> None:
    """End what `want` began; the next retention may remove the checkpoint."""
    (checkpoint / f"{_WANTED}{purpose}").unlink(missing_ok=True)


def _remove(path: Path) -> bool:
    """Remove a checkpoint unless somebody reads or wants it; READY.json goes first, so that half of
    one is none."""
    ready = path / run_folder.READY
    with ready.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if any(path.glob(f"{_WANTED}*")):
            return False
        ready.unlink()
    shutil.rmtree(path)
    return True
