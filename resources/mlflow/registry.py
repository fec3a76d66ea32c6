"""The champion in MLflow's registry: a model version made from the checkpoint's LoggedModel, and
the alias on it.

`champion.json` is the truth, and MLflow follows it. Each step leaves alone what is there already,
so that a call which was cut off at any point is finished by the next one.
"""

import json
from typing import TYPE_CHECKING

from resources.mlflow import calls

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "champion"
CHAMPION_TAG = "foundry.champion"
"""Tag of the champion's run, which the runs' table shows: at which of its checkpoints."""
_VERDICT, _CHECKPOINT = "verdict", "checkpoint"
_VERSIONS = "mlflow.modelVersions"
"""Tag of a LoggedModel by which MLflow's table of models names its version."""
_MAX_TEXT = 5_000
"""Characters that a tag of a model version holds."""


def promote(
    client: "MlflowClient", name: str, run: "Run", model: "LoggedModel", sentence: str
) -> None:
    """Give the alias `champion` of the registered model `name` to a checkpoint; versions before it
    stay.

    Args:
        client: A connected client.
        name: Of the registered model, which is made where there is none.
        run: The checkpoint's run.
        model: The checkpoint's LoggedModel.
        sentence: The verdict in words.
    """
    version, sentence = _version(client, name, run, model), sentence[:_MAX_TEXT]
    for key, value in {_VERDICT: sentence, _CHECKPOINT: model.params["checkpoint"]}.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    if version.description != sentence:
        client.update_model_version(name, version.version, description=sentence)
    link = json.dumps([{"name": name, "version": str(version.version)}])
    if model.tags.get(_VERSIONS) != link:
        client.set_logged_model_tags(model.model_id, {_VERSIONS: link})
    if str(client.get_registered_model(name).aliases.get(ALIAS)) != str(version.version):
        client.set_registered_model_alias(name, ALIAS, version.version)
    since = f"at {model.params['samples_seen']} samples"
    if run.data.tags.get(CHAMPION_TAG) != since:
        client.set_tag(run.info.run_id, CHAMPION_TAG, since)
    for former in client.search_runs([run.info.experiment_id], f"tags.`{CHAMPION_TAG}` != ''"):
        if former.info.run_id != run.info.run_id:
            client.delete_tag(former.info.run_id, CHAMPION_TAG)


def _version(client: "MlflowClient", name: str, run: "Run", model: "LoggedModel") -> "ModelVersion":
    """The version of a LoggedModel, made where there is none."""
    from mlflow.exceptions import MlflowException

    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        about = (
            "The best checkpoint so far, by paired verdicts on the images of one prompt set; "
            "weights stay on disk."
        )
        try:
            client.create_registered_model(name, description=about)
        except MlflowException:
            client.get_registered_model(
                name
            )  # another process was faster; else this says what is wrong
    source = f"models:/{model.model_id}"
    found = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.source == source
    ]
    if found:
        return min(found, key=lambda version: int(version.version))
    return client.create_model_version(
        name, source=source, run_id=run.info.run_id, model_id=model.model_id
    )


def registered_name(experiment: str) -> str:
    """The registered model of an experiment: its name, in characters that MLflow takes."""
    return calls.slug(experiment)
