"""Our training runs as MLflow's: each is found by its name, and made where there is none."""

from typing import TYPE_CHECKING

from resources.mlflow import colors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_TAG = "foundry.run"
"""Tag that holds the name of our run."""


def find_or_make(
    client: "MlflowClient", experiment_id: str, name: str, start_ms: int | None
) -> "Run":
    """The run of that name; of two that were made at once, always the older one. One that was
    deleted is restored.

    Args:
        client: A connected client.
        experiment_id: MLflow's id of the experiment.
        name: The run's.
        start_ms: When it began, where it is made anew.
    """
    from mlflow.entities import LifecycleStage, ViewType

    name_filter = f"tags.`{RUN_TAG}` = '{name}'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    for view in (ViewType.ACTIVE_ONLY, ViewType.DELETED_ONLY):
        if found := client.search_runs(
            [experiment_id], name_filter, view, max_results=1, order_by=order
        ):
            if found[0].info.lifecycle_stage == LifecycleStage.DELETED:
                client.restore_run(found[0].info.run_id)
                return client.get_run(found[0].info.run_id)
            return found[0]
    tags = {RUN_TAG: name, colors.TAG: colors.free(client, experiment_id)}
    return client.create_run(
        experiment_id, start_time=start_ms, tags=tags, run_name=_known_name(name)
    )


def _known_name(run: str) -> str:
    """What a person calls a run: `base.7d8632a3` is the base model."""
    kind, _, name = run.partition(".")
    return f"{kind} model {name}" if kind == "base" and name else run
