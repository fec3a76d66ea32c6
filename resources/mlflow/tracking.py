"""From event logs and score tables to MLflow, outside of the training process: safe to repeat,
never in its way. `resources.mlflow.catch_up` decides what is sent.

MLflow's step is `samples_seen`. One MLflow run per training run, one LoggedModel per checkpoint,
weights stay on disk.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from resources import guard
from resources.mlflow import calls, images, logged_models, registry, runs, spool
from resources.mlflow import experiment as tracking_experiment
from resources.mlflow import note as tracking_note
from resources.mlflow import params as tracking_params
from resources.mlflow import scores as tracking_scores
from resources.mlflow import views as mlflow_views
from resources.mlflow.calls import PROXIED
from resources.mlflow.spool import Chunk
from resources.workspace.workspace_id import workspace_id
from training import commit
from training.errors import TrackingError
from training.evaluation import verdict
from training.names import CheckpointName
from training.runs import run_folder
from training.runs.release import REPORT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NUM_IMAGES = 12
"""Sample images per checkpoint that go into MLflow's grid; it lists thousands slowly."""
_VERDICT, _VERDICTS = "verdict.", "verdict"
"""Tags: the word on one metric, and all of them for the runs' table."""
_STATUS = {
    "started": "RUNNING",
    "resumed": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


def workspace_tracking(home: Path, uri: str = "") -> "Tracking":
    """The tracker of a workspace: its own `mlflow.db`, or the one that `[tracking] uri` names.

    Args:
        home: The workspace; experiments are named after its folder, on a shared server with the
            workspace's id.
        uri: MLflow tracking URI; empty for the workspace's own.
    """
    home = home.resolve()
    own, known = not uri, workspace_id(home)
    return Tracking(
        uri=uri or f"sqlite:///{home / 'mlflow.db'}",
        experiment=home.name if own else f"{home.name}-{known[:6]}",
        workspace=known,
        artifacts=home / "mlartifacts" if own else None,
        ui=uri.rstrip("/") if uri.startswith("http") else guard.MLFLOW_PATH,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """One experiment of one MLflow. Every method raises nothing but TrackingError, within
    seconds."""

    uri: str
    """MLflow tracking URI."""
    experiment: str
    """Name of the experiment; made when first needed."""
    workspace: str = ""
    """Id of the workspace that the experiment is of: `resources.workspace.workspace_id`."""
    artifacts: Path | None = None
    """Folder of the artifacts where this process writes them itself; None where the server does.
    The database then holds no absolute path, and a workspace can be moved or copied."""
    ui: str = guard.MLFLOW_PATH
    """Address of MLflow's web pages, as Dagster's pages link to it."""

    def identity(self) -> str:
        """`mlflow_calls.identity` of the experiment, which is made where there is none.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        with calls.explained(f"MLflow at {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            experiment = client.get_experiment(self._experiment_id(client))
            return calls.identity(experiment.experiment_id, experiment.creation_time)

    def on_disk(self) -> tracking_experiment.Found | None:
        """The experiment as the database says without MLflow; None where there is none.

        Raises:
            LookupError: only MLflow can tell.
        """
        return tracking_experiment.on_disk(
            self.uri, self.experiment, workspace=self.workspace, own=self.artifacts is not None
        )

    def forward(self, folder: Path) -> int:
        """Send what a run's event log holds and MLflow does not have yet, with the times at which
        it happened.

        Args:
            folder: The run's folder; its name is the run's.

        Returns:
            The number of metrics sent. Killed at any point, the next call goes on without a loss or
            a repetition.

        Raises:
            TrackingError: MLflow is away, hung or refuses, or another process forwards this run;
                nothing is lost.
        """
        sent = 0
        what = f"forwarding of run {folder.name}"
        with (
            calls.explained(f"{what} to {calls.masked(self.uri)} failed"),
            commit.lock(folder / "tracking.lock", what),
        ):
            client = calls.connect(self.uri)
            run = self._run(client, folder.name, spool.began_ms(folder))
            state = spool.read_state(folder, run.info.run_id)
            if state.offset == 0:
                self._describe(client, run, folder)
            for chunk in spool.pending(folder, state):
                self._send(client, run, folder, chunk)
                spool.write_state(folder, chunk.state)
                sent += len(chunk.points)
        return sent

    def log_evaluation(
        self, checkpoint: str, *, metrics: pl.DataFrame, samples: pl.DataFrame, folder: Path
    ) -> None:
        """Send a checkpoint's summary, means by group and a handful of images; what is there
        already stays.

        Args:
            checkpoint: `<run>@<samples_seen>`.
            metrics: Rows of table `eval_metrics`.
            samples: Rows of table `sample_images`.
            folder: Where their files are.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        name, step = CheckpointName.parse(checkpoint)
        with calls.explained(f"scores of {checkpoint} are not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            run = self._run(client, name)
            model = logged_models.logged_model(client, run, checkpoint, {})
            tracking_scores.log(client, run, model.model_id, step, tracking_scores.points(metrics))
            if mlflow_views.TRAINED_TAG not in run.data.tags and run.info.status == "RUNNING":
                client.set_terminated(
                    run.info.run_id
                )  # the base or an external model: no event log says so
            self._log_images(client, run, step, samples, folder)
        self.views()

    def log_base_images(self, run: str, samples: pl.DataFrame, folder: Path) -> None:
        """Send the images that a run's base model draws, as those of the run's beginning: where
        its sliders begin.

        Args:
            run: Name of the run.
            samples: The base's rows of table `sample_images`.
            folder: Where their files are.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        with calls.explained(f"the base's images are not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            self._log_images(client, self._run(client, run), 0, samples, folder)
        self.views()

    def log_verdict(self, checkpoint: str, rows: pl.DataFrame, note: str) -> None:
        """Write a verdict over all prompts as tags of the judged checkpoint's run and LoggedModel,
        and all of it as the run's description, unless a person has written one.

        Args:
            checkpoint: The judged one.
            rows: Of table `verdicts`; none where there is no verdict, and then MLflow has none any
                more.
            note: Why there is none.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        with calls.explained(f"verdict on {checkpoint} is not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            run = self._run(client, CheckpointName.parse(checkpoint).run)
            model = logged_models.logged_model(client, run, checkpoint, {})
            overall = rows.filter(pl.col("group") == verdict.ALL).select("metric", "verdict")
            tags = {f"{_VERDICT}{metric}": word for metric, word in overall.iter_rows()}
            for name in [
                name for name in model.tags if name.startswith(_VERDICT) and name not in tags
            ]:
                client.delete_logged_model_tag(model.model_id, name)
            if tags:
                client.set_logged_model_tags(model.model_id, tags)
                tags[_VERDICTS] = ", ".join(
                    f"{metric} {word}" for metric, word in sorted(overall.iter_rows())
                )
            for name in run.data.tags:
                if name.startswith(_VERDICTS) and name not in tags:
                    client.delete_tag(run.info.run_id, name)
            said = "".join(f"\n- {verdict.sentence(row)}" for row in rows.iter_rows(named=True))
            about = (
                f"{checkpoint} against {rows['a'][0]}\n{said}"
                if said
                else f"none on {checkpoint}: {note}"
            )
            self._note(client, run.info.run_id, tags, about)

    def log_dagster_run(self, run: str, dagster_run: str) -> None:
        """Link from a run's page to the run of Dagster that trained it.

        Args:
            run: Name of the run.
            dagster_run: Dagster's id of its run.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        with calls.explained(f"Dagster's run of {run} is not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            self._note(
                client, self._run(client, run).info.run_id, {tracking_note.DAGSTER_TAG: dagster_run}
            )

    def log_file(self, checkpoint: str, name: str, content: bytes) -> None:
        """Keep a file, such as a report or a contact sheet, as artifact
        `evaluation/<samples_seen>/<name>`.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        run_name, step = CheckpointName.parse(checkpoint)
        with calls.explained(f"{name} of {checkpoint} is not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            run, path = self._run(client, run_name), f"evaluation/{step:09d}/{name}"
            self._put(client, run, path, content)
            if name == REPORT and run.data.tags.get(tracking_note.REPORT_TAG) != path:
                self._note(client, run.info.run_id, {tracking_note.REPORT_TAG: path})

    def set_champion(self, checkpoint: str, sentence: str) -> None:
        """Let the alias `champion` of the registered model, which has the experiment's name, follow
        `champion.json`.

        Args:
            checkpoint: `<run>@<samples_seen>`.
            sentence: The verdict that made it champion, in words; kept with the model's version.

        Raises:
            TrackingError: MLflow is away, hung or refuses.
        """
        with calls.explained(f"champion {checkpoint} is not sent to {calls.masked(self.uri)}"):
            client = calls.connect(self.uri)
            run = self._run(client, CheckpointName.parse(checkpoint).run)
            name = registry.registered_name(self.experiment)
            with calls.as_default(self.uri):
                registry.promote(
                    client,
                    name,
                    run,
                    logged_models.logged_model(client, run, checkpoint, {}),
                    sentence,
                )

    def views(self) -> dict[str, str]:
        """Name -> address of the views of this experiment, which are written where they are missing
        or out of date.

        Returns:
            None at all when MLflow is away; addresses of MLflow's own pages where views cannot be
            written.
        """
        try:
            with calls.explained(f"views of {self.experiment}"):
                client = calls.connect(self.uri)
                experiment_id = self._experiment_id(client)
                name = registry.registered_name(self.experiment)
                promoted = bool(client.search_registered_models(f"name = '{name}'", max_results=1))
        except TrackingError:
            return {}
        seeded = False
        with contextlib.suppress(TrackingError), calls.explained(f"views of {self.experiment}"):
            if mlflow_views.is_known(self.uri):
                mlflow_views.seed(client, client.get_experiment(experiment_id))
                seeded = True
        found = mlflow_views.links(self.ui, experiment_id, seeded=seeded)
        champion = {"Champion": f"{self.ui}/#/models/{name}?{mlflow_views.TRAINING_PAGES}"}
        return found | (champion if promoted else {})

    def run_url(self, run: str) -> str:
        """MLflow's page of a run, which is made where there is none yet; empty when MLflow is
        away."""
        try:
            with calls.explained(run):
                info = self._run(calls.connect(self.uri), run).info
        except TrackingError:
            return ""
        return f"{self.ui}/#/experiments/{info.experiment_id}/runs/{info.run_id}?{mlflow_views.TRAINING_PAGES}"

    def experiment_url(self) -> str:
        """MLflow's page of the experiment with its charts; empty when MLflow is away."""
        try:
            with calls.explained(self.experiment):
                experiment_id = self._experiment_id(calls.connect(self.uri))
        except TrackingError:
            return ""
        return f"{self.ui}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&{mlflow_views.TRAINING_PAGES}"

    def _experiment_id(self, client: "MlflowClient") -> str:
        return tracking_experiment.ready(
            client, self.experiment, workspace=self.workspace, own=self.artifacts is not None
        )

    def _run(self, client: "MlflowClient", name: str, start_ms: int | None = None) -> "Run":
        """The run of that name; of two that were made at once, always the older one. One that was
        deleted is restored.

        Args:
            client: A connected client.
            name: The run's.
            start_ms: When it began, where it is made anew; now without one.
        """
        return runs.find_or_make(client, self._experiment_id(client), name, start_ms)

    def _note(
        self, client: "MlflowClient", run_id: str, tags: Mapping[str, str], said: str | None = None
    ) -> None:
        """Set tags of a run, and the description that follows from them, unless a person has
        written one.

        Args:
            client: A connected client.
            run_id: MLflow's id of the run.
            tags: The tags.
            said: The verdict in words; what stands there where there is no new one.
        """
        run = client.get_run(run_id)
        note = tracking_note.note(
            run.data.tags | tags,
            said,
            run.info.experiment_id,
            run_id,
            dagster=self.ui == guard.MLFLOW_PATH,
        )
        calls.log_batch(client, run_id, tags=dict(tags) | note)

    def _describe(self, client: "MlflowClient", run: "Run", folder: Path) -> None:
        """Headlines, the whole config, and what the run is trained on."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        config, inputs = run_folder.read_config(folder), run_folder.read_inputs(folder)
        text = (folder / run_folder.CONFIG).read_bytes()
        # MLflow prints all params above every image, and then cuts the image: two fit into one
        # line.
        params = {
            "num_samples": config.num_samples,
            "learning_rate": config.optimizer.learning_rate,
        }
        tags = {
            mlflow_views.TRAINED_TAG: inputs.fingerprint,
            "foundry.base": inputs.base_digest[:8],
            "foundry.seed": str(config.seed),
            "foundry.global_batch_size": str(config.batch.global_batch_size),
            images.DUE_TAG: json.dumps([config.checkpoints.every_samples, config.num_samples]),
        }
        calls.log_batch(client, run.info.run_id, params=params, tags=tags)
        tracking_params.log_differing(client, run.info.experiment_id, runs.RUN_TAG, folder.parent)
        self._put(client, run, run_folder.CONFIG, text)
        source = json.dumps(
            {"training_set": inputs.training_set.name, "fingerprint": inputs.fingerprint}
        )
        # 36 characters are all that MLflow's column holds.
        data = Dataset(
            name=config.encoding, digest=inputs.fingerprint[:36], source_type="local", source=source
        )
        client.log_inputs(
            run.info.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        )

    def _send(self, client: "MlflowClient", run: "Run", folder: Path, chunk: Chunk) -> None:
        from mlflow.entities import Metric

        run_id = run.info.run_id
        metrics = [
            Metric(point.name, point.value, point.time_ms, point.samples_seen)
            for point in chunk.points
        ]
        tags = {"foundry.last_warning": chunk.last_warning[:1_000]} if chunk.last_warning else {}
        if chunk.phase is not None and chunk.phase["event"] == "failed":
            tags["foundry.reason"] = str(chunk.phase.get("reason", ""))[:1_000]
        calls.log_batch(client, run_id, metrics=metrics, tags=tags)
        for event in chunk.checkpoints:
            tags = {"folder": f"{folder.name}/{event['folder']}", "digest": str(event["digest"])}
            logged_models.logged_model(client, run, str(event["checkpoint"]), tags)
        if chunk.phase is not None:
            status = _STATUS[chunk.phase["event"]]
            if status == "RUNNING":
                client.update_run(run_id, status=status)
            else:
                client.set_terminated(run_id, status, end_time=chunk.phase["time_ms"])

    def _log_images(
        self, client: "MlflowClient", run: "Run", step: int, samples: pl.DataFrame, folder: Path
    ) -> None:
        chosen, step = (
            images.choose_images(samples, NUM_IMAGES),
            images.due_step(run.data.tags, step),
        )
        put = functools.partial(self._put, client, run)
        calls.log_batch(client, run.info.run_id, tags=images.put(run, step, chosen, folder, put))

    def _put(self, client: "MlflowClient", run: "Run", name: str, content: bytes) -> None:
        """Write one artifact; the same name again replaces it."""
        if self.artifacts is not None and run.info.artifact_uri.startswith(PROXIED):
            path = self.artifacts / run.info.artifact_uri.removeprefix(PROXIED) / name
            commit.write_bytes(
                path, content, folder=self.artifacts
            )  # MLflow lists whatever lies beside it
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(content)
            client.log_artifact(run.info.run_id, str(path), name.rpartition("/")[0] or None)
