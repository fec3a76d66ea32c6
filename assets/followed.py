"""Settings and model folders as assets of Dagster's graph, which shows with them what each stage
follows from."""

import re

import dagster as dg

from resources.graph import Stage, nothing
from training.config.workspace import WorkspaceConfig

SETTINGS, MODELS = "settings", "models"
"""Groups, and first parts of the keys."""


def settings_tables(stage: Stage) -> list[str]:
    """The tables of foundry.toml that a stage reads."""
    if stage.settings:
        return [re.split(r"[.{]", stage.settings)[0]]
    if stage.config is nothing:
        return []
    config = WorkspaceConfig()
    return [
        name for name in stage.config(config, "all") if not isinstance(getattr(config, name), int)
    ]


def settings_key(table: str) -> dg.AssetKey:
    """The asset that stands for a table of foundry.toml."""
    return dg.AssetKey([SETTINGS, table])


def model_key(name: str) -> dg.AssetKey:
    """The asset that stands for a model folder."""
    return dg.AssetKey([MODELS, name])


def deps(stage: Stage) -> list[dg.AssetKey]:
    """The settings and models that a stage follows from."""
    return [*map(settings_key, settings_tables(stage)), *map(model_key, stage.models)]
