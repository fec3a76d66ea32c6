"""What two runs are compared by: the options in which the workspace's runs differ, as parameters of
all of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.mlflow import calls
from training import toml
from training.errors import ConfigError
from training.runs import run_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

_HEADLINES = frozenset({"num_samples", "optimizer.learning_rate"})
"""Every run has these anyway, under names of their own."""
_MAX_TEXT = 500


def differing(folder: Path) -> dict[str, dict[str, str]]:
    """Run -> the options, as `table.key`, that are not the same in all runs of a workspace.

    Args:
        folder: Where the runs' folders are.
    """
    configs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*/{run_folder.CONFIG}")):
        try:
            configs[path.parent.name] = toml.flatten(toml.dump(run_folder.read_config(path.parent)))
        except ConfigError:
            continue  # it cannot be sent either, and says why there
    names = {name for config in configs.values() for name in config} - _HEADLINES
    different = sorted(
        name for name in names if len({str(config.get(name)) for config in configs.values()}) > 1
    )
    return {
        run: {name: str(config.get(name))[:_MAX_TEXT] for name in different}
        for run, config in configs.items()
    }


def log_differing(client: "MlflowClient", experiment_id: str, run_tag: str, folder: Path) -> None:
    """Give all runs that MLflow has the parameters of `differing` that they lack; what was sent
    never changes.

    Args:
        client: A connected client.
        experiment_id: MLflow's id of the experiment.
        run_tag: Tag that names a run.
        folder: Where the runs' folders are.
    """
    options = differing(folder)
    for run in client.search_runs([experiment_id], f"tags.`{run_tag}` != ''", max_results=1_000):
        wanted = options.get(run.data.tags[run_tag], {})
        if params := {name: value for name, value in wanted.items() if name not in run.data.params}:
            calls.log_batch(client, run.info.run_id, params=params)
