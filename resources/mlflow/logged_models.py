"""Checkpoints as MLflow's logged models."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from training.names import CheckpointName

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run


def logged_model(
    client: "MlflowClient", run: "Run", checkpoint: str, tags: Mapping[str, str]
) -> "LoggedModel":
    """The LoggedModel of a checkpoint, made where there is none; of two that were made at once,
    the older one."""
    from mlflow.entities import LoggedModelOutput

    name = re.sub(r"[/:.%\"']", "-", checkpoint)
    model_filter = f"name = '{name}' AND source_run_id = '{run.info.run_id}'"
    order: list[dict[str, object]] = [{"field_name": "creation_timestamp", "ascending": True}]
    found = client.search_logged_models(
        [run.info.experiment_id], filter_string=model_filter, max_results=1, order_by=order
    )
    step = CheckpointName.parse(checkpoint).samples_seen
    params = {"checkpoint": checkpoint, "samples_seen": str(step)}
    model = found[0] if found else client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run.info.run_id, params=params, model_type="checkpoint"
    )  # fmt: skip
    if str(model.status) != "READY":
        # A process that was killed between the two calls has left the output, which MLflow
        # takes only once.
        outputs = client.get_run(run.info.run_id).outputs.model_outputs
        if all(output.model_id != model.model_id for output in outputs):
            client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
        model = client.finalize_logged_model(model.model_id, "READY")
    if tags:
        client.set_logged_model_tags(model.model_id, dict(tags))
    return model
