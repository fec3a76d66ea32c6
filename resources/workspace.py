"""Makes workspaces and starts runs in them: the files that people edit, written once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from resources.stages import Scope
from resources.store import CODE_ROOT, CONFIG_FILE, Store
from training import older_runs, recipes, toml
from training.base_model import config_folder
from training.checks import check_run_name
from training.commit import lock, write_bytes
from training.data import vocabulary
from training.data.clip_tokenizer import ClipTokenizer
from training.data.crops import told_crop
from training.data.geometry import Placement
from training.data.latent_files import generations, read_generation
from training.data.prompt_maker import MadePrompt, PromptMaker
from training.data.samples import Samples
from training.errors import ConfigError, WorkspaceError
from training.latents import placement_of
from training.run_config import FREE_KEYS, RunConfig
from training.run_folder import (
    CONFIG,
    EPOCHS,
    EVENTS,
    FETCHED,
    INPUTS,
    RunInputs,
    checked_training_set,
    is_away,
    read_config,
    read_inputs,
)

RECIPES = CODE_ROOT / "recipes"
TINY = RECIPES / "tiny.toml"


def create(home: Path, *, sources: list[str], preset: str | None, tiny: bool) -> None:
    """Make a workspace: foundry.toml, its Dagster instance, and for the demo its pictures, judgements and run.

    Raises:
        WorkspaceError: there is one already.
        ConfigError: a source is no folder, or there is no such preset.
    """
    from resources import instance  # Dagster, which runs are estimated without

    if (home / CONFIG_FILE).exists():
        raise WorkspaceError(f"{home} is a workspace already ({CONFIG_FILE} exists); edit that file, or choose another")
    for source in sources:
        if not Path(source).expanduser().is_dir():
            raise ConfigError(f"--source {source}: not a folder")
    shrink = tiny_rules(preset, tiny=tiny)
    if preset is None:
        if not sources:
            raise ConfigError("name at least one --source FOLDER, or take --preset demo")
        text = recipes.plain_workspace_toml(sources, tiny=shrink)
    else:
        text = recipes.workspace_toml(recipes.recipe_path(RECIPES, preset), sources, tiny=shrink)
    home.mkdir(parents=True, exist_ok=True)
    if preset == "demo" and not sources:
        _draw_demo(home)
    if preset == "demo":
        write_run(home, "demo", recipes.run_config(RECIPES / "demo.toml", [], tiny=None))
    instance.write_instance(home)
    write_bytes(home / CONFIG_FILE, text.encode())


def tiny_rules(recipe: str | None, *, tiny: bool) -> Path | None:
    """The rules of `--tiny`; the demo is tiny already."""
    return TINY if tiny and recipe != "demo" else None


def _draw_demo(home: Path) -> None:
    """Draw the demo's pictures and its scripted judgements into the workspace."""
    from demo.pictures import write_world

    write_world(home)


def write_run(home: Path, run: str, config: RunConfig) -> None:
    """Fix a run's configuration by its first launch.

    Raises:
        ConfigError: the run was started or bundled with other values; the message lists them.
    """
    folder = Store(home).run_folder(check_run_name(run))
    with lock(home / "locks" / f"run.{run}.lock", f"run {run} in {home}"):
        recorded = _begun_with(folder)
        config = _kept(folder, recorded, config)
        # An option that the run's version did not know stays unsaid: so the next launch sees that, too.
        unsaid = () if recorded is None else older_runs.lacking(recorded)
        write_bytes(folder / CONFIG, recipes.run_toml(config, unsaid).encode())


def _begun_with(folder: Path) -> dict[str, Any] | None:
    """The recorded config of a run that was started or bundled; None of others."""
    return toml.load(folder / CONFIG) if (folder / EVENTS).exists() or is_away(folder) else None


def _kept(folder: Path, recorded: Mapping[str, Any] | None, config: RunConfig) -> RunConfig:
    """What a recipe's config means for a run: one that was started or bundled keeps what is fixed by its first launch.

    Raises:
        ConfigError: it was started with other values; the message lists them.
    """
    if recorded is None:
        return config
    started = (folder / EVENTS).exists()
    config = older_runs.as_begun(config, recorded)
    before, after = (toml.flatten(toml.dump(one)) for one in (older_runs.build(recorded, folder / CONFIG), config))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if fixed := [key for key in changed if not key.startswith(FREE_KEYS)]:
        listed = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in fixed)
        raise ConfigError(
            f"run {folder.name!r} was {'started' if started else 'bundled'} with other values ({listed}); "
            "choose another --run name"
        )
    return config


def configure_run(home: Path, run: str, recipe: str, assignments: list[str], *, tiny: bool = False) -> None:
    """Fix a run's configuration from a recipe.

    Raises:
        ConfigError: no such recipe, a wrong key or value, or a started run with other values.
    """
    write_run(home, run, _recipe_config(recipe, assignments, tiny=tiny))


