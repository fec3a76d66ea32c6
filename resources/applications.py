"""The two web applications that `foundry up` serves behind the guard: Dagster's and MLflow's."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resources.guard import DAGSTER_PATH, MLFLOW_PATH, Application, Guard
from resources.mlflow.calls import create_database
from resources.mlflow.page import FirstPage

LOCATION = "foundry"
"""Name of the code location: Dagster keeps cursors and sensor states under it."""


@contextlib.contextmanager
def dagster_application(socket: Path, port: int, *, mlflow_port: int) -> Iterator[Application]:
    """Dagster's web application for the instance of DAGSTER_HOME, behind the guard.

    Args:
        socket: Unix socket of a running code server.
        port: The port that will be served.
        mlflow_port: Where MLflow is served.
    """
    import dagster as dg
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster_webserver.app import create_app_from_workspace_process_context
    from dagster_webserver.version import __version__

    with dg.DagsterInstance.get() as instance:
        instance.optimize_for_webserver(
            statement_timeout=15_000, pool_recycle=3600, max_overflow=20
        )
        with WorkspaceProcessContext(
            instance, code_location(socket), version=__version__
        ) as context:
            application = create_app_from_workspace_process_context(context)
            yield Guard(application, port, {MLFLOW_PATH: f"http://127.0.0.1:{mlflow_port}"})


def code_location(socket: Path) -> Any:
    """Where Dagster's processes find our definitions: on the one code server that they share."""
    from dagster._core.workspace.load_target import GrpcServerTarget

    return GrpcServerTarget(host="localhost", port=None, socket=str(socket), location_name=LOCATION)


def mlflow_application(home: Path, port: int, *, dagster_port: int) -> Application:
    """MLflow's web application on the workspace's own database, behind the guard.

    Args:
        home: The workspace.
        port: The port that will be served.
        dagster_port: Where Dagster is served.

    Only for a process of its own: MLflow reads its settings from the environment while it is
    imported.
    """

    (home / "mlartifacts").mkdir(parents=True, exist_ok=True)
    create_database(home / "mlflow.db")
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{home / 'mlflow.db'}",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(home / "mlartifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "true",
    }
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # MLflow 3.17 imports a module that Starlette has deprecated
        from mlflow.server.fastapi_app import app

    return Guard(FirstPage(app, home), port, {DAGSTER_PATH: f"http://127.0.0.1:{dagster_port}"})
