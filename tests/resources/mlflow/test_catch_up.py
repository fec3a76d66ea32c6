"""Whatever MLflow was away for arrives with the next call, once; and whoever calls is neither
failed nor kept."""

import json
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
from mlflow_world import prepare_run
from PIL import Image

from resources.mlflow import calls as mlflow_calls
from resources.mlflow import catch_up as tracking_catch_up
from resources.mlflow.catch_up import catch_up, owes
from resources.mlflow.tracking import Tracking, workspace_tracking
from resources.workspace.store import Store
from training import commit, manifests
from training.errors import TrackingError
from training.evaluation import champion
from training.runs import run_folder
from training.runs.event_log import EventLog
from training.tables.schemas import TABLES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
LOG = logging.getLogger("catch up")
BASE, OLD, NEW = "base.bbbbbbbb@0", "demo@40", "demo@120"
"""By the alphabet the newer checkpoint comes first."""
TAGS = ("verdict.aesthetic", "mlflow.note.content")
EVERYTHING = [
    "the experiment", "the log of run demo", f"scores of {BASE}", f"scores of {OLD}", f"scores of {NEW}",
    "the base's images beside demo", "verdicts on demo",
    "the report of demo", "the champion",
]  # fmt: skip


@pytest.fixture(scope="session")
def templates(tmp_path_factory, empty_database):
    """A workspace in which a run was trained, judged and released while MLflow was away; and the
    same, caught up."""
    home = tmp_path_factory.mktemp("owing") / "space"
    log_run(prepare_run(home, "demo"), "finished")
    (home / "foundry.toml").write_text("format = 1\n")
    shutil.copy(empty_database, home / "mlflow.db")
    for number, checkpoint in enumerate((BASE, OLD, NEW)):
        evaluate(home, checkpoint, 5.0 + number)
    judge(home, OLD, "unclear")
    judge(home, NEW, "better")
    for path, content in {
        "release/demo/report.html": b"<html>",
        "sample_images/demo_contact_sheet.jpg": b"jpg",
    }.items():
        commit.write_bytes(home / path, content)
    put(home, "release", "demo", TABLES["release"].empty(), {"numbers": {"checkpoint": NEW}})
    promote(home, NEW, "it is better")
    caught_up = shutil.copytree(home, tmp_path_factory.mktemp("sent") / "space")
    assert catch_up(Store(caught_up), LOG)
    return home, caught_up


@pytest.fixture
def store(tmp_path, templates):
    """The workspace whose MLflow lacks everything."""
    return Store(shutil.copytree(templates[0], tmp_path / "space"))


@pytest.fixture
def sent(tmp_path, templates):
    """The workspace whose MLflow has everything."""
    home = shutil.copytree(templates[1], tmp_path / "sent" / "space")
    known = json.loads((home / "workspace.json").read_text())
    commit.write_json(
        home / "workspace.json", known | {"home": str(home)}
    )  # as if it had been moved
    return Store(home)