def resolve_run(store: Store, run: str, recipe: str | None, assignments: list[str], *, tiny: bool) -> RunConfig:
    """The configuration that a launch would fix, or without a recipe the one that the run has; writes nothing.

    Raises:
        ConfigError: what `configure_run` and `require_run` refuse.
    """
    if recipe is None:
        require_run(store, run)
        return read_config(store.run_folder(run))
    config = _recipe_config(recipe, assignments, tiny=tiny)
    folder = store.run_folder(check_run_name(run))
    return _kept(folder, _begun_with(folder), config)


def _recipe_config(recipe: str, assignments: list[str], *, tiny: bool) -> RunConfig:
    return recipes.run_config(recipes.recipe_path(RECIPES, recipe), assignments, tiny=tiny_rules(recipe, tiny=tiny))


def require_run(store: Store, run: str) -> None:
    """Check that a run is configured.

    Raises:
        ConfigError: it is not; the message lists those that are.
    """
    if not (store.run_folder(run) / CONFIG).is_file():
        known = ", ".join(store.keys(Scope.RUN)) or "none"
        raise ConfigError(f"run {run!r} has no configuration; name a --recipe, or one of the runs: {known}")


def frozen_inputs(store: Store, run: str) -> RunInputs | None:
    """What a run was frozen with at its first launch; None before that."""
    folder = store.run_folder(run)
    return read_inputs(folder) if (folder / INPUTS).exists() else None


def prompt_maker(store: Store, config: RunConfig, frozen: RunInputs | None) -> PromptMaker:
    """Makes a run's prompts as its trainer does.

    Args:
        store: The workspace.
        config: Of the run.
        frozen: What the run was frozen with; None reads the workspace's tables, as the first launch will freeze them.

    Raises:
        DataError: nothing is frozen, and the encoding has no training set yet.
        DamageError: the set's or the vocabulary's file is gone or damaged.
    """
    if frozen is None:
        samples, base = Samples(store.table_file("training_set", config.encoding)), store.model_path(config.base)
        known = vocabulary.from_tables(store.read("tag_vocabulary"), samples.tag_names, samples.word_names)
    else:
        samples, base = Samples(checked_training_set(frozen)), frozen.base_model
        known = vocabulary.read(frozen.vocabulary, frozen.vocabulary_sha256)
    configs = config_folder(base)
    names = ("tokenizer", "tokenizer_2") if (configs / "tokenizer_2").is_dir() else ("tokenizer",)
    return PromptMaker(
        samples, known, config.prompts, config.seed, [ClipTokenizer.load(configs / name) for name in names]
    )


def example_prompts(
    store: Store, run: str, num_prompts: int, *, tell_sizes: bool = False
) -> tuple[list[MadePrompt], list[str], str]:
    """Prompts of the first images that train in a run, as epoch 0 makes them.

    Returns:
        The prompts; with `tell_sizes`, a line for each image of the sizes and the crop that the model is told; and a
        line that says what was read.

    Raises:
        ConfigError: there is no such run.
        DataError: it was not started, and its encoding has no training set yet.
        DamageError: what it was frozen with is gone or damaged.
    """
    require_run(store, run)
    config, frozen = read_config(store.run_folder(run)), frozen_inputs(store, run)
    maker = prompt_maker(store, config, frozen)
    train = maker.samples.train_rows
    rows = train[:num_prompts]
    which = f"current training set {config.encoding}" if frozen is None else f"set {frozen.fingerprint[:16]} of the run"
    read = f"epoch 0 of {which}: {len(rows)} of {len(train)} images that train"
    told = _told_sizes(store, run, config, frozen, maker.samples, rows) if tell_sizes else []
    return maker.make(rows.tolist(), 0), told, read


def _told_sizes(
    store: Store, run: str, config: RunConfig, frozen: RunInputs | None, samples: Samples, rows: np.ndarray
) -> list[str]:
    """What a model is told of these rows beside their prompts in epoch 0, by the latents that it reads, or would."""
    folder, image_ids = store.run_folder(run), samples.image_ids.take(rows)
    latents = store.home / "latents" / config.encoding if frozen is None else frozen.latents
    latents = folder / FETCHED if config.latents_url else latents
    pinned = folder / EPOCHS / "0.json"
    pins = json.loads(pinned.read_bytes())["latents"] if pinned.is_file() else {}
    placements: dict[str, Placement] = {}
    for shard in sorted({samples.shard_names[code] for code in samples.shards[rows].tolist()}):
        newest = max(generations(latents / shard), default=0)
        if number := pins.get(shard, {}).get("generation", newest):
            table = read_generation(latents / shard, number).table().filter(pl.col("image_id").is_in(image_ids))
            placements |= {row["image_id"]: placement_of(row) for row in table.iter_rows(named=True)}
    told = []
    for image_id in image_ids:
        if placed := placements.get(image_id):
            top, left = told_crop(placed, config.rules_version)
            mirrored = ", mirrored" if placed.flip else ""
            told.append(f"{placed.original} px, {top} cut off above and {left} on the left, {placed.bucket}{mirrored}")
        else:
            told.append("no latents yet")
    return told
