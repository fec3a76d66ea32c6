"""Makes workspaces and starts runs in them: the files that people edit, written once."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from resources.graph import Scope
from resources.workspace.paths import CODE_ROOT, CONFIG_FILE, check_home
from resources.workspace.store import Store
from resources.workspace.workspace_id import workspace_id
from training import toml
from training.commit import explain_disk, lock, write_bytes
from training.config import older_runs, recipes
from training.config.run import FREE_KEYS, RunConfig
from training.errors import ConfigError, WorkspaceError
from training.names import check_run_name
from training.runs.run_folder import CONFIG, EVENTS, is_away, read_config, read_inputs, write_inputs
from training.runs.training_set import count_forgotten

RECIPES = CODE_ROOT / "recipes"
TINY = RECIPES / "tiny.toml"
AS_CONFIGURED = "as_configured"
"""Instead of a recipe in a launch: the run has its configuration."""


def create(home: Path, *, sources: list[str], preset: str | None, tiny: bool) -> None:
    """Make a workspace: foundry.toml, its Dagster instance, and for the demo its images,
    judgements and run.

    Raises:
        WorkspaceError: there is one already, or its path cannot be used.
        ConfigError: a source is no folder, or there is no such preset.
    """
    from resources import instance  # Dagster, which runs are estimated without

    if (home / CONFIG_FILE).exists():
        raise WorkspaceError(
            f"{home} is a workspace already ({CONFIG_FILE} exists); edit that file, or choose another"
        )
    check_home(home)
    for source in sources:
        if any(
            "\ud800" <= character <= "\udfff" for character in source
        ):  # bytes that are no UTF-8
            raise ConfigError(
                f"--source {os.fsencode(source)!r}: a path in {CONFIG_FILE} must be UTF-8"
            )
        if not Path(source).expanduser().is_dir():
            raise ConfigError(f"--source {source}: not a folder")
    shrink = tiny_rules(preset, tiny=tiny)
    if preset is None:
        if not sources:
            raise ConfigError("name at least one --source FOLDER, or take --preset demo")
        text = recipes.plain_workspace_toml(sources, tiny=shrink, home=home)
    else:
        text = recipes.workspace_toml(
            recipes.recipe_path(RECIPES, preset), sources, tiny=shrink, home=home
        )
    with explain_disk(home):
        home.mkdir(parents=True, exist_ok=True)
        if preset == "demo" and not sources:
            _draw_demo(home)
    if preset == "demo":
        write_run(home, "demo", recipes.run_config(RECIPES / "demo.toml", [], tiny=None))
    instance.write_instance(home)
    workspace_id(home)
    write_bytes(home / CONFIG_FILE, text.encode())


def tiny_rules(recipe: str | None, *, tiny: bool) -> Path | None:
    """The rules of `--tiny`; the demo is tiny already."""
    return TINY if tiny and recipe != "demo" else None


def _draw_demo(home: Path) -> None:
    """Draw the demo's images and its scripted judgements into the workspace."""
    from demo.images import write_world

    write_world(home)


def write_run(home: Path, run: str, config: RunConfig) -> None:
    """Fix a run's configuration by its first launch.

    Raises:
        ConfigError: the run was started or bundled with other values; the message lists them.
    """
    folder = Store(home).paths.run_folder(check_run_name(run))
    with lock(home / "locks" / f"run.{run}.lock", f"run {run} in {home}"):
        recorded = _begun_with(folder)
        config = _kept(folder, recorded, config)
        # An option that the run's version did not know stays unsaid: so the next launch sees that,
        # too.
        unsaid = () if recorded is None else older_runs.lacking(recorded)
        write_bytes(folder / CONFIG, recipes.run_toml(config, unsaid).encode())


def _begun_with(folder: Path) -> dict[str, Any] | None:
    """The recorded config of a run that was started or bundled; None of others."""
    return toml.load(folder / CONFIG) if (folder / EVENTS).exists() or is_away(folder) else None


def _kept(folder: Path, recorded: Mapping[str, Any] | None, config: RunConfig) -> RunConfig:
    """What a recipe's config means for a run: one that was started or bundled keeps what is fixed
    by its first launch.

    Raises:
        ConfigError: it was started with other values; the message lists them.
    """
    if recorded is None:
        return config
    started = (folder / EVENTS).exists()
    config = older_runs.as_begun(config, recorded)
    before, after = (
        toml.flatten(toml.dump(one))
        for one in (older_runs.build(recorded, folder / CONFIG), config)
    )
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    )
    if fixed := [key for key in changed if not key.startswith(FREE_KEYS)]:
        listed = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in fixed)
        raise ConfigError(
            f"run {folder.name!r} was {'started' if started else 'bundled'} with other values ({listed}); "
            "choose another --run name"
        )
    return config


def configure_run(
    home: Path, run: str, recipe: str, assignments: list[str], *, tiny: bool = False
) -> None:
    """Fix a run's configuration from a recipe.

    Raises:
        ConfigError: no such recipe, a wrong key or value, an encoding or a base that the workspace
            does not have, or a started run with other values.
    """
    config, store = _recipe_config(recipe, assignments, tiny=tiny), Store(home)
    if _begun_with(store.paths.run_folder(check_run_name(run))) is None:
        require_named(store, config)
    write_run(home, run, config)


def resolve_run(
    store: Store, run: str, recipe: str | None, assignments: list[str], *, tiny: bool
) -> RunConfig:
    """The configuration that a launch would fix, or without a recipe the one that the run has;
    writes nothing.

    Raises:
        ConfigError: what `configure_run` and `require_run` refuse.
    """
    if recipe is None:
        require_run(store, run)
        return read_config(store.paths.run_folder(run))
    config, folder = (
        _recipe_config(recipe, assignments, tiny=tiny),
        store.paths.run_folder(check_run_name(run)),
    )
    recorded = _begun_with(folder)
    if recorded is None:
        require_named(store, config)
    return _kept(folder, recorded, config)


def require_named(store: Store, config: RunConfig) -> None:
    """Check that foundry.toml has what a run names.

    Raises:
        ConfigError: it has no such encoding or base model; the message lists those that there are.
    """
    if config.encoding not in store.config.encodings:
        known = ", ".join(sorted(store.config.encodings)) or "none"
        raise ConfigError(f"encoding={config.encoding!r} is none of the workspace's: {known}")
    store.config.models.base_named(config.base)


def _recipe_config(recipe: str, assignments: list[str], *, tiny: bool) -> RunConfig:
    return recipes.run_config(
        recipes.recipe_path(RECIPES, recipe), assignments, tiny=tiny_rules(recipe, tiny=tiny)
    )


def leave_out_forgotten(store: Store, run: str) -> int:
    """Let a run that has begun go on without the images of its set that were forgotten; returns how
    many.

    Raises:
        ConfigError: the run has not been started.
    """
    require_run(store, run)
    folder = store.paths.run_folder(run)
    with lock(store.home / "locks" / f"run.{run}.lock", f"run {run} in {store.home}"):
        inputs = read_inputs(folder)
        count = count_forgotten(inputs.training_set)
        if count != inputs.num_left_out:
            write_inputs(folder, replace(inputs, num_left_out=count))
    return count


def require_run(store: Store, run: str) -> None:
    """Check that a run is configured.

    Raises:
        ConfigError: it is not; the message lists those that are.
    """
    if not (store.paths.run_folder(run) / CONFIG).is_file():
        known = ", ".join(store.currency.keys(Scope.RUN)) or "none"
        raise ConfigError(
            f"run {run!r} has no configuration; name a --recipe, or one of the runs: {known}"
        )
