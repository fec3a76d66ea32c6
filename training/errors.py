"""The error tree. Every error a user can mend names the thing, its value and the rule."""


class PipelineError(Exception):
    """Base of all errors this project raises on purpose; its message is one line for the user."""


class ConfigError(PipelineError):
    """A key, a value or a combination in `foundry.toml`, a recipe or a command that cannot be
    used."""


class DeclarationError(PipelineError):
    """A stage whose declaration cannot stand, or that reads what its declaration does not name."""


class WorkspaceError(PipelineError):
    """The workspace is missing, of another format, or held by another process."""


class LockedError(WorkspaceError):
    """Somebody else holds the lock; the message names pid, host and start."""


class DamageError(PipelineError):
    """A committed file does not match its manifest: cut, swapped, rotten or gone."""


class DataError(PipelineError):
    """The input as a whole is unusable: an empty folder, no usable image, a table that lies."""


class ModelError(PipelineError):
    """Weights are missing, of another architecture, or of another digest than recorded."""


class TrainingError(PipelineError):
    """A training run cannot start or go on: its last good state is kept."""


class EvaluationError(PipelineError):
    """Things that cannot be compared, or an evaluation that cannot run."""


class FailedImagesError(EvaluationError):
    """No verdict on a checkpoint, because images have no scores; the message names them and what
    to do."""


class WorkerLostError(PipelineError):
    """Worker processes died repeatedly at one batch, or do not start; the message names the batch
    and how they ended."""


class TrackingError(PipelineError):
    """The tracker is away. Raised only where a user asked for it by name, never in training."""
