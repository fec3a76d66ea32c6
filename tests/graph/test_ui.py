"""`foundry up` on the demo's finished workspace, looked at with a browser the way people do."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
from browser import chromium, needs_chromium
from graph_tools import foundry, shorten

from assets.registry import STAGES

pytestmark = needs_chromium

ASSETS = """{ assetNodes { assetKey { path } partitionStats { numMaterialized numPartitions numFailed }
    assetMaterializations(limit: 1) { runId }
    assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization { status } } } } } }"""
RUNS = "{ runsOrError(limit: 1000) { ... on Runs { results { runId } } } }"
LAUNCH = {
    "query": "mutation Launch($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) "
    "{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
    "variables": {
        "params": {
            "selector": {
                "repositoryLocationName": "foundry",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": ["source_listing"]}],
            },
            "mode": "default",
            "runConfigData": {},
        }
    },
}
CURVES = "return [...document.querySelectorAll('.js-plotly-plot path.js-line')].map(line => line.getTotalLength())"
"""Lengths of the lines in MLflow's charts, pixels."""
STALE = '{ assetNodes(assetKeys: [{path: ["selected_images"]}]) { assetKey { path } staleStatus } }'
PAGES_S = 60
SENSOR_S = 120
RUN_S = 180


class Up:
    """A running `foundry up` and a browser."""

    def __init__(self, home, page):
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
            for item in sockets:
                item.bind(("127.0.0.1", 0))
            ports = [item.getsockname()[1] for item in sockets]
        self.home, self.page = home, page
        self.dagster, self.mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("foundry"), "up", "--home", str(home),
             "--port", str(ports[0]), "--mlflow-port", str(ports[1])],
            env={name: value for name, value in os.environ.items() if name not in ("FOUNDRY_HOME", "DAGSTER_HOME")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said = []
        for line in self.process.stdout:
            self.said.append(line.strip())
            if "Ctrl-C" in line:
                return
        raise AssertionError("\n".join(self.said))

    def ask(self, query, **body):
        """Let a page of Dagster ask its server, as its own scripts do."""
        if not self.page.driver.current_url.startswith(f"{self.dagster}/"):
            self.page.open(self.dagster)
        answer = self.page.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            fetch('/graphql', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: arguments[0]})
                .then(r => r.text()).then(done, e => done(String(e)));
            """,
            json.dumps({"query": query, **body}),
        )
        assert '"errors"' not in answer, answer
        return json.loads(answer)["data"]

    def runs(self):
        """Ids of all runs."""
        return {run["runId"] for run in self.ask(RUNS)["runsOrError"]["results"]}

    def processes(self):
        """All processes that serve this workspace, by their environment."""
        marked = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"FOUNDRY_HOME={self.home}\0".encode() in path.read_bytes():
                    marked.add(int(path.parent.name))
        return marked


@pytest.fixture(scope="module")
def up(demo, tmp_path_factory):
    """`foundry up` on a copy of the demo's workspace."""
    home = tmp_path_factory.mktemp("ui") / "workspace"
    shutil.copytree(demo, home, symlinks=True)
    foundry("run", "--home", home)  # a copy's images have other inodes: they are listed again
    with chromium() as page:
        served = Up(home, page)
        try:
            yield served
        finally:
            for pid in {served.process.pid, *served.processes()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            served.process.communicate()


def last_part(up, asset):
    """The newest partition of an asset."""
    query = """query Keys($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) {
        ... on AssetNode { partitionKeys } } }"""
    return up.ask(query, variables={"key": {"path": [asset]}})["assetNodeOrError"]["partitionKeys"][
        -1
    ]


def open_part(up, asset):
    """Open the page that shows the newest partition of an asset."""
    up.page.open(f"{up.dagster}/assets/{asset}?view=partitions&partition={last_part(up, asset)}")
    up.page.wait_for_text("Metadata", "Latest materialization", timeout_s=PAGES_S)


def test_the_graph_shows_every_asset_as_materialized(up):
    groups = ",".join(
        f"global@global:{group}"
        for group in (
            "ingest",
            "annotate",
            "curate",
            "encode",
            "train",
            "evaluate",
            "settings",
            "models",
        )
    )
    up.page.resize(3600, 2400)  # Dagster leaves names out where they would be too small to read
    up.page.open(f"{up.dagster}/asset-groups?expanded={groups}")
    up.page.wait_for_text(*STAGES, timeout_s=PAGES_S)
    up.page.resize(1440, 900)
    assert not up.page.errors()
    nodes = {"/".join(node["assetKey"]["path"]): node for node in up.ask(ASSETS)["assetNodes"]}
    assert {name for name in nodes if "/" not in name} == STAGES.keys()
    for name, node in nodes.items():
        assert node["assetMaterializations"], f"{name} was never materialized"
        if (stats := node["partitionStats"]) is not None:
            assert stats["numMaterialized"] == stats["numPartitions"] > 0 == stats["numFailed"], (
                f"{name}: {stats}"
            )


def test_every_check_passed(up):
    up.page.open(f"{up.dagster}/assets/raw_images?view=checks")
    up.page.wait_for_text(
        "every_candidate_accounted_for", "mostly_usable", "Passed", timeout_s=PAGES_S
    )
    assert "Failed" not in up.page.text()
    nodes = {
        node["assetKey"]["path"][-1]: node["assetChecksOrError"]["checks"]
        for node in up.ask(ASSETS)["assetNodes"]
    }
    found = {
        f"{asset}.{check['name']}": (check["executionForLatestMaterialization"] or {}).get("status")
        for asset, checks in nodes.items()
        for check in checks
    }
    assert len(found) >= 20
    # A verdict may honestly be `worse`, which is a warning; every other rule must hold.
    found.pop("verdicts.nothing_got_worse")
    assert {name: status for name, status in found.items() if status != "SUCCEEDED"} == {}


def test_thumbnails_and_charts_are_visible(up):
    open_part(up, "raw_images")
    up.page.wait_for_text("thumbnails", "megapixels", timeout_s=PAGES_S)
    up.page.wait(lambda: kinds(up.page.images()) >= {"image/svg+xml"}, "the chart of sizes")
    up.page.click("[Show Markdown]")
    up.page.wait(lambda: "image/jpeg" in kinds(up.page.images(96)), "the thumbnails")


def kinds(addresses):
    """Media types of `data:` addresses."""
    return {
        address.removeprefix("data:").partition(";")[0]
        for address in addresses
        if address.startswith("data:")
    }


def test_a_link_leads_to_the_run_in_mlflow_with_its_curves_and_images(up):
    page = up.page
    open_part(up, "checkpoints")
    page.wait_for_text("MLflow run", timeout_s=PAGES_S)
    page.open(
        page.driver.execute_script(
            "return document.querySelector('a[href*=\"/runs/\"][href*=mlflow]').href"
        )
    )
    page.wait_for_text("Finished", "train/loss", "num_samples", "Verdict: demo@", timeout_s=PAGES_S)
    assert page.driver.current_url.startswith(f"{up.mlflow}/#/experiments/"), (
        page.driver.current_url
    )
    run = page.driver.current_url.partition("?")[0]
    page.open(f"{run}/model-metrics")
    page.wait_for_text("train", "val", "samples", timeout_s=PAGES_S)
    page.resize(1440, 6000)  # MLflow draws what is in view only
    page.wait(lambda: max(page.driver.execute_script(CURVES), default=0) > 100, "a curve")
    page.resize(1440, 900)
    page.open(f"{run}/artifacts/config.toml")
    page.wait_for_text("num_samples", timeout_s=PAGES_S)
    open_part(up, "verdicts")
    page.wait_for_text("MLflow: Images, with a slider", timeout_s=PAGES_S)
    page.open(
        page.driver.execute_script(
            "return document.querySelector('a[href*=foundry-pictures]').href"
        )
    )
    page.wait(
        lambda: any("get-artifact" in address for address in page.images(64)),
        "an image that the model drew",
    )


def test_a_foreign_page_cannot_start_a_run(up):
    page = up.page
    before = up.runs()
    graphql, body = f"{up.dagster}/graphql", json.dumps(LAUNCH)
    query = urlencode({"query": LAUNCH["query"], "variables": json.dumps(LAUNCH["variables"])})
    for foreign in ("data:text/html,<p>a page of somebody else</p>", f"{up.mlflow}/"):
        page.open(foreign)
        for answer in (
            page.fetch(f"{graphql}?{query}", mode="no-cors"),
            page.fetch(f"{graphql}?{query}", mode="no-cors", method="POST"),
            page.fetch(graphql, mode="no-cors", method="POST", body=body),
            page.fetch(
                graphql, method="POST", body=body, headers={"Content-Type": "application/json"}
            ),
        ):
            assert answer in ("opaque 0", "TypeError: Failed to fetch"), answer
    assert up.runs() == before
    started = up.ask(**LAUNCH)["launchPipelineExecution"]
    assert started["__typename"] == "LaunchRunSuccess", started
    assert up.runs() == before | {started["run"]["runId"]}


def launch(page):
    """Click until the page goes to the run: Dagster takes no click while it still checks the
    configuration."""
    for _ in range(5):
        if "/runs/" not in page.driver.current_url:
            page.click("Launch Run")
        with contextlib.suppress(AssertionError):
            page.wait(lambda: "/runs/" in page.driver.current_url, "the run's page", 10)
            return
    raise AssertionError(page.text())


def test_a_changed_setting_is_seen_and_one_click_brings_it_up_to_date(up):
    """The way of a person: foundry.toml, the asset's checks, the job's launch page, the checks
    again."""
    page, checks = up.page, f"{up.dagster}/assets/selected_images?view=checks&checkDetail=current"
    page.open(checks)
    page.wait_for_text("current", "Passed", timeout_s=PAGES_S)
    shorten(up.home / "foundry.toml", min_score="6")
    page.wait_for_text("[selection] min_score 5 → 6", timeout_s=SENSOR_S)
    assert {
        node["assetKey"]["path"][0]: node["staleStatus"] for node in up.ask(STALE)["assetNodes"]
    } == {"selected_images": "STALE"}
    page.open(f"{up.dagster}/locations/foundry/jobs/bring_up_to_date/playground")
    page.wait_for_text("select", "No errors", "Launch Run", timeout_s=PAGES_S)
    launch(page)
    page.open(checks)
    page.wait(
        lambda: "min_score" not in page.text() and "Passed" in page.text(),
        "the check turned back",
        RUN_S,
    )
    assert {node["staleStatus"] for node in up.ask(STALE)["assetNodes"]} == {"FRESH"}


def test_ctrl_c_leaves_nothing_running(up):
    assert len(up.processes()) >= 4
    began = time.monotonic()
    os.kill(up.process.pid, signal.SIGINT)
    said, _ = up.process.communicate(timeout=60)
    assert (up.process.returncode, said) == (0, "")
    assert time.monotonic() - began < 30
    assert up.processes() == set()
