"""What assets are handed: the store of the workspace that this process serves, and an IO manager
that refuses."""

from typing import Any

import dagster as dg

from resources.instance import check_instance
from resources.workspace.paths import find_home
from resources.workspace.store import Store


@dg.resource
def store_resource(context: dg.InitResourceContext) -> Store:
    """The store of this process's workspace; refuses a Dagster instance that lies outside of it."""
    store = Store(find_home(), run_id=context.run.run_id if context.run else "")
    if context.instance is not None:
        check_instance(context.instance, store.home)
    return store


class _Refusing(dg.IOManager):
    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        if obj is not None:
            raise dg.DagsterInvariantViolationError(
                f"{context.asset_key}: stages commit through the store, not by value"
            )

    def load_input(self, context: dg.InputContext) -> Any:
        raise dg.DagsterInvariantViolationError(
            f"{context.asset_key}: stages read through the store, not by value"
        )


@dg.io_manager
def io_manager(context: dg.InitResourceContext) -> dg.IOManager:
    """Stock IO managers truncate before they write; this one keeps nothing."""
    return _Refusing()
