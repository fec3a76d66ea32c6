"""Refuses a launch that can only fail: a training run with a wrong recipe, key or value is told so at once, in the
page that launched it."""

from collections.abc import Mapping
from typing import Any, Self

from dagster import DagsterRun
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext
from dagster._serdes import ConfigurableClassData

from resources.store import Store, find_home
from resources.workspace import AS_CONFIGURED, resolve_run
from training.errors import ConfigError, PipelineError

PARTITION = "dagster/partition"
CONFIGURED_BY_LAUNCH = ("checkpoints", "prompt_statistics")
"""Assets whose launch may configure a run."""


class FoundryRunCoordinator(QueuedRunCoordinator):
    """Dagster's queue, with a look at what is put into it."""

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
        """Made from dagster.yaml."""
        return cls(inst_data=inst_data, **config_value)

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Queue a run.

        Raises:
            PipelineError: it could not work; it is recorded as failed with the same words.
        """
        try:
            check_launch(context.dagster_run)
        except PipelineError as error:
            self._instance.report_run_failed(context.dagster_run, f"refused before it started: {error}")
            raise
        return super().submit_run(context)


def check_launch(run: DagsterRun) -> None:
    """Check what a launch says of a training run as `foundry train` does.

    Raises:
        ConfigError: no such recipe, a wrong key or value, or a started run with other values.
    """
    ops: Any = run.run_config.get("ops", {})
    for asset in CONFIGURED_BY_LAUNCH:
        found = ops.get(asset, {}).get("config") or {}
        recipe, assignments = found.get("recipe", AS_CONFIGURED), found.get("set", [])
        if recipe == AS_CONFIGURED:
            if assignments or found.get("tiny"):
                raise ConfigError("set and tiny change a recipe: choose the recipe, or edit the run's config.toml")
            continue
        if name := run.tags.get(PARTITION):
            resolve_run(Store(find_home()), name, recipe, list(assignments), tiny=bool(found.get("tiny")))
