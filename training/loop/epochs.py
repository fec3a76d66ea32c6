"""What an epoch reads, fixed at its border: `epochs/<epoch>.json` pins latents, and names the order
beside it.

A resume inside an epoch reads the same file; a new generation of latents is taken up at the next
border.
"""

import dataclasses
import json
from pathlib import Path

from training import commit
from training.config import older_runs
from training.config.run import RunConfig
from training.errors import DamageError
from training.loop.dataset import Dataset, Pins
from training.loop.order import (
    EpochOrder,
    assign_windows,
    leave_out,
    make_order,
    read_order,
    write_order,
)
from training.prompts.writing import PROMPTS_VERSION
from training.records import write_record
from training.runs import run_folder


def prepare_epoch(
    folder: Path,
    epoch: int,
    dataset: Dataset,
    config: RunConfig,
    fingerprint: str,
    num_left_out: int = 0,
) -> tuple[Pins, list[str]]:
    """Write order and pins of an epoch unless they are there; called by one process.

    Args:
        folder: Of the run.
        epoch: Number of the epoch.
        dataset: What the run trains on.
        config: Of the run.
        fingerprint: Of its set.
        num_left_out: Images of the set that were forgotten since; an epoch that was written with
            more of them goes on in its order without them.

    Returns:
        The pinned generations, and a line for each that was skipped because it is not whole.

    Raises:
        DataError: images of the set have no latents.
    """
    manifest = folder / run_folder.EPOCHS / f"{epoch}.json"
    content = manifest.with_suffix(".npz")
    notes: list[str] = []
    keys = _keys(config, fingerprint, epoch, num_left_out)
    key = keys[-1]
    if manifest.is_file():
        written = json.loads(manifest.read_bytes())
        if written["order"]["key"] in keys[:-1]:
            shorter = leave_out(
                read_order(content, written["order"]["sha256"]), dataset.samples.forgotten
            )
            return _write(manifest, epoch, shorter, key, written["latents"]), notes
        if written["order"]["key"] != key:
            raise DamageError(
                f"{manifest} was written for another set or config, or by a version that makes other prompts; finish "
                "the run with the version that began it, or begin another"
            )
        if content.is_file() and commit.sha256_file(content) == written["order"]["sha256"]:
            return written["latents"], notes
        pins = written["latents"]
    else:
        pins, notes = dataset.pin_latents()
    order = make_order(
        dataset.buckets[dataset.train_rows],
        dataset.count_chunks(dataset.train_rows, epoch),
        seed=config.seed,
        epoch=epoch,
        micro_batch_size=config.batch.micro_batch_size,
        global_batch_size=config.batch.global_batch_size,
        windows=assign_windows(
            dataset.shards_of(dataset.train_rows),
            seed=config.seed,
            epoch=epoch,
            shards_at_a_time=config.batch.shards_at_a_time,
        ),
    )
    rows = dataclasses.replace(
        order, samples=dataset.train_rows[order.samples].astype(order.samples.dtype)
    )
    return _write(manifest, epoch, rows, key, pins), notes


def _keys(config: RunConfig, fingerprint: str, epoch: int, num_left_out: int) -> list[str]:
    """What an epoch's order follows from, with no, one, and up to `num_left_out` images left out."""
    values = older_runs.comparable(config)
    settings = [
        fingerprint,
        values["prompts"],
        values["batch"],
        config.seed,
        epoch,
        PROMPTS_VERSION,
    ]
    return [
        commit.json_digest([*settings, number] if number else settings)
        for number in range(num_left_out + 1)
    ]


def _write(manifest: Path, epoch: int, order: EpochOrder, key: str, pins: Pins) -> Pins:
    """Write the order and then what names it; returns the pins."""
    content = manifest.with_suffix(".npz")
    described = {"key": key, "file": content.name, "sha256": write_order(content, order)}
    values = {"epoch": epoch, "order": described, "latents": pins}
    write_record(manifest, run_folder.FORMAT, values)
    return pins


def open_epoch(folder: Path, epoch: int, step: int, dataset: Dataset) -> EpochOrder:
    """Read what `prepare_epoch` wrote, on every rank: the order, and latents into `dataset`, from a
    step on.

    Raises:
        DamageError: a file of the epoch, or a latent file, is damaged.
    """
    manifest = folder / run_folder.EPOCHS / f"{epoch}.json"
    written = json.loads(manifest.read_bytes())
    dataset.use_latents(written["latents"])
    order = read_order(manifest.with_suffix(".npz"), written["order"]["sha256"])
    dataset.fetch_in_order(order.samples[order.first_sample(step) :])
    return order
