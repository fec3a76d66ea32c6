"""What the launch dialog asks for a training run: the recipe that it follows, and what differs from
it."""

from enum import Enum

import dagster as dg
from pydantic import Field

from resources.workspace.setup import AS_CONFIGURED, RECIPES, configure_run
from resources.workspace.store import Store
from training.config.recipes import recipe_names

Recipe = Enum("Recipe", {name: name for name in (AS_CONFIGURED, *recipe_names(RECIPES))})  # type: ignore[misc]


class RunSettings(dg.Config):
    """The run's name is the partition: choose one, or add a new one in the dialog where the
    partition is chosen."""

    recipe: Recipe = Field(
        default=Recipe[AS_CONFIGURED],
        description="Recipe whose [run] half a new run trains. as_configured for a run that has its configuration "
        "already: it goes on where it stopped.",
    )
    set: list[str] = Field(
        default=[],
        description="What differs from the recipe, one key=value a line, as after `foundry train --set`: "
        "optimizer.learning_rate=1e-5, num_samples=500000. `foundry train --dry-run` prints every key and its value.",
    )
    tiny: bool = Field(
        default=False, description="Divide sizes by recipes/tiny.toml, to try a recipe out."
    )


class TrainSettings(RunSettings):
    """What the dialog of `checkpoints` asks besides."""

    without_forgotten: bool = Field(
        default=False,
        description="Go on without those images of the run's training set that were forgotten since it began, as "
        "`foundry train --without-forgotten` does; else such a run is refused.",
    )


def configure(store: Store, run: str, settings: RunSettings) -> None:
    """Fix the configuration of a new run, as `foundry train` does; nothing for one that has its
    own.

    Raises:
        ConfigError: a wrong key or value, or a started run with other values.
    """
    if is_new(settings):
        configure_run(store.home, run, settings.recipe.value, settings.set, tiny=settings.tiny)


def is_new(settings: RunSettings) -> bool:
    """Whether a launch configures its run."""
    return settings.recipe.value != AS_CONFIGURED
