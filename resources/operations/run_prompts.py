"""What a run trains on, read in its workspace as its trainer reads it: what it was frozen with, and
its prompts."""

import json
from pathlib import Path

import numpy as np
import polars as pl

from resources.workspace.run_files import own_files
from resources.workspace.setup import require_run
from resources.workspace.store import Store
from training.buckets.crops import told_crop
from training.buckets.geometry import Placement
from training.config.run import RunConfig
from training.curation import vocabulary
from training.latents.encoder import placement_of
from training.latents.generations import generations, read_generation
from training.models.base_model import config_folder
from training.models.clip_tokenizer import ClipTokenizer
from training.prompts.maker import MadePrompt, PromptMaker
from training.prompts.samples import Samples
from training.runs.run_folder import (
    EPOCHS,
    FETCHED,
    INPUTS,
    RunInputs,
    checked_training_set,
    read_config,
    read_inputs,
    repointed,
)


def frozen_inputs(store: Store, run: str) -> RunInputs | None:
    """What a run was frozen with at its first launch, where it lies now; None before that."""
    folder = store.paths.run_folder(run)
    if not (folder / INPUTS).exists():
        return None
    return repointed(read_inputs(folder), **own_files(store, read_config(folder)))


def base_of(store: Store, run: str, config: RunConfig) -> Path:
    """The model that a run starts from: one that was launched keeps its own, whatever foundry.toml
    names by now."""
    frozen = frozen_inputs(store, run)
    return store.models.base_path(config.base) if frozen is None else frozen.base_model


def prompt_maker(store: Store, config: RunConfig, frozen: RunInputs | None) -> PromptMaker:
    """Makes a run's prompts as its trainer does.

    Args:
        store: The workspace.
        config: Of the run.
        frozen: What the run was frozen with; None reads the workspace's tables, as the first launch
            will freeze them.

    Raises:
        DataError: nothing is frozen, and the encoding has no training set yet.
        DamageError: the set's or the vocabulary's file is gone or damaged.
    """
    if frozen is None:
        samples, base = (
            Samples(store.tables.file("training_set", config.encoding)),
            store.models.base_path(config.base),
        )
        known = vocabulary.from_tables(
            store.read("tag_vocabulary"), samples.tag_names, samples.word_names
        )
    else:
        samples, base = Samples(checked_training_set(frozen)), frozen.base_model
        known = vocabulary.read(frozen.vocabulary, frozen.vocabulary_sha256)
    configs = config_folder(base)
    names = ("tokenizer", "tokenizer_2") if (configs / "tokenizer_2").is_dir() else ("tokenizer",)
    return PromptMaker(
        samples,
        known,
        config.prompts,
        config.seed,
        [ClipTokenizer.load(configs / name) for name in names],
    )


def example_prompts(
    store: Store, run: str, num_prompts: int, *, tell_sizes: bool = False
) -> tuple[list[MadePrompt], list[str], str]:
    """Prompts of the first images that train in a run, as epoch 0 makes them.

    Returns:
        The prompts; with `tell_sizes`, a line for each image of the sizes and the crop that the
        model is told; and a line that says what was read.

    Raises:
        ConfigError: there is no such run.
        DataError: it was not started, and its encoding has no training set yet.
        DamageError: what it was frozen with is gone or damaged.
    """
    require_run(store, run)
    config, frozen = read_config(store.paths.run_folder(run)), frozen_inputs(store, run)
    maker = prompt_maker(store, config, frozen)
    train = maker.samples.train_rows
    rows = train[:num_prompts]
    which = (
        f"current training set {config.encoding}"
        if frozen is None
        else f"set {frozen.fingerprint[:16]} of the run"
    )
    read = f"epoch 0 of {which}: {len(rows)} of {len(train)} images that train"
    told = _told_sizes(store, run, config, frozen, maker.samples, rows) if tell_sizes else []
    return maker.make(rows.tolist(), 0), told, read


def _told_sizes(
    store: Store,
    run: str,
    config: RunConfig,
    frozen: RunInputs | None,
    samples: Samples,
    rows: np.ndarray,
) -> list[str]:
    """What a model is told of these rows beside their prompts in epoch 0, by the latents that it
    reads, or would."""
    folder, image_ids = store.paths.run_folder(run), samples.image_ids.take(rows)
    latents = store.home / "latents" / config.encoding if frozen is None else frozen.latents
    latents = folder / FETCHED if config.latents_url else latents
    pinned = folder / EPOCHS / "0.json"
    pins = json.loads(pinned.read_bytes())["latents"] if pinned.is_file() else {}
    placements: dict[str, Placement] = {}
    for shard in sorted({samples.shard_names[code] for code in samples.shards[rows].tolist()}):
        newest = max(generations(latents / shard), default=0)
        if number := pins.get(shard, {}).get("generation", newest):
            table = (
                read_generation(latents / shard, number)
                .table()
                .filter(pl.col("image_id").is_in(image_ids))
            )
            placements |= {
                row["image_id"]: placement_of(row) for row in table.iter_rows(named=True)
            }
    told = []
    for image_id in image_ids:
        if placed := placements.get(image_id):
            top, left = told_crop(placed, config.rules_version)
            mirrored = ", mirrored" if placed.flip else ""
            told.append(
                f"{placed.original} px, {top} cut off above and {left} on the left, {placed.bucket}{mirrored}"
            )
        else:
            told.append("no latents yet")
    return told
