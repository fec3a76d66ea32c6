"""How MLflow is called: quickly given up, quietly, and with one kind of error."""

import contextlib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import commit
from training.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROXIED = "mlflow-artifacts:/"
"""How artifacts are addressed that lie where a server keeps them: without a path of this
machine."""
_DEFAULT = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"
_SETTINGS = {
    # The defaults block 246 s per call when a server is away (measured).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "true",
}


def connect(uri: str) -> "MlflowClient":
    """A client of the MLflow at `uri`; a SQLite database is created where there is none."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(
        logging.ERROR
    )  # its retries are in the error that we raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow 3.17 imports modules that others have deprecated
        from mlflow import MlflowClient

        if uri.startswith(SQLITE):
            create_database(Path(uri.removeprefix(SQLITE)))
        return MlflowClient(tracking_uri=uri)


def version(uri: str) -> tuple[int, int]:
    """Major and minor version of the MLflow at `uri`, whose pages people see; (0, 0) when it does
    not say."""
    import mlflow

    found = str(mlflow.__version__)
    if uri.startswith("http"):
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        found = str(http_request(get_default_host_creds(uri), "/version", "GET").text)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


@contextlib.contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default for a while: its registry (3.17) looks for LoggedModels there,
    whatever its store."""
    before = os.environ.get(_DEFAULT)
    os.environ[_DEFAULT] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DEFAULT]
        else:
            os.environ[_DEFAULT] = before


def create_database(path: Path) -> None:
    """Create MLflow's SQLite database, one process at a time: two at once would break it. Takes 3
    to 6 s, once."""
    if path.is_file():
        return
    with commit.lock(
        path.parent / "locks" / "mlflow.lock", f"the MLflow database {path}", wait_s=120
    ):
        if not path.is_file():
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # Under another name first: a kill in the middle leaves no half database that looks
            # whole.
            with commit.temporary(path, beside=commit.SQLITE_BESIDE) as fresh:
                SqlAlchemyStore(f"sqlite:///{fresh}", PROXIED).engine.dispose()
                os.replace(fresh, path)


def identity(experiment_id: str | int, created_ms: int) -> str:
    """What no other experiment has, not even one of the same name in a database that was deleted
    and made again."""
    return f"{experiment_id} made at {created_ms}"


def slug(text: str) -> str:
    """`text` in characters that keys, file names and filters take; what had to change keeps a
    digest."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def log_batch(
    client: "MlflowClient", run_id: str, *, metrics: list[Any] | None = None,
    params: Mapping[str, object] | None = None, tags: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """One batch, written before this returns; params and tags as text."""
    from mlflow.entities import Param, RunTag

    client.log_batch(
        run_id,
        metrics=metrics or [],
        params=[Param(name, str(value)) for name, value in (params or {}).items()],
        tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        synchronous=True,
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error into TrackingError: a tracker must never end what it tracks."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # MLflow, requests, SQLAlchemy and Pillow raise kinds of their own
        reason = masked(" ".join(str(error).split()))[:300] or type(error).__name__
        raise TrackingError(f"{what}: {reason}; it is sent with the next call") from error


def masked(text: str) -> str:
    """`text` without the credentials of addresses in it."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)
