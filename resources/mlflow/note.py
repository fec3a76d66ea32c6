"""The description at the head of a run's page: links to its report and to Dagster, then the verdict
in words."""

from collections.abc import Mapping

from resources import guard

NOTE_TAG = "mlflow.note.content"
DAGSTER_TAG, REPORT_TAG = "mlflow.foundry.dagster_run", "mlflow.foundry.report"
"""What the links are made of; MLflow's pages leave out tags of its own."""
_LINKS, _VERDICT = "Links: ", "Verdict: "
"""How our paragraphs begin; a description that begins otherwise is a person's."""


def note(
    tags: Mapping[str, str], said: str | None, experiment_id: str, run_id: str, *, dagster: bool
) -> dict[str, str]:
    """The description as a tag; none where a person has written one, or where there is nothing to
    say.

    Args:
        tags: The run's tags as they will be.
        said: The verdict in words; None keeps what stands there.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
        dagster: Whether Dagster's pages are found from MLflow's.
    """
    before = tags.get(NOTE_TAG, "")
    if before and not before.startswith((_LINKS, _VERDICT)):
        return {}
    links = []
    if path := tags.get(REPORT_TAG):
        links.append(f"[report](#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path})")
    if dagster and (run := tags.get(DAGSTER_TAG)):
        links.append(f"[Dagster run {run[:8]}]({guard.DAGSTER_PATH}/runs/{run})")
    verdict = (
        f"{_VERDICT}{said}"
        if said is not None
        else before[before.find(_VERDICT) :]
        if _VERDICT in before
        else ""
    )
    paragraphs = [f"{_LINKS}{', '.join(links)}" if links else "", verdict]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return {NOTE_TAG: text} if text and text != before else {}
