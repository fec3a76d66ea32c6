"""What a training run will take and cost, told before it begins: for `foundry train --dry-run` and
`foundry cost`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from jobs.scale import memory_lines, network_lines
from resources.operations.run_prompts import base_of, frozen_inputs, prompt_maker
from resources.workspace.setup import require_named, require_run
from resources.workspace.store import Store
from training import toml
from training.buckets.plans import plan
from training.config.run import RunConfig
from training.errors import DataError
from training.estimates.cost import (
    Cost,
    Rates,
    Workload,
    count_steps,
    length_lines,
    read_rates,
    training_rate,
    warmup_lines,
)
from training.estimates.flops import ModelConfigs, read_model_configs, training_flops
from training.estimates.gpus import Gpu, find_gpu, peak_flops
from training.estimates.memory import MemoryEstimate, estimate_memory
from training.latents.source import LatentSource
from training.loop.device_defaults import Device, has_auto, read_record, resolve
from training.loop.order import EpochOrder, assign_windows, make_order
from training.loop.requirements import check_trainable
from training.manifests import Manifest
from training.runs.run_folder import read_config
from training.tables.schemas import TABLES

_TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The cards that a user means to rent."""

    num_gpus: int
    """Of them."""
    gpu: str
    """Name in training/estimates/gpus.py."""
    dollars_per_hour: float
    """Of one card."""
    rates: Path | None
    """What a benchmark measured; None for the defaults."""

    def resolve(self) -> Rates:
        """The rates on the card.

        Raises:
            ConfigError: no data sheet of it is known, or the file of rates cannot be used.
        """
        rates = Rates() if self.rates is None else read_rates(self.rates)
        return rates if rates.gpu == self.gpu.upper() else rates.on(self.gpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Epoch 0 of a run on the workspace's training set."""

    num_held_out: int
    """Images that validate."""
    buckets: np.ndarray
    """`(N, 2)` heights and widths of the samples that train, pixels."""
    num_chunks: np.ndarray
    """`(N,)` text chunks of their prompts."""
    order: EpochOrder
    """Of them."""


def count_epoch(store: Store, run: str, config: RunConfig) -> Epoch | None:
    """Make epoch 0 of a run as its trainer does; writes nothing.

    Args:
        store: The workspace.
        run: Its name; one that was started keeps its training set.
        config: Its config.

    Returns:
        The epoch; None while the run is not started and its encoding has no training set.

    Raises:
        ConfigError: the workspace has no such encoding.
        DataError: no sample trains, or images of the set have no latents.
    """
    require_named(store, config)
    frozen = frozen_inputs(store, run)
    if frozen is None and store.manifest("training_set", config.encoding) is None:
        return None
    maker = prompt_maker(store, config, frozen)
    samples = maker.samples
    rows = samples.train_rows
    if not len(rows):
        raise DataError(
            f"training set {config.encoding} has no sample with split 'train': nothing to train on"
        )
    if not config.latents_url:
        shards = [samples.shard_names[code] for code in samples.shards.tolist()]
        source = LatentSource(
            store.home / "latents" / config.encoding, vae_digest=frozen.vae_digest if frozen else ""
        )
        images = pl.DataFrame({"shard": shards, "image_id": list(samples.image_ids)}).filter(
            ~samples.forgotten
        )
        _check_latents(source, images)
    buckets, num_chunks = samples.buckets[rows], maker.count_chunks(rows, 0)
    windows = assign_windows(
        [samples.shard_names[code] for code in samples.shards[rows].tolist()], seed=config.seed, epoch=0,
        shards_at_a_time=config.batch.shards_at_a_time,
    )  # fmt: skip
    order = make_order(
        buckets, num_chunks, seed=config.seed, epoch=0, micro_batch_size=config.batch.micro_batch_size,
        global_batch_size=config.batch.global_batch_size, windows=windows,
    )  # fmt: skip
    return Epoch(
        num_held_out=int(samples.validates.sum()),
        buckets=buckets,
        num_chunks=num_chunks,
        order=order,
    )


def _check_latents(source: LatentSource, images: pl.DataFrame) -> None:
    """Check that some generation of each shard holds all of the set's images.

    Raises:
        DataError: not all have latents; the message counts them.
    """
    lacking = 0
    for (shard,), part in images.group_by("shard", maintain_order=True):
        lacking += source.choose(str(shard), part["image_id"].to_list())[1]
    if lacking:
        raise DataError(
            f"{lacking} of {len(images)} images of the training set have no latents in {source.folder}: run `foundry "
            "run --select latents`"
        )


def dry_run(store: Store, run: str, config: RunConfig, hardware: Hardware) -> list[str]:
    """Everything that can be known of a run without loading weights, as lines for people.

    Args:
        store: The workspace.
        run: Name of the run, which need not exist.
        config: What it is, or would be.
        hardware: Where it is to train.

    Raises:
        ModelError: the base model is missing or of another family than the recipe's.
        ConfigError: an option that the model does not have, an unknown card, or rates that cannot
            be used.
        TrainingError: the model's noise schedule has steps that the loss cannot teach.
        DataError: images of the set have no latents, or none trains.
    """
    rates, folder = hardware.resolve(), base_of(store, run, config)
    card, num_ranks = find_gpu(rates.gpu), hardware.num_gpus
    recorded = read_record(store.paths.run_folder(run))
    left = has_auto(config)
    config = resolve(config, _device(card), recorded or {})
    model = read_model_configs(folder)
    check_trainable(folder, model, config, num_ranks)
    epoch = count_epoch(store, run, config)
    shapes = _shapes(store, config, epoch)
    height, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
    num_chunks = max(chunks for *_, chunks in shapes)

    def estimated(config: RunConfig) -> MemoryEstimate:
        return estimate_memory(
            model, config, height=height, width=width, num_chunks=num_chunks, num_ranks=num_ranks
        )  # fmt: skip

    memory = estimated(config)
    lines = [
        *_resolved_lines(config, left, "recorded" if recorded else f"on {card.name}"),
        f"model: {model.family}, {memory.num_trained:,} of {memory.num_parameters:,} parameters trained",
        *memory_lines(estimated, config, card, (height, width, num_chunks)),
        *_epoch_lines(config, epoch),
    ]
    flops = _sample_flops(model, config, shapes)
    peak = peak_flops(card, config.precision)
    assert peak is not None, "resolved for this card"
    # One utilization for all arithmetic; fp32 is slower by what the card can do in it.
    rate = training_rate(rates, flops / _TERA) * peak / card.half
    hours = config.num_samples / rate / 3600
    batch = config.batch
    micro_batches = batch.global_batch_size / batch.micro_batch_size
    if epoch is not None:
        micro_batches = (len(epoch.order.micro_starts) - 1) / epoch.order.num_steps
    return [
        *lines,
        f"compute: {flops / _TERA:.4g} TFLOP per sample, {rate:,.4g} images/s per {card.name} at "
        f"{rates.mfu:.0%} of its peak ({'default rates' if hardware.rates is None else hardware.rates})",
        *network_lines(
            config,
            memory.num_trained,
            num_ranks,
            micro_batches,
            batch.global_batch_size / rate / num_ranks,
        ),
        f"time: {hours / num_ranks:,.2f} hours on {num_ranks} x {card.name}, {hours:,.2f} GPU-hours, "
        f"${hours * hardware.dollars_per_hour:,.2f} at ${hardware.dollars_per_hour:g} an hour",
    ]


def _device(card: Gpu) -> Device:
    """A card of the data sheets, as defaults are chosen for it."""
    return Device(name=card.name, is_gpu=True, has_bf16=card.has_bf16, has_tf32=card.has_bf16)


def _resolved_lines(config: RunConfig, left: Sequence[str], whose: str) -> list[str]:
    """What the keys that the config leaves to the device come to."""
    values = toml.flatten(toml.dump(config))
    listed = ", ".join(f"{key} = {json.dumps(values[key])}" for key in left)
    return [f"auto, {whose}: {listed}"] if left else []


def _sample_flops(
    model: ModelConfigs, config: RunConfig, shapes: Mapping[tuple[int, int, int], int]
) -> float:
    """Operations of the mean sample, forward and backward."""
    count = training_flops(model, config)
    return sum(count(*shape).model * share for shape, share in shapes.items()) / sum(
        shapes.values()
    )


def _shapes(
    store: Store, config: RunConfig, epoch: Epoch | None
) -> dict[tuple[int, int, int], int]:
    """Samples by (height, width, chunks); before there is a set, one of each size of the plan with
    longest prompts."""
    if epoch is not None:
        keys = np.column_stack([epoch.buckets, epoch.num_chunks])
        found, counts = np.unique(keys, axis=0, return_counts=True)
        return {
            (h, w, n): count
            for (h, w, n), count in zip(found.tolist(), counts.tolist(), strict=True)
        }
    sizes = plan(store.config.encoding(config.encoding).buckets)
    if not sizes:
        raise DataError(
            f"encoding {config.encoding}: sizes follow the images; run `foundry run --select training_set`"
        )
    return {(size.height, size.width, config.prompts.max_chunks): 1 for size in sizes}


def _epoch_lines(config: RunConfig, epoch: Epoch | None) -> list[str]:
    """Steps, epochs and micro-batches, and the short ones of each bucket."""
    batch = config.batch
    if epoch is None:
        steps = -(-config.num_samples // batch.global_batch_size)
        unknown = f"steps: {steps:,} at least; no training set yet: epochs and micro-batches are not known"
        return [unknown, *warmup_lines(config.optimizer, config.num_samples)]
    num_train, order = len(epoch.buckets), epoch.order
    steps = count_steps(num_train, config.num_samples, batch.global_batch_size)
    sizes = np.diff(order.micro_starts)
    of_micro = epoch.buckets[order.samples[order.micro_starts[:-1]]]
    short = sizes < batch.micro_batch_size
    lines = [
        f"training set: {num_train:,} images train, {epoch.num_held_out:,} validate",
        f"steps: {steps:,} of up to {batch.global_batch_size} samples in {config.num_samples / num_train:,.2f} epochs "
        f"of {order.num_steps:,}",
        f"micro-batches per epoch: {len(sizes):,} of up to {batch.micro_batch_size}, {short.sum():,} short",
        "bucket        samples  micro-batches  short",
    ]
    found, samples = np.unique(epoch.buckets, axis=0, return_counts=True)
    for position in np.argsort(-samples, kind="stable"):
        here = (of_micro == found[position]).all(axis=1)
        name = "x".join(map(str, found[position].tolist()))
        lines.append(
            f"{name:<12}{samples[position]:>9,}{here.sum():>15,}{(here & short).sum():>7,}"
        )
    lines += length_lines(num_train, config.num_samples, batch.global_batch_size)
    return lines + warmup_lines(config.optimizer, config.num_samples)


def workspace_work(store: Store, run: str) -> tuple[Workload, dict[str, float], list[str]]:
    """What a workspace's tables say of a run's work: images, samples, operations, bytes stored by
    kind, and advice.

    Raises:
        ConfigError: there is no such run.
        DataError: nothing is ingested yet.
    """
    require_run(store, run)
    config = read_config(store.paths.run_folder(run))
    num_images = _rows(store, "raw_images")
    if not num_images:
        raise DataError(
            f"{store.home} has no images yet: run `foundry run --select raw_images`, or name --images"
        )
    stored = {
        "raw": float(store.read("raw_images", ["bytes"])["bytes"].sum()),
        "latents": 0.0,
        "tables": 0.0,
    }
    stored["embeddings"] = 0.0
    for table in TABLES:
        for part in store.tables.parts(table):
            for entry in _manifest(store, table, part).files:
                kind = "embeddings" if table == "embeddings" else "tables"
                stored["latents" if entry.name.endswith(".safetensors") else kind] += entry.bytes
    epoch = count_epoch(store, run, config)
    flops = _sample_flops(
        read_model_configs(base_of(store, run, config)), config, _shapes(store, config, epoch)
    )
    work = Workload(
        num_images=num_images, num_samples=config.num_samples, training_tflop=flops / _TERA,
        # The base model and the run's last checkpoint draw every prompt once.
        num_generated=2 * _rows(store, "prompt_sets"),
    )  # fmt: skip
    num_train = num_images if epoch is None else len(epoch.buckets)
    return work, stored, length_lines(num_train, config.num_samples, config.batch.global_batch_size)


def _rows(store: Store, table: str) -> int:
    return sum(_manifest(store, table, part).rows for part in store.tables.parts(table))


def _manifest(store: Store, table: str, part: str) -> Manifest:
    manifest = store.manifest(table, part)
    assert manifest is not None, "a part that is listed is committed"
    return manifest


def cost_lines(cost: Cost) -> list[str]:
    """A bill for people."""
    lines = [
        "stored",
        *(f"  {kind:<28}{_size(size):>12}" for kind, size in cost.stored_bytes.items()),
    ]
    lines.append(f"  in an object store{'':<10}{'':>4}${cost.store_dollars_per_month:,.2f} a month")
    lines.append(f"GPU-hours, {cost.gpu}")
    lines += [f"  {stage:<28}{hours:>12,.2f}" for stage, hours in cost.gpu_hours.items()]
    lines.append(f"  {'all':<28}{cost.total_gpu_hours:>12,.2f}")
    lines.append("core-hours")
    lines += [f"  {stage:<28}{hours:>12,.2f}" for stage, hours in cost.core_hours.items()]
    return [
        *lines,
        f"training at {cost.training_images_per_s:,.4g} images/s per card; captions are not counted: no rate is known",
        f"{cost.days:,.2f} days on {cost.num_gpus} x {cost.gpu}",
        f"${cost.gpu_dollars:,.2f} for the cards, ${cost.dollars:,.2f} with storage, transfer and idle time",
    ]


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.2f} kB"