def log_run(folder, *endings):
    with EventLog(folder / run_folder.EVENTS) as log:
        log.write("started", samples_seen=0, run="demo")
        for seen in (40, 80, 120):
            log.write("step", samples_seen=seen, step=seen // 40, loss=1 / seen)
            if seen != 80:
                log.write("checkpoint", samples_seen=seen, checkpoint=f"demo@{seen}", digest="d" * 64, seconds=0.1,
                          folder=f"checkpoints/samples_{seen:09d}")  # fmt: skip
        for ending in endings:
            log.write(ending, samples_seen=120)


def put(home, table, part, frame, report=None, inputs=None, dagster_run=""):
    """Commit a part as a stage does."""
    frame, folder = TABLES[table].conform(frame), home / "tables" / table
    manifest = manifests.Manifest(
        table=table, part=part, version=1, files=(manifests.write_parquet(folder, part, frame),), rows=frame.height,
        digest=commit.logical_digest(commit.column_digests(frame), frame.height), report=report or {},
        inputs=inputs or {}, provenance={"dagster_run": dagster_run},
    )  # fmt: skip
    manifests.commit_manifest(folder / f"{part}.json", manifest)


def evaluate(home, checkpoint, score):
    """Commit two images of a checkpoint and their scores."""
    samples, metrics = [], []
    for prompt in ("p0", "p1"):
        path = home / "sample_images" / checkpoint / f"{prompt}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), int(score * 20), np.uint8)).save(path)
        samples.append({"prompt_id": prompt, "text": "t", "negative": "", "group": "all", "height": 8, "width": 8,
                        "seed": 1, "file": path.name, "sha256": commit.sha256_file(path)})  # fmt: skip
        metrics.append({"prompt_id": prompt, "group": "all", "metric": "aesthetic", "value": score})
    metrics.append({"prompt_id": None, "group": None, "metric": "mean_LAIONScore", "value": score})
    put(
        home,
        "sample_images",
        checkpoint,
        pl.DataFrame(samples, schema=TABLES["sample_images"].schema),
    )
    put(
        home,
        "eval_metrics",
        checkpoint,
        pl.DataFrame(metrics, schema=TABLES["eval_metrics"].schema),
    )


def judge(home, checkpoint, word):
    row = {
        "metric": "aesthetic", "group": "all", "a": BASE, "b": checkpoint, "num_prompts": 50, "mean_a": 0.2,
        "mean_b": 0.3, "difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "p_holm": 0.02, "margin": 0.003,
        "win_rate": 0.7, "verdict": word, "num_needed": None,
    }  # fmt: skip
    put(
        home,
        "verdicts",
        f"base~{checkpoint}",
        pl.DataFrame([row], schema=TABLES["verdicts"].schema),
    )


def promote(home, checkpoint, sentence):
    now = champion.Champion(
        checkpoint=checkpoint, digest="d", verdict=f"{BASE}~{checkpoint}", sentence=sentence
    )
    champion.write(home, now)


def client_of(store):
    from mlflow import MlflowClient

    uri = f"sqlite:///{store.home / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def arrived(store):
    """What MLflow holds, read past the code that sent it, in a form that does not say when it was
    sent."""
    with sqlite3.connect(store.home / "mlflow.db") as database:
        metrics = (
            "select t.value, m.key, m.step, m.value from metrics m join tags t using (run_uuid)"
        )
        found = sorted(database.execute(f"{metrics} where t.key = 'foundry.run'").fetchall())
        aliases = database.execute("select alias, version from registered_model_aliases").fetchall()
        versions = sorted(
            database.execute("select version, description from model_versions").fetchall()
        )
    files = sorted(
        path.name.partition("+timestamp")[0]
        for path in (store.home / "mlartifacts").rglob("*")
        if path.is_file()
    )
    (run,) = client_of(store).search_runs(["1"], "tags.`foundry.run` = 'demo'")
    return {
        "metrics": found, "files": files, "champion": (aliases, versions), "status": run.info.status,
        "tags": {name: run.data.tags.get(name, "").replace(run.info.run_id, "ID") for name in TAGS},
        "models": sorted(model.name for model in client_of(store).search_logged_models(["1"])),
    }  # fmt: skip


def refuse(*arguments):
    raise ConnectionError("refused")


def test_all_that_is_owed_arrives_once_and_then_mlflow_is_left_alone(store, monkeypatch):
    assert owes(store) == EVERYTHING
    assert catch_up(store, LOG)
    found = arrived(store)
    assert [row for row in found["metrics"] if row[1] == "eval/aesthetic_mean"] == [
        ("base.bbbbbbbb", "eval/aesthetic_mean", 0, 5.0), ("demo", "eval/aesthetic_mean", 40, 6.0),
        ("demo", "eval/aesthetic_mean", 120, 7.0),
    ]  # fmt: skip
    assert [row[2:] for row in found["metrics"] if row[1] == "train/loss"] == [
        (n, 1 / n) for n in (40, 80, 120)
    ]
    assert found["tags"]["verdict.aesthetic"] == "better"
    assert f"\n\nVerdict: {NEW} against {BASE}" in found["tags"]["mlflow.note.content"]
    assert found["champion"] == ([("champion", 1)], [(1, "it is better")])
    assert (found["status"], found["models"]) == ("FINISHED", ["base-bbbbbbbb@0", NEW, OLD])
    assert {"report.html", "contact_sheet.jpg", "config.toml"} < set(found["files"])
    assert sum("samples~p" in name for name in found["files"]) == 4 * 2 * 2
    # The sliders of the run's page begin with what its base model draws.
    (run,) = client_of(store).search_runs(["1"], "tags.`foundry.run` = 'demo'")
    root = store.home / "mlartifacts" / run.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    (first,) = root.glob("images/samples~p0+step+0+*.png")
    assert first.read_bytes() == (store.home / "sample_images" / BASE / "p0.png").read_bytes()
    monkeypatch.setattr(mlflow_calls, "connect", refuse)
    assert owes(store) == []
    assert catch_up(store, LOG)


def test_a_base_that_drew_other_prompts_is_not_shown_as_the_beginning_of_a_run(store):
    put(
        store.home,
        "sample_images",
        BASE,
        store.read("sample_images", parts=[BASE]),
        inputs={"prompts": "others"},
    )
    assert owes(Store(store.home)) == [
        name for name in EVERYTHING if not name.startswith("the base's images")
    ]


def test_a_run_whose_inputs_cannot_be_read_holds_up_nothing_else(store, caplog):
    (store.home / "runs" / "demo" / run_folder.INPUTS).write_text("{")
    assert not catch_up(store, LOG)
    assert owes(store) == ["the log of run demo"]
    assert f"{run_folder.INPUTS} is no JSON" in caplog.text


def test_without_its_note_all_is_sent_again_which_changes_nothing(sent):
    assert owes(sent) == []  # it is a copy: a workspace that is moved takes its MLflow along
    found = arrived(sent)
    (sent.home / "tracking.json").write_text("damaged")
    assert owes(sent) == EVERYTHING
    assert catch_up(sent, LOG)
    assert arrived(sent) == found
    # A torn last line, which a kill leaves, is not waited for.
    with (sent.home / "runs" / "demo" / run_folder.EVENTS).open("a") as log:
        log.write('{"torn')
    assert owes(sent) == EVERYTHING[1:2]
    assert catch_up(sent, LOG)
    assert owes(sent) == []


def test_where_nothing_is_owed_mlflow_is_not_imported(tmp_path):
    (tmp_path / "foundry.toml").write_text("format = 1\n")
    code = (
        "import sys, logging; from pathlib import Path; from resources.workspace.store import Store\n"
        "from resources.mlflow.catch_up import catch_up\n"
        f"assert catch_up(Store(Path({str(tmp_path)!r})), logging.getLogger())\n"
        "sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert not (tmp_path / "mlflow.db").exists()


def test_a_champion_that_was_promoted_while_mlflow_was_away_gets_its_alias_with_the_next_call(
    sent, monkeypatch, caplog
):
    promote(sent.home, OLD, "it is best")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_calls, "connect", refuse)
        assert not catch_up(sent, LOG)
    (warning,) = caplog.messages
    assert warning.startswith("MLflow is pending the champion: MLflow at sqlite:///")
    assert warning.endswith("refused; it is sent with the next call")
    assert arrived(sent)["champion"][0] == [("champion", 1)]
    assert owes(sent) == ["the champion"]
    assert catch_up(sent, LOG)
    assert arrived(sent)["champion"] == (
        [("champion", 2)],
        [(1, "it is better"), (2, "it is best")],
    )


def test_what_is_new_is_owed_and_nothing_else(sent):
    evaluate(sent.home, NEW, 8.0)
    judge(sent.home, OLD, "worse")
    assert owes(sent) == [f"scores of {NEW}", "verdicts on demo"]
    assert catch_up(sent, LOG)
    found = arrived(sent)
    assert ("demo", "eval/aesthetic_mean", 120, 8.0) in found["metrics"]
    # The run says what was said of its newest checkpoint; each checkpoint what was said of it.
    assert found["tags"]["verdict.aesthetic"] == "better"
    said = {
        model.name: model.tags.get("verdict.aesthetic")
        for model in client_of(sent).search_logged_models(["1"])
    }
    assert said == {"base-bbbbbbbb@0": None, OLD: "worse", NEW: "better"}


def test_a_deleted_database_gets_everything_again(sent, empty_database):
    before = arrived(sent)
    shutil.rmtree(sent.home / "mlartifacts")
    shutil.copy(empty_database, sent.home / "mlflow.db")
    with sqlite3.connect(sent.home / "mlflow.db") as database:  # as one that was made later
        database.execute("update experiments set creation_time = creation_time + 1")
    assert owes(sent) == EVERYTHING
    assert catch_up(sent, LOG)
    assert arrived(sent) == before
    (sent.home / "mlflow.db").unlink()
    assert owes(sent) == EVERYTHING


def test_another_address_is_owed_everything_and_an_absent_server_costs_one_attempt(sent, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (sent.home / "foundry.toml").write_text(
        f'format = 1\n[tracking]\nuri = "http://me:secret@127.0.0.1:{port}"\n'
    )
    away = Store(sent.home)
    began = time.monotonic()
    assert not catch_up(away, LOG)
    assert time.monotonic() - began < 10
    (warning,) = caplog.messages
    assert warning.startswith(
        f"MLflow is pending {', '.join(EVERYTHING[:4])} and 5 more: MLflow at http://***@127.0.0.1"
    )
    assert owes(away) == EVERYTHING


def test_what_cannot_be_sent_holds_up_nothing_else(store, caplog):
    (damaged,) = (store.home / "tables" / "eval_metrics").glob(f"{OLD}-*.parquet")
    content = damaged.read_bytes()
    damaged.write_bytes(b"rotten")
    assert not catch_up(store, LOG)
    (warning,) = caplog.messages
    assert warning.startswith(
        f"MLflow is pending scores of {OLD}: scores of {OLD} cannot be sent: {damaged} has 6 bytes"
    )
    assert owes(store) == [f"scores of {OLD}"]
    damaged.write_bytes(content)
    assert catch_up(store, LOG)
    commit.write_bytes(store.home / champion.FILE, b"rotten")
    assert not catch_up(store, LOG)
    assert caplog.messages[-1].startswith("MLflow: what MLflow lacks cannot be told: ")
    assert "champion.json is damaged" in caplog.messages[-1]


def test_a_server_that_hangs_is_waited_for_once(store, monkeypatch, caplog):
    tried = []

    def hang(tracking, checkpoint, **_):
        tried.append(checkpoint)
        time.sleep(0.02)
        raise TrackingError("timed out")

    monkeypatch.setattr(Tracking, "log_evaluation", hang)
    monkeypatch.setattr(tracking_catch_up, "PATIENCE_S", 0.01)
    assert not catch_up(store, LOG)
    assert tried == [BASE]
    assert caplog.messages == [
        f"MLflow is pending scores of {BASE}, scores of {OLD}, scores of {NEW}, the base's images beside demo "
        "and 3 more: timed out"
    ]
    assert owes(store) == EVERYTHING[2:]


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def test_a_death_at_any_call_leaves_every_row_once(store, sent, monkeypatch):
    import mlflow

    calls = ["create_run", "log_batch", "log_inputs", "create_logged_model", "log_outputs", "finalize_logged_model",
             "set_logged_model_tags", "set_terminated", "create_registered_model", "create_model_version",
             "set_model_version_tag", "update_model_version", "set_registered_model_alias", "set_tag",
             "set_experiment_tag"]  # fmt: skip
    died_at = set()

    def dying(owner, name, key):
        method = getattr(owner, name)

        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            # Each call of each kind is the last one of a process once; a repetition of it goes
            # through.
            if (deed := (name, key(args, kwargs))) not in died_at:
                died_at.add(deed)
                raise Killed
            return result

        monkeypatch.setattr(owner, name, call)

    for name in calls:
        dying(mlflow.MlflowClient, name, lambda args, kwargs: None)
    dying(commit, "write_json", lambda args, kwargs: len(args[1].get("sent", ())))
    for _ in range(100):
        try:
            assert catch_up(store, LOG)
        except Killed:
            continue
        break
    assert {name for name, _ in died_at} == {*calls, "write_json"}
    assert arrived(store) == arrived(sent)
    assert owes(store) == []


def test_a_run_whose_end_was_not_sent_is_sent_by_a_foundry_run_that_has_nothing_to_do(
    store, monkeypatch
):
    from jobs import pipeline
    from jobs.schedules import tracking_catch_up as schedule

    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert isinstance(schedule(store=store), dg.RunRequest)
    monkeypatch.setattr(pipeline, "open_instance", lambda home: dg.DagsterInstance.ephemeral())
    (outcome,) = pipeline.bring_up_to_date(store.home, select="latents", only=True)
    assert outcome.num_made == 0
    found = arrived(store)
    assert (found["status"], found["champion"][0]) == ("FINISHED", [("champion", 1)])
    assert isinstance(schedule(store=store), dg.SkipReason)


def test_two_do_not_catch_up_at_once(store, monkeypatch, caplog):
    monkeypatch.setattr(
        tracking_catch_up.commit,
        "lock",
        lambda path, what, old=commit.lock: old(path, what, wait_s=0),
    )
    with commit.lock(store.home / "locks" / "tracking.lock", "catching up"):
        assert not catch_up(store, LOG)
    assert "catching up MLflow with" in caplog.messages[0]
    assert "is held by pid" in caplog.messages[0]
    assert owes(store) == EVERYTHING


def news(store):
    """Let there be new scores and a new verdict; what MLflow shows of them once they have
    arrived."""
    evaluate(store.home, NEW, 8.0)
    judge(store.home, NEW, "worse")
    return ("demo", "eval/aesthetic_mean", 120, 8.0)


def test_an_experiment_that_was_deleted_on_its_page_comes_back_with_the_next_news(sent):
    client = client_of(sent)
    before = arrived(sent)
    client.delete_experiment("1")
    point = news(sent)
    assert catch_up(sent, LOG)
    assert owes(sent) == []
    (experiment,) = [item for item in client.search_experiments() if item.name == "space"]
    assert experiment.experiment_id == "1"
    assert {run.data.tags["foundry.run"] for run in client.search_runs(["1"])} == {
        "demo",
        "base.bbbbbbbb",
    }
    found = arrived(sent)
    assert point in found["metrics"]
    assert set(before["metrics"]) <= set(found["metrics"])
    assert found["tags"]["verdict.aesthetic"] == "worse"


def test_a_run_that_was_deleted_on_its_page_comes_back_with_the_next_news(sent):
    client = client_of(sent)
    (run,) = client.search_runs(["1"], "tags.`foundry.run` = 'demo'")
    before = arrived(sent)
    client.delete_run(run.info.run_id)
    assert owes(sent) == []  # until there is news, it stays as the person wanted it
    point = news(sent)
    assert catch_up(sent, LOG)
    assert owes(sent) == []
    (again,) = client.search_runs(["1"], "tags.`foundry.run` = 'demo'")
    assert again.info.run_id == run.info.run_id
    found = arrived(sent)
    assert point in found["metrics"]
    assert set(before["metrics"]) <= set(found["metrics"])
    assert found["tags"]["verdict.aesthetic"] == "worse"


def moved(store, path):
    """The workspace after a person has moved it."""
    path.parent.mkdir(exist_ok=True)
    return Store(Path(shutil.move(store.home, path)))


@pytest.mark.parametrize("name", ["space", "another-name"])
def test_a_moved_workspace_keeps_its_experiment_and_a_copy_makes_it_its_own(sent, tmp_path, name):
    def experiments(store):
        found = [item for item in client_of(store).search_experiments() if item.name != "Default"]
        return {(item.experiment_id, item.name): item.tags["foundry.workspace"] for item in found}

    before, known = arrived(sent), experiments(sent)["1", "space"]
    copy = Store(shutil.copytree(sent.home, tmp_path / "copy" / name))
    assert owes(copy) == ["the experiment"]
    assert catch_up(copy, LOG)
    assert experiments(sent) == {("1", "space"): known}
    assert experiments(copy).keys() == {("1", name)}
    assert experiments(copy)["1", name] != known
    assert arrived(copy) == before
    there = moved(sent, tmp_path / "moved" / name)
    assert owes(there) == ([] if name == "space" else ["the experiment"])
    assert catch_up(there, LOG)
    assert experiments(there) == {("1", name): known}
    assert arrived(there) == before
    links = workspace_tracking(there.home).views()
    (version,) = client_of(there).search_model_versions(f"name = '{name}'")
    assert f"/#/models/{name}?" in links["Champion"]
    model = client_of(there).get_logged_model(version.source.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]


def test_a_runs_page_leads_to_its_report_and_to_the_run_of_dagster_that_trained_it(sent):
    put(
        sent.home, "checkpoints", "demo", TABLES["checkpoints"].empty(), dagster_run="12345678-abcd"
    )
    assert owes(sent) == ["the link from demo to Dagster"]
    assert catch_up(sent, LOG)
    (run,) = client_of(sent).search_runs(["1"], "tags.`foundry.run` = 'demo'")
    links, _, verdict = run.data.tags["mlflow.note.content"].partition("\n\n")
    page = f"#/experiments/1/runs/{run.info.run_id}"
    assert links == (
        f"Links: [report]({page}/artifacts/evaluation/000000120/report.html), "
        "[Dagster run 12345678](/dagster/runs/12345678-abcd)"
    )
    assert verdict.startswith(f"Verdict: {NEW} against {BASE}")
    judge(sent.home, NEW, "unclear")
    assert catch_up(sent, LOG)
    (run,) = client_of(sent).search_runs(["1"], "tags.`foundry.run` = 'demo'")
    assert run.data.tags["mlflow.note.content"].startswith(f"{links}\n\nVerdict: {NEW}")
    assert "unclear" in run.data.tags["mlflow.note.content"]
    client_of(sent).set_tag(run.info.run_id, "mlflow.note.content", "I like it.")
    judge(sent.home, NEW, "better")
    assert catch_up(sent, LOG)
    (run,) = client_of(sent).search_runs(["1"], "tags.`foundry.run` = 'demo'")
    assert run.data.tags["mlflow.note.content"] == "I like it."
