"""Makes workspaces and starts runs in them: the files that people edit, written once."""

from pathlib import Path

from resources.stages import Scope
from resources.store import CODE_ROOT, CONFIG_FILE, Store
from training import recipes, toml
from training.base_model import config_folder
from training.checks import check_run_name
from training.commit import lock, write_bytes
from training.data import vocabulary
from training.data.clip_tokenizer import ClipTokenizer
from training.data.prompt_maker import MadePrompt, PromptMaker
from training.data.samples import Samples
from training.errors import ConfigError, WorkspaceError
from training.run_config import FREE_KEYS, RunConfig
from training.run_folder import (
    CONFIG,
    EVENTS,
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
        _check_unchanged(folder, config)
        write_bytes(folder / CONFIG, recipes.run_toml(config).encode())


def _check_unchanged(folder: Path, config: RunConfig) -> None:
    """Check that a run, if it was started or bundled, keeps what is fixed by its first launch.

    Raises:
        ConfigError: it was started with other values; the message lists them.
    """
    started = (folder / EVENTS).exists()
    if not started and not is_away(folder):
        return
    before, after = toml.flatten(toml.dump(read_config(folder))), toml.flatten(toml.dump(config))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if fixed := [key for key in changed if not key.startswith(FREE_KEYS)]:
        listed = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in fixed)
        raise ConfigError(
            f"run {folder.name!r} was {'started' if started else 'bundled'} with other values ({listed}); "
            "choose another --run name"
        )


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
    _check_unchanged(store.run_folder(check_run_name(run)), config)
    return config


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


def example_prompts(store: Store, run: str, num_prompts: int) -> tuple[list[MadePrompt], str]:
    """Prompts of the first images that train in a run, as epoch 0 makes them, and a line that says what was read.

    Raises:
        ConfigError: there is no such run.
        DataError: it was not started, and its encoding has no training set yet.
        DamageError: what it was frozen with is gone or damaged.
    """
    require_run(store, run)
    config, frozen = read_config(store.run_folder(run)), frozen_inputs(store, run)
    maker = prompt_maker(store, config, frozen)
    train = maker.samples.train_rows
    rows = train[:num_prompts].tolist()
    which = f"current training set {config.encoding}" if frozen is None else f"set {frozen.fingerprint[:16]} of the run"
    read = f"epoch 0 of {which}: {len(rows)} of {len(train)} images that train"
    return maker.make(rows, 0), read
