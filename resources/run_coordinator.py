"""Refuses a launch that can only fail: a training run with a wrong recipe, key or value is told so
at once, in the page that launched it."""

from collections.abc import Mapping
from typing import Any, Self

from dagster import DagsterInstance, DagsterRun
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext
from dagster._serdes import ConfigurableClassData

from resources.workspace.paths import find_home
from resources.workspace.setup import AS_CONFIGURED, resolve_run
from resources.workspace.store import Store
from training.errors import ConfigError, DataError, PipelineError

PARTITION = "dagster/partition"
"""Tag of a run with its partition."""
RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
PARTITION_TAGS = (PARTITION, RANGE_START, RANGE_END)
"""Tags of a run that name its partitions."""
CONFIGURED_BY_LAUNCH = ("checkpoints", "prompt_statistics")
"""Assets whose launch may configure a run."""


class FoundryRunCoordinator(QueuedRunCoordinator):
    """Dagster's queue, with a look at what is put into it."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Made from dagster.yaml."""
        return cls(inst_data=inst_data, **config_value)

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Queue a run.

        Raises:
            PipelineError: it could not work; it is recorded as failed with the same words.
        """
        try:
            if context.workspace is not None:
                check_partitions(context.dagster_run, context.workspace.asset_graph, self._instance)
            check_launch(context.dagster_run)
        except PipelineError as error:
            self._instance.report_run_failed(
                context.dagster_run, f"refused before it started: {error}"
            )
            raise
        return super().submit_run(context)


def check_partitions(run: DagsterRun, graph: BaseAssetGraph, instance: DagsterInstance) -> None:
    """Check that a run of a partitioned stage names partitions that Dagster knows; whether the
    workspace knows them, too, is for the stage to say.

    Raises:
        DataError: it names none, or one that does not exist.
    """
    keys = [run.tags[tag] for tag in PARTITION_TAGS if tag in run.tags]
    for asset in sorted(run.asset_selection or ()):
        definition = graph.get(asset).partitions_def if graph.has(asset) else None
        if definition is None:
            continue
        name = asset.to_user_string()
        if not keys:
            raise DataError(
                f"{name}: the run was launched without a partition; choose one where it is launched"
            )
        with partition_loading_context(dynamic_partitions_store=instance):
            unknown = [key for key in keys if not definition.has_partition_key(key)]
        if unknown:
            raise DataError(f"{name}: there is no partition {unknown[0]!r}")


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
                raise ConfigError(
                    "set and tiny change a recipe: choose the recipe, or edit the run's config.toml"
                )
            continue
        if name := run.tags.get(PARTITION):
            resolve_run(
                Store(find_home()), name, recipe, list(assignments), tiny=bool(found.get("tiny"))
            )
