"""Each workspace's own Dagster instance: where its settings are written, how it is opened, and the
proof that the instance at hand belongs to the workspace at hand."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._core.instance import InstanceRef

from training.commit import write_bytes
from training.errors import WorkspaceError

SETTINGS = """\
nux: {enabled: false}
telemetry: {enabled: false}
run_launcher: {module: resources.run_launcher, class: FoundryRunLauncher}
run_coordinator:
  module: resources.run_coordinator
  class: FoundryRunCoordinator
  config: {dequeue_interval_seconds: 1}
concurrency:
  runs: {max_concurrent_runs: 4}
run_monitoring: # a dead run is reported as failed; cancelling waits for a checkpoint of 30 GB
  enabled: true
  start_timeout_seconds: 120
  cancel_timeout_seconds: 900
  poll_interval_seconds: 10
run_retries: {enabled: true, max_retries: 2, retry_on_asset_or_op_failure: false} # crashes only
retention:
  sensor: {purge_after_days: {skipped: 1, started: 1, success: 30, failure: 30}}
  schedule: {purge_after_days: {skipped: 1, started: 1, success: 30, failure: 30}}
"""
"""What every instance is told, in YAML; the same in all workspaces and in the repository's root."""

WORKSPACE_YAML = f"""\
# Written by `foundry init`. This folder is the workspace's DAGSTER_HOME; storage lies in it by default.
{SETTINGS}"""

ROOT_YAML = f"""\
# For a bare `dagster dev` in the repository: it serves ./workspace and shares its runs with `foundry --home workspace`.
# Held equal to resources/instance.py by tests/resources/test_instance.py.
storage: {{sqlite: {{base_dir: workspace/dagster}}}}
local_artifact_storage:
  module: dagster._core.storage.root
  class: LocalArtifactStorage
  config: {{base_dir: workspace/dagster}}
compute_logs:
  module: dagster._core.storage.local_compute_log_manager
  class: LocalComputeLogManager
  config: {{base_dir: workspace/dagster/storage}}
{SETTINGS}"""


_DAGSTERS_COORDINATOR = """\
  module: dagster.core.run_coordinator
  class: QueuedRunCoordinator
"""
_OUR_COORDINATOR = """\
  module: resources.run_coordinator
  class: FoundryRunCoordinator
"""


def dagster_home(home: Path) -> Path:
    """The DAGSTER_HOME of a workspace."""
    return home.resolve() / "dagster"


def write_instance(home: Path) -> None:
    """Write the workspace's `dagster/dagster.yaml`; storage keys are left out, so that it lies
    beside the file."""
    write_bytes(dagster_home(home) / "dagster.yaml", WORKSPACE_YAML.encode())


@contextlib.contextmanager
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """Open the workspace's instance; inside, DAGSTER_HOME and FOUNDRY_HOME of this process name the
    workspace.

    Raises:
        WorkspaceError: `dagster.yaml` is missing, or places storage outside the workspace.
    """
    folder = dagster_home(home)
    if not (folder / "dagster.yaml").is_file():
        raise WorkspaceError(
            f"{folder / 'dagster.yaml'} is missing; write it with `foundry init {home}`"
        )
    _upgrade(folder / "dagster.yaml")
    check_storage(InstanceRef.from_dir(str(folder)), home)
    names = {"DAGSTER_HOME": str(folder), "FOUNDRY_HOME": str(home.resolve())}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        with dg.DagsterInstance.get() as opened:
            yield opened
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _upgrade(path: Path) -> None:
    """Let the instance of a workspace from before 0.2 use our run coordinator; what people changed
    stays."""
    text = path.read_text("utf-8")
    if (upgraded := text.replace(_DAGSTERS_COORDINATOR, _OUR_COORDINATOR)) != text:
        with contextlib.suppress(OSError):  # a read-only workspace is served as it is
            write_bytes(path, upgraded.encode())


def check_instance(opened: dg.DagsterInstance, home: Path) -> None:
    """Refuse an instance that keeps its runs outside the workspace; one that keeps nothing mixes
    nothing.

    Raises:
        WorkspaceError: names where the instance keeps its runs and where the workspace is.
    """
    if not opened.is_ephemeral:
        check_storage(opened.get_ref(), home)


def check_storage(ref: InstanceRef, home: Path) -> None:
    """Compare the three places in which an instance writes with the workspace's `dagster/`."""
    folder = dagster_home(home)
    parts = {
        "storage": ref.storage_data,
        "local_artifact_storage": ref.local_artifact_storage_data,
        "compute_logs": ref.compute_logs_data,
    }
    for name, data in parts.items():
        base = data.config_dict.get("base_dir") if data else None
        if not isinstance(base, str) or not Path(base).resolve().is_relative_to(folder):
            raise WorkspaceError(
                f"Dagster's {name} lies in {base!r}, outside of workspace {home} ({folder}); start Dagster with "
                f"`foundry up --home {shlex.quote(str(home))}`, or set DAGSTER_HOME={folder} and FOUNDRY_HOME={home}"
            )
