"""`foundry up`, driven as a process: two workspaces served side by side, attacked, interrupted and
killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
import httpx
import pytest
from dagster._core.storage.tags import GRPC_INFO_TAG
from serving import LAUNCH, Up, free_ports, start_up, wait_until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import jobs
from jobs.serve import serve
from resources.instance import instance, write_instance
from training.errors import ConfigError, LockedError

OURS_TOO = f"__path__.append({str(Path(jobs.__file__).parent)!r})\n"
"""Content of a package `jobs` before ours on the path, in which ours is found too."""
TOY = """
import time
import dagster as dg

@dg.asset
def quick(): pass

@dg.asset
def slow():
    while True:
        time.sleep(0.05)

defs = dg.Definitions(
    assets=[quick, slow],
    jobs=[dg.define_asset_job(f"{name}_job", selection=name) for name in ("quick", "slow")],
    executor=dg.in_process_executor,
)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """A folder with a small `jobs.definitions`, which PYTHONPATH puts before ours."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").write_text(OURS_TOO)
    (folder / "jobs" / "definitions.py").write_text(TOY)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory, code) -> Iterator[tuple[Up, Up]]:
    """Two workspaces, served at once."""
    homes = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for home in homes:
        write_instance(home)
    ups = [start_up(home, code) for home in homes]
    try:
        for up in ups:
            lines = [up.process.stdout.readline() for _ in range(3)]
            assert [line.strip() for line in lines] == [
                f"Dagster {up.dagster}/asset-groups",
                f"MLflow  {up.mlflow}/",
                "Ctrl-C stops both.",
            ]
        yield ups[0], ups[1]
    finally:
        for up in ups:
            for pid in {up.process.pid, *up.processes()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            up.process.communicate()


def test_pages_load_and_a_run_starts_from_our_own_page(both):
    up = both[0]
    for page in (up.dagster, up.mlflow):
        answer = httpx.get(page, headers={"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"})
        assert (answer.status_code, "<html" in answer.text) == (200, True)
    with connect(
        f"{up.dagster.replace('http', 'ws')}/graphql",
        subprotocols=["graphql-ws"],
        origin=up.dagster,
    ) as ours:
        ours.send(json.dumps({"type": "connection_init"}))
        assert json.loads(ours.recv(timeout=20)) == {"type": "connection_ack"}
    up.wait_for(up.launch("quick_job"), dg.DagsterRunStatus.SUCCESS)


EVIL = {"Origin": "http://evil.test", "Sec-Fetch-Site": "cross-site"}


def test_a_foreign_page_starts_no_run(both):
    up = both[0]
    before = up.runs()
    body: dict[str, Any] = {"query": LAUNCH, "variables": {"job": "quick_job"}}
    query = f"{up.dagster}/graphql?query={quote(LAUNCH)}&variables={quote(json.dumps(body['variables']))}"
    text = {"content": json.dumps(body), "headers": {"Content-Type": "text/plain"}}
    attempts = [
        httpx.post(f"{up.dagster}/graphql", json=body, headers=EVIL),
        httpx.post(f"{up.dagster}/graphql", json=body, headers={"Origin": "null"}),
        httpx.post(f"{up.dagster}/graphql", json=body, headers={"Origin": up.mlflow}),
        httpx.post(f"{up.dagster}/graphql", json=body, headers={"Host": "evil.test:3000"}),
        httpx.get(query),
        httpx.get(query, headers={"Sec-Fetch-Site": "cross-site"}),
        httpx.post(query),
        httpx.post(f"{up.dagster}/graphql", **text),
        httpx.post(f"{up.dagster}/report_asset_materialization/quick", headers=EVIL),
        httpx.post(
            f"{up.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "evil"}, headers=EVIL
        ),
        httpx.get(f"{up.mlflow}/", headers={"Host": f"evil.test:{up.mlflow.rpartition(':')[2]}"}),
    ]
    assert [answer.status_code for answer in attempts] == [
        403,
        403,
        403,
        403,
        405,
        403,
        405,
        405,
        403,
        403,
        403,
    ]
    with pytest.raises(InvalidStatus):
        connect(
            f"{up.dagster.replace('http', 'ws')}/graphql",
            subprotocols=["graphql-ws"],
            origin="http://evil.test",
        )
    assert up.runs() == before
    with instance(up.home) as opened:
        assert len(opened.fetch_materializations(dg.AssetKey("quick"), limit=10).records) == len(
            before
        )


def test_two_workspaces_share_nothing(both):
    one, two = both
    run_id = one.launch("quick_job")
    one.wait_for(run_id, dg.DagsterRunStatus.SUCCESS)
    assert run_id not in two.runs()
    created = httpx.post(
        f"{one.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "only-in-one"}
    ).json()
    for up, expected in ((one, 200), (two, 404)):
        found = httpx.get(
            f"{up.mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=only-in-one"
        )
        assert found.status_code == expected
        names = ["dagster", "locks", "mlartifacts", "mlflow.db", "workspace.json"]
        assert sorted(path.name for path in up.home.iterdir()) == names
    run = {"experiment_id": created["experiment_id"], "start_time": 0}
    made = httpx.post(f"{one.mlflow}/api/2.0/mlflow/runs/create", json=run).json()["run"]["info"]
    path = f"{made['artifact_uri'].removeprefix('mlflow-artifacts:/')}/a.txt"
    httpx.put(
        f"{one.mlflow}/api/2.0/mlflow-artifacts/artifacts/{path}", content=b"hello"
    ).raise_for_status()
    assert (one.home / "mlartifacts" / path).read_bytes() == b"hello"


def test_a_second_up_is_refused_and_names_the_first(both):
    with pytest.raises(
        LockedError, match=rf"`foundry up` on .*one.* is held by pid {both[0].process.pid} "
    ):
        serve(both[0].home)


def test_a_port_in_use_is_named_with_what_to_do(tmp_path):
    write_instance(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        free = free_ports(1)[0]
        with pytest.raises(
            ConfigError, match=rf"port {taken} for Dagster .*`foundry up --port PORT`"
        ):
            serve(tmp_path, dagster_port=taken, mlflow_port=free)
        with pytest.raises(
            ConfigError, match=rf"port {taken} for MLflow .*`foundry up --mlflow-port PORT`"
        ):
            serve(tmp_path, dagster_port=free, mlflow_port=taken)
    with pytest.raises(ConfigError, match="port 70000 for Dagster"):
        serve(tmp_path, dagster_port=70000, mlflow_port=free)


def test_a_child_that_dies_ends_all(tmp_path):
    home = tmp_path / "home"
    write_instance(home)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text(OURS_TOO)
    (tmp_path / "jobs" / "definitions.py").write_text("raise RuntimeError('broken definitions')")
    up = start_up(home, tmp_path)
    output, _ = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert "broken definitions" in output
    assert output.startswith(
        f"code server ended by itself (status 1), so all is stopped; {home}/dagster/code_server.log"
    )
    assert up.processes() == set()


def test_kill_9_of_up_takes_children_and_runs_along(both):
    up = both[1]
    run_id = up.launch("slow_job")
    up.wait_for(run_id, dg.DagsterRunStatus.STARTED)
    with instance(up.home) as opened:
        run = opened.get_run_by_id(run_id)
        assert opened.run_launcher.check_run_worker_health(run).status.name == "RUNNING"
        assert len(up.processes()) >= 5
        sockets = Path(json.loads(run.tags[GRPC_INFO_TAG])["socket"]).parent
        assert sockets.is_dir()
        os.kill(up.process.pid, signal.SIGKILL)
        wait_until(lambda: not up.processes(), 20)
        health = opened.run_launcher.check_run_worker_health(run)
        assert (health.status.name, health.msg) == ("NOT_FOUND", "its code server has ended")
        assert not sockets.exists()


def test_ctrl_c_leaves_nothing_but_the_trainer(both):
    up = both[0]
    (up.home / "runs" / "demo").mkdir(parents=True)
    trainer = subprocess.Popen(
        ["flock", str(up.home / "runs" / "demo" / "trainer.lock"), "sleep", "60"],
        env=os.environ | {"FOUNDRY_HOME": str(up.home)},
        start_new_session=True,
    )
    (up.home / "runs" / "ended").mkdir()
    (up.home / "runs" / "ended" / "trainer.lock").touch()
    run_id = up.launch("slow_job")
    up.wait_for(run_id, dg.DagsterRunStatus.STARTED)
    assert len(up.processes()) >= 5
    os.kill(up.process.pid, signal.SIGINT)
    output, _ = up.process.communicate(timeout=30)
    assert up.process.returncode == 0
    assert output.splitlines() == [
        f"Training run demo goes on; follow it with `foundry train --home {up.home} --run demo`"
    ]
    left = up.processes()
    assert trainer.pid in left
    assert {os.getpgid(pid) for pid in left} == {trainer.pid}
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    with instance(up.home) as opened:
        run = opened.get_run_by_id(run_id)
        if (
            run.status is not dg.DagsterRunStatus.FAILURE
        ):  # killed on a busy machine before it said so
            health = opened.run_launcher.check_run_worker_health(run)
            assert (health.status.name, health.msg) == ("NOT_FOUND", "its code server has ended")
    assert (up.home / "locks" / "up.lock").read_text() == ""
