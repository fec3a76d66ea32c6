"""Every stage by name, in order: read from the modules that declare them."""

from types import ModuleType

import dagster as dg

from assets.stages import MODULES
from resources.graph import Scope, Stage, ordered


def declared(module: ModuleType) -> list[Stage]:
    """The stages that a module declares, singly or in tuples, in the order of its text."""
    found: dict[str, Stage] = {}
    for value in vars(module).values():
        for stage in value if isinstance(value, tuple) else (value,):
            if isinstance(stage, Stage) and stage.body and stage.body.__module__ == module.__name__:
                found[stage.name] = stage
    return list(found.values())


def checks_of(module: ModuleType) -> list[dg.AssetChecksDefinition]:
    """The checks that a module states."""
    return [value for value in vars(module).values() if isinstance(value, dg.AssetChecksDefinition)]


STAGES = ordered([stage for module in MODULES for stage in declared(module)])
"""Every stage by the name of its asset, each after all that it reads: the order of `foundry
run`."""


def in_groups(*groups: str, scope: Scope) -> tuple[Stage, ...]:
    """The stages of groups that have the same partitions, in order: what one job makes."""
    return tuple(
        stage for stage in STAGES.values() if stage.group in groups and stage.scope is scope
    )


def chosen(*groups: str, scope: Scope) -> dg.AssetSelection:
    """Those stages, for a job to make."""
    return dg.AssetSelection.assets(*(stage.name for stage in in_groups(*groups, scope=scope)))
