"""MLflow's one page, as `foundry up` serves it: open on *Model training* and the workspace's runs,
without its tour, its assistant and its telemetry. What a person has chosen in the browser stays as
chosen.

MLflow (3.17) keeps such choices in the browser's local storage, under names that it does not
document: another version that has other names shows its own first page, and nothing else is lost.
"""

import json
from pathlib import Path
from typing import Any

from resources.guard import Application, Receive, Scope, Send
from resources.mlflow import experiment, views
from resources.mlflow.tracking import Tracking, workspace_tracking

ALWAYS = {
    "mlflow.settings.telemetry.enabled_v1": False,
    "mlflow.telemetry.info.alert.dismissed_v1": True,
}
"""What the page is always told: `foundry up` sends no usage data, whatever MLflow's settings
say."""
AT_FIRST = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
    "mlflow.detectIssues.guidanceShown_v1": True,
}
"""What it is told where a person has not chosen yet."""
_RUNS_PAGE = 'MLflowLocalStorage-1.1-ExperimentPage-["{}"]-ReactComponentState'
"""Name of what MLflow remembers of an experiment's runs: columns, order, charts."""
_SCRIPT = """<script>(() => {
  try {
    for (const [name, value] of Object.entries(ALWAYS)) localStorage.setItem(name, value);
    for (const [name, value] of Object.entries(AT_FIRST))
      if (localStorage.getItem(name) === null) localStorage.setItem(name, value);
  } catch {}
  if (['', '#', '#/'].includes(location.hash)) history.replaceState(null, '', FIRST_PAGE);
})();</script><style>[data-assistant-ui] { display: none !important }</style>"""
"""The guard refuses what MLflow's assistant asks for, so the page does not offer it."""


class FirstPage:
    """MLflow's application, whose page is told a few things before it starts."""

    def __init__(self, application: Application, home: Path):
        """Serve `application` on the MLflow of the workspace `home`."""
        self._application = application
        self._tracking = workspace_tracking(home)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        page = None
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in ("", "/"):
            page = told(_page(), self._tracking)
        if page is None:
            await self._application(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/html; charset=utf-8"), (b"cache-control", b"no-store"),
            (b"x-frame-options", b"SAMEORIGIN"), (b"x-content-type-options", b"nosniff"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page.encode()})


def told(page: str, tracking: Tracking) -> str | None:
    """MLflow's page with a script at its head that says what `ALWAYS`, `AT_FIRST` and the
    experiment say.

    Args:
        page: The page as MLflow has it.
        tracking: The workspace's.

    Returns:
        None where the page is none that we know.
    """
    if "<head>" not in page:
        return None
    at_first: dict[str, Any] = dict(AT_FIRST)
    first_page = f"#/experiments?{views.TRAINING_PAGES}"
    try:
        found = tracking.on_disk()
        if found is not None and not found.deleted:
            first_page = f"#/experiments/{found.experiment_id}/runs?{views.TRAINING_PAGES}"
            view = experiment.tag_on_disk(tracking.uri, found.experiment_id, views.RUNS_VIEW)
            if state := views.unpacked(view):
                at_first[_RUNS_PAGE.format(found.experiment_id)] = state
    except LookupError:
        pass  # the database is locked; the list of experiments will do
    script = _SCRIPT
    for name, value in {
        "ALWAYS": _stored(ALWAYS),
        "AT_FIRST": _stored(at_first),
        "FIRST_PAGE": first_page,
    }.items():
        # What is in a script must not end it.
        script = script.replace(name, json.dumps(value).replace("<", "\\u003c"), 1)
    return page.replace("<head>", f"<head>{script}", 1)


def _stored(values: dict[str, Any]) -> dict[str, str]:
    """Values as local storage holds them: as JSON."""
    return {name: json.dumps(value) for name, value in values.items()}


def _page() -> str:
    """MLflow's page; empty where it is not where MLflow 3.17 has it."""
    import mlflow.server

    try:
        return (
            Path(mlflow.server.__file__).with_name("js").joinpath("build", "index.html").read_text()
        )
    except OSError:
        return ""
