"""MLflow's page as it is served: what it is told before it starts."""

import asyncio
import json
import re
import shutil

import pytest

from resources.mlflow import page as mlflow_page
from resources.mlflow.page import FirstPage, told
from resources.mlflow.tracking import Tracking, workspace_tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
PAGE = "<!doctype html><html><head><title>MLflow</title></head><body></body></html>"


@pytest.fixture
def home(tmp_path, empty_database):
    (tmp_path / "space").mkdir()
    shutil.copy(empty_database, tmp_path / "space" / "mlflow.db")
    return tmp_path / "space"


def script(page):
    """What is told always, at first, and the first page."""
    (text,) = re.findall(r"<head><script>(.*?)</script>", page, re.DOTALL)
    values = re.findall(r"Object\.entries\((\{.*?\})\)\) ?(?:localStorage|\n)", text)
    always, at_first = (json.loads(value) for value in values)
    return always, at_first, json.loads(re.search(r"replaceState\(null, '', (\".*?\")\)", text)[1])


def test_the_root_opens_on_the_runs_of_the_experiment_with_our_columns(home):
    tracking = workspace_tracking(home)
    tracking.views()
    always, at_first, first_page = script(told(PAGE, tracking))
    assert first_page == "#/experiments/1/runs?workflowType=machine_learning"
    assert json.loads(at_first["mlflow.workflowType_v1"]) == "machine_learning"
    assert always["mlflow.settings.telemetry.enabled_v1"] == "false"
    assert always["mlflow.telemetry.info.alert.dismissed_v1"] == "true"
    state = json.loads(at_first['MLflowLocalStorage-1.1-ExperimentPage-["1"]-ReactComponentState'])
    assert len(state["selectedColumns"]) == 6
    assert "tags.`verdict`" in state["selectedColumns"]


def test_without_an_experiment_it_opens_on_the_list_of_them(home, tmp_path):
    lists = "#/experiments?workflowType=machine_learning"
    for uri in (
        f"sqlite:///{tmp_path / 'none.db'}",
        f"sqlite:///{home / 'mlflow.db'}",
        "http://127.0.0.1:1",
    ):
        assert script(told(PAGE, Tracking(uri=uri, experiment="other")))[2] == lists
    assert told("another page", workspace_tracking(home)) is None


def test_a_deleted_experiment_is_not_opened(home):
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{home / 'mlflow.db'}").delete_experiment("1")
    assert (
        script(told(PAGE, workspace_tracking(home)))[2]
        == "#/experiments?workflowType=machine_learning"
    )


def test_only_the_page_itself_is_told(home, monkeypatch):
    async def application(scope, receive, send):
        await send({"path": scope["path"], "method": scope["method"]})

    def asked(path, method="GET", kind="http"):
        sent = []

        async def send(message):
            sent.append(message)

        asyncio.run(served({"type": kind, "method": method, "path": path}, None, send))
        return sent

    served = FirstPage(application, home)
    monkeypatch.setattr(mlflow_page, "_page", lambda: PAGE)
    start, body = asked("/")
    assert (start["status"], dict(start["headers"])[b"cache-control"]) == (200, b"no-store")
    assert b"mlflow.workflowType_v1" in body["body"]
    for path, method in (("/", "POST"), ("/version", "GET"), ("/static-files/x", "GET")):
        assert asked(path, method) == [{"path": path, "method": method}]
    monkeypatch.setattr(mlflow_page, "_page", str)
    assert asked("/") == [{"path": "/", "method": "GET"}]


def test_mlflow_has_a_page_of_the_form_that_we_know():
    assert "<head>" in mlflow_page._page()


def test_no_name_can_end_the_script(home):
    tracking = Tracking(uri=f"sqlite:///{home / 'mlflow.db'}", experiment="space")
    assert told(PAGE, tracking).count("</script>") == 1
