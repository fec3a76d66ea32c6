"""Makes workspaces and starts runs in them: the files that people edit, written once."""

from pathlib import Path

from resources import instance
from resources.stages import Scope
from resources.store import CODE_ROOT, CONFIG_FILE, Store
from training import recipes, toml
from training.base_model import config_folder
from training.checks import check_run_name
from training.commit import lock, write_bytes
from training.data import vocabulary
from training.data.prompt_maker import MadePrompt, PromptMaker
from training.data.samples import Samples
from training.errors import ConfigError, DataError, WorkspaceError
from training.run_config import FREE_KEYS, RunConfig
from training.run_folder import CONFIG, EVENTS, read_config

RECIPES = CODE_ROOT / "recipes"
TINY = RECIPES / "tiny.toml"


def create(home: Path, *, sources: list[str], preset: str | None, tiny: bool) -> None:
    """Make a workspace: foundry.toml, its Dagster instance, and for the demo its pictures, judgements and run.

    Raises:
        WorkspaceError: there is one already.
        ConfigError: a source is no folder, or there is no such preset.
    """
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
        ConfigError: the run exists with other values; the message lists them.
    """
    store = Store(home)
    folder = store.run_folder(check_run_name(run))
    path = folder / CONFIG
    with lock(home / "locks" / f"run.{run}.lock", f"run {run} in {home}"):
        if path.exists():
            before, after = toml.flatten(toml.dump(read_config(folder))), toml.flatten(toml.dump(config))
            changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            fixed = [key for key in changed if not key.startswith(FREE_KEYS)]
            if fixed and (folder / EVENTS).exists():
                listed = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in fixed)
                raise ConfigError(f"run {run!r} was started with other values ({listed}); choose another --run name")
        write_bytes(path, recipes.run_toml(config).encode())


def configure_run(home: Path, run: str, recipe: str, assignments: list[str], *, tiny: bool = False) -> None:
    """Fix a run's configuration from a recipe.

    Raises:
        ConfigError: no such recipe, a wrong key or value, or a started run with other values.
    """
    rules = tiny_rules(recipe, tiny=tiny)
    write_run(home, run, recipes.run_config(recipes.recipe_path(RECIPES, recipe), assignments, tiny=rules))


def require_run(store: Store, run: str) -> None:
    """Check that a run is configured.

    Raises:
        ConfigError: it is not; the message lists those that are.
    """
    if not (store.run_folder(run) / CONFIG).is_file():
        known = ", ".join(store.keys(Scope.RUN)) or "none"
        raise ConfigError(f"run {run!r} has no configuration; name a --recipe, or one of the runs: {known}")


def prompt_maker(store: Store, config: RunConfig) -> PromptMaker:
    """Makes a run's prompts from the workspace's tables, as the trainer will from what is frozen with the run.

    Raises:
        DamageError: the set's file is damaged.
    """
    from training.models.text_encoders import load_tokenizer

    samples = Samples(store.table_file("training_set", config.encoding))
    known = vocabulary.from_tables(store.read("tag_vocabulary"), samples.tag_names, samples.word_names)
    base = config_folder(store.model_path(config.base))
    names = ("tokenizer", "tokenizer_2") if (base / "tokenizer_2").is_dir() else ("tokenizer",)
    return PromptMaker(samples, known, config.prompts, config.seed, [load_tokenizer(base / name) for name in names])


def example_prompts(store: Store, run: str, num_prompts: int) -> list[MadePrompt]:
    """Prompts of the first samples of a run's training set, as epoch 0 makes them.

    Raises:
        ConfigError: there is no such run.
        DataError: its encoding has no training set yet.
    """
    require_run(store, run)
    config = read_config(store.run_folder(run))
    if store.manifest("training_set", config.encoding) is None:
        raise DataError(f"run {run}: training_set {config.encoding} is not committed; run `foundry run` first")
    maker = prompt_maker(store, config)
    return maker.make(range(min(num_prompts, len(maker.samples))), 0)
