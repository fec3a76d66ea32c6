"""Colours of runs: MLflow draws all curves of a run in the colour that its tag names, and else in
one by its id, which two runs may share.
"""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "mlflow.runColor"
COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f",
)  # fmt: skip
"""Ten that a person tells apart, as many as runs that MLflow shows at first. Source: Tableau's
palette of ten."""


def free(client: "MlflowClient", experiment_id: str) -> str:
    """The colour that the fewest runs of an experiment have, the first of equals."""
    runs = client.search_runs([experiment_id], max_results=1_000)
    used = Counter(run.data.tags.get(TAG) for run in runs)
    return min(COLORS, key=lambda color: used[color])
