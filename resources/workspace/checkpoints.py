"""Which checkpoints and external models a workspace has, where they lie, and which are evaluated."""

from dataclasses import dataclass
from pathlib import Path

from resources.workspace import reading
from resources.workspace.models import Models
from resources.workspace.paths import Paths
from resources.workspace.tables import Tables
from training.errors import DataError
from training.evaluation import champion
from training.evaluation.candidates import due, read_external_models
from training.names import CheckpointName
from training.runs import retention
from training.runs.event_log import has_finished
from training.runs.run_folder import (
    CONFIG,
    EVENTS,
    READY,
    checkpoint_folder,
    checkpoints,
    read_config,
    read_ready,
)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one workspace, by name (`CheckpointName`)."""

    paths: Paths
    tables: Tables
    models: Models

    @reading.beside()
    def base(self) -> str | None:
        """Name of the base model as a checkpoint, once it is recorded."""
        if self.tables.manifest("base_model", "base") is None:
            return None
        return str(self.tables.read("base_model", ["checkpoint"], ["base"])["checkpoint"][0])

    def to_evaluate(self, *, training: bool = False) -> list[str]:
        """The base model, external models, of each run that has ended the first, every N-th and the
        last checkpoint, and the champion, so that its scores are always of the protocol of those
        that challenge it.

        Args:
            training: Those of runs that are still training as well.
        """
        base, names = self.base(), []
        if base:
            external = [
                str(CheckpointName.of_external(name))
                for name in read_external_models(self.paths.home)
            ]
            names = [base, *external]
        for run in self.paths.runs() if training else self.finished_runs():
            folder = self.paths.run_folder(run)
            config = read_config(folder)
            saved = [read_ready(path).samples_seen for path in checkpoints(folder)]
            every, interval = self.paths.config.evaluation.every, config.checkpoints.every_samples
            found = due(saved, interval=interval, every=every, num_samples=config.num_samples)
            names.extend(str(CheckpointName(run, samples_seen)) for samples_seen in found)
        now = champion.read(self.paths.home)
        best = now.checkpoint if now is not None else ""
        if best and CheckpointName.parse(best).is_of_run and self.exists(best):
            names.append(best)
        return list(dict.fromkeys(names))

    def finished_runs(self) -> list[str]:
        """Runs whose checkpoints are committed; a run whose folder was removed since, or that is
        trained anew, is none of them."""
        folders = {run: self.paths.run_folder(run) for run in self.tables.parts("checkpoints")}
        return [
            run
            for run, path in folders.items()
            if (path / CONFIG).is_file() and has_finished(path / EVENTS)
        ]

    @reading.beside()
    def last(self, run: str) -> str | None:
        """The last checkpoint of a run that has ended; None while it has not."""
        if run not in self.finished_runs():
            return None
        rows = self.tables.read("checkpoints", ["checkpoint", "samples_seen"], [run])
        rows = rows.sort("samples_seen")
        return str(rows["checkpoint"][-1]) if rows.height else None

    def exists(self, checkpoint: str) -> bool:
        """Whether a checkpoint's weights are still there; retention removes those of runs.

        Raises:
            DataError: no checkpoint of this workspace has that name.
        """
        folder = self.folder(checkpoint)
        if CheckpointName.parse(checkpoint).is_of_run:
            return (folder / READY).is_file()
        return folder.exists()

    def keep(self, checkpoint: str, purpose: str) -> None:
        """Keep a checkpoint of a run from retention until it is let go for the same purpose; other
        models stay anyway.

        Raises:
            DataError: retention was faster.
        """
        if not CheckpointName.parse(checkpoint).is_of_run:
            return
        try:
            retention.want(self.folder(checkpoint), purpose)
        except FileNotFoundError:
            raise DataError(
                f"checkpoint {checkpoint} is not there any more: its run's retention removed it"
            ) from None

    def let_go(self, checkpoint: str, purpose: str) -> None:
        """End what `keep` began."""
        if CheckpointName.parse(checkpoint).is_of_run:
            retention.release(self.folder(checkpoint), purpose)

    def folder(self, checkpoint: str) -> Path:
        """Model folder of `<run>@<samples_seen>`, of an external model, or of the base model.

        Raises:
            DataError: there is no such checkpoint.
        """
        if checkpoint == self.base():
            return self.models.path("base")
        name = CheckpointName.parse(checkpoint)
        if external := self.external_path(name):
            return external
        if name.is_base:
            raise DataError(
                f"{checkpoint!r} is no checkpoint of this workspace (<run>@<samples_seen>)"
            )
        return checkpoint_folder(self.paths.run_folder(name.run), name.samples_seen)

    def digest(self, checkpoint: str) -> str:
        """Digest of a checkpoint's weights."""
        if checkpoint == self.base():
            return self.models.digest("base")
        if external := self.external_path(CheckpointName.parse(checkpoint)):
            return self.models.digest_at(external)
        return read_ready(self.folder(checkpoint)).digest

    def external_path(self, checkpoint: CheckpointName) -> Path | None:
        """Model of an external model; None for other checkpoints.

        Raises:
            DataError: there is no such model, or its files are missing.
        """
        name = checkpoint.external_name
        if not name or checkpoint.samples_seen:
            return None
        externals = read_external_models(self.paths.home)
        if name not in externals:
            raise DataError(
                f"there is no external model {name!r}; there are: {', '.join(externals) or 'none'}"
            )
        path = Path(externals[name])
        if not path.exists():
            raise DataError(
                f"external model {name!r}: {path} is missing; bring it back, or `foundry external remove {name}`"
            )
        return path
