"""When Dagster brings a partition up to date by itself: when the store says that it is stale, and
no sooner."""

from abc import abstractmethod
from functools import lru_cache
from pathlib import Path

import dagster as dg
from dagster._core.definitions.events import AssetKeyPartitionKey

from assets.registry import STAGES
from resources.graph import Scope
from resources.workspace.paths import find_home
from resources.workspace.store import Store
from training.errors import PipelineError
from training.names import CheckpointName
from training.runs.run_folder import is_away

MAX_ATTEMPTS = 3
"""Times that one partition is tried without success, as long as nothing that it follows from
changes."""


@lru_cache(maxsize=256)
def _stale(home: Path, name: str, tick: object) -> frozenset[str]:
    """Stale partitions of a stage, once for each tick; none where it cannot be judged.

    Left out are runs that are away, and what cannot be made yet of an external model, which may
    never be.
    """
    store, stage = Store(home), STAGES[name]
    try:
        keys = store.currency.stale(stage)
        if stage.scope is Scope.CHECKPOINT:
            keys = [
                key
                for key in keys
                if not CheckpointName.parse(key).is_external
                or store.currency.basis(stage, key) is not None
            ]
        return frozenset(
            key
            for key in keys
            if stage.scope is not Scope.RUN or not is_away(store.paths.run_folder(key))
        )
    except PipelineError:
        return frozenset()


class _StoreCondition(dg.AutomationCondition):
    """A condition on the partitions of a stage that the store names."""

    @abstractmethod
    def _keys(self, name: str, tick: object) -> frozenset[str]:
        """The partitions of a stage that are meant, at one tick of the sensor."""

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """The partitions of this asset that the store names, of those that Dagster knows; none of
        assets from outside."""
        name = context.key.to_user_string()
        if name not in STAGES or context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        view = context.asset_graph_view
        keys = self._keys(name, view.effective_dt)
        whole = STAGES[name].scope is Scope.ALL
        chosen = {AssetKeyPartitionKey(context.key, None if whole else key) for key in keys}
        subset = view.get_asset_subset_from_asset_partitions(
            context.key, chosen, validate_existence=True
        )
        return dg.AutomationResult(context, subset.compute_intersection(context.candidate_subset))


class IsStale(_StoreCondition):
    """Partitions that `store.currency.stale` names."""

    @property
    def name(self) -> str:
        """As Dagster shows it."""
        return "stale, says the store"

    def _keys(self, name: str, tick: object) -> frozenset[str]:
        return _stale(find_home(), name, tick)


class HoldsUp(_StoreCondition):
    """Stale partitions that others wait for: all but those of external models."""

    @property
    def name(self) -> str:
        """As Dagster shows it."""
        return "stale, and of no external model"

    def _keys(self, name: str, tick: object) -> frozenset[str]:
        keys = _stale(find_home(), name, tick)
        if STAGES[name].scope is not Scope.CHECKPOINT:
            return keys
        return frozenset(key for key in keys if not CheckpointName.parse(key).is_external)


class WasTried(_StoreCondition):
    """Stale partitions that were tried `MAX_ATTEMPTS` times from what is there now."""

    @property
    def name(self) -> str:
        """As Dagster shows it."""
        return f"failed {MAX_ATTEMPTS} times, and nothing has changed since"

    def _keys(self, name: str, tick: object) -> frozenset[str]:
        store, stage = Store(find_home()), STAGES[name]
        stale = _stale(store.home, name, tick)
        return frozenset(
            key for key in stale if store.currency.attempts(stage, key) >= MAX_ATTEMPTS
        )


CONDITION = (
    IsStale()
    & ~WasTried()
    & ~dg.AutomationCondition.any_deps_match(HoldsUp())
    & ~dg.AutomationCondition.in_progress()
)
"""Of `keep_current`: the first stale stages now, those that read them when they are made."""
