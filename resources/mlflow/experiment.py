"""Which experiment of an MLflow is a workspace's: one that names its id, whatever it is called and
wherever it lies.

A database that belongs to one workspace goes where that goes: its experiment is taken along by a
copy, under the copy's name and id. On a shared server a copy gets an experiment of its own.
"""

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from resources.mlflow import calls
from resources.mlflow.calls import PROXIED, SQLITE

if TYPE_CHECKING:
    from mlflow import MlflowClient

WORKSPACE_TAG = "foundry.workspace"
"""Tag of an experiment: the id of its workspace."""
_VERSIONS = "mlflow.modelVersions"
"""Tag of a LoggedModel by which MLflow's table of models names its version."""


class Found(NamedTuple):
    """An experiment as far as the choice needs it."""

    experiment_id: str
    name: str
    created_ms: int
    workspace: str
    """What its tag says; empty without one."""
    deleted: bool = False


def choose(found: Sequence[Found], name: str, *, workspace: str, own: bool) -> Found | None:
    """The workspace's experiment among all of an MLflow; None where it has none yet.

    Args:
        found: All of them.
        name: What it is called, which decides where no experiment names a workspace.
        workspace: The workspace's id.
        own: Whether the MLflow belongs to this workspace alone.
    """
    ours = [item for item in found if item.workspace and item.workspace == workspace]
    taken_along = [item for item in found if own and item.workspace]
    named = [item for item in found if item.name == name and not item.workspace]
    return min(ours or taken_along or named, key=lambda item: int(item.experiment_id), default=None)


def ready(client: "MlflowClient", name: str, *, workspace: str, own: bool) -> str:
    """Id of the workspace's experiment, which afterwards is there, active, and has the workspace's
    name and id.

    Args:
        client: A connected client.
        name: What it is called.
        workspace: The workspace's id.
        own: Whether the MLflow belongs to this workspace alone.
    """
    from mlflow.exceptions import MlflowException

    found = choose(
        _candidates(client, name, workspace=workspace, own=own), name, workspace=workspace, own=own
    )
    if found is None:
        # MLflow's pages show curves and images for this kind of experiment, and chats for the
        # default one.
        tags = {"mlflow.experimentKind": "custom_model_development", WORKSPACE_TAG: workspace}
        location = f"{PROXIED}{calls.slug(name)}" if own else None
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            found = choose(
                _candidates(client, name, workspace=workspace, own=own),
                name,
                workspace=workspace,
                own=own,
            )
            if found is None:
                raise  # else another process was faster
    if found.deleted:
        client.restore_experiment(found.experiment_id)
    if found.name != name and client.get_experiment_by_name(name) is None:
        _rename(client, found, name)
    if found.workspace != workspace:
        client.set_experiment_tag(found.experiment_id, WORKSPACE_TAG, workspace)
    return found.experiment_id


def on_disk(uri: str, name: str, *, workspace: str, own: bool) -> Found | None:
    """The workspace's experiment, read past MLflow, whose import takes 2 s; None where there is
    none.

    Raises:
        LookupError: only MLflow can tell: it is a server, or the database is locked.
    """
    if not uri.startswith(SQLITE):
        raise LookupError(uri)
    path = Path(uri.removeprefix(SQLITE)).absolute()
    if not path.is_file():
        return None
    query = """select e.experiment_id, e.name, e.creation_time, coalesce(t.value, ''), e.lifecycle_stage = 'deleted'
        from experiments e left join experiment_tags t on t.experiment_id = e.experiment_id and t.key = ?"""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute(query, [WORKSPACE_TAG]).fetchall()
    except sqlite3.Error as error:
        raise LookupError(str(error)) from error
    found = [Found(str(row[0]), row[1], int(row[2] or 0), row[3], bool(row[4])) for row in rows]
    return choose(found, name, workspace=workspace, own=own)


def tag_on_disk(uri: str, experiment_id: str, key: str) -> str:
    """A tag of an experiment, read past MLflow; empty where there is none.

    Raises:
        LookupError: the database cannot be read.
    """
    path = Path(uri.removeprefix(SQLITE)).absolute()
    query = "select value from experiment_tags where experiment_id = ? and key = ?"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            row = database.execute(query, [int(experiment_id), key]).fetchone()
    except sqlite3.Error as error:
        raise LookupError(str(error)) from error
    return str(row[0]) if row else ""


def _candidates(client: "MlflowClient", name: str, *, workspace: str, own: bool) -> list[Found]:
    """All that `choose` may choose from: on a server that has thousands, only those with the right
    id or name."""
    from mlflow.entities import LifecycleStage, ViewType

    wanted = None if own else f"tags.`{WORKSPACE_TAG}` = '{workspace}'"
    found = list(client.search_experiments(ViewType.ALL, filter_string=wanted, max_results=1_000))
    if not found and (named := client.get_experiment_by_name(name)) is not None:
        found = [named]
    return [
        Found(
            str(item.experiment_id), item.name, int(item.creation_time or 0), item.tags.get(WORKSPACE_TAG, ""),
            item.lifecycle_stage == LifecycleStage.DELETED,
        )
        for item in found
    ]  # fmt: skip


def _rename(client: "MlflowClient", found: Found, name: str) -> None:
    """Call an experiment and its registered model otherwise; the model first, so that a kill
    between is made good."""
    before, after = calls.slug(found.name), calls.slug(name)
    there, taken = (
        client.search_registered_models(f"name = '{one}'", max_results=1) for one in (before, after)
    )
    if there and not taken:
        client.rename_registered_model(before, after)
    for version in client.search_model_versions(f"name = '{after}'"):
        link = json.dumps([{"name": after, "version": str(version.version)}])
        client.set_logged_model_tags(version.source.removeprefix("models:/"), {_VERSIONS: link})
    client.rename_experiment(found.experiment_id, name)
