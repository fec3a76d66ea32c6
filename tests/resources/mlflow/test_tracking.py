"""Event logs and scores reach MLflow whole, once, with their own times; a tracker that is away
costs seconds."""

import base64
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow_world import prepare_run
from PIL import Image

from resources.mlflow import spool
from resources.mlflow.images import choose_images, due_step
from resources.mlflow.tracking import (
    NUM_IMAGES,
    Tracking,
    workspace_tracking,
)
from training.errors import TrackingError
from training.runs import run_folder
from training.runs.event_log import EventLog, read_events
from training.tables.schemas import TABLES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")


@pytest.fixture
def home(tmp_path, empty_database):
    (tmp_path / "space").mkdir()
    shutil.copy(empty_database, tmp_path / "space" / "mlflow.db")
    return tmp_path / "space"


@pytest.fixture
def run(home):
    """The folder of a run that has not written an event yet."""
    folder = home / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('encoding = "sdxl"\nseed = 7\n')
    inputs = run_folder.RunInputs(
        run="demo", training_set=home / "set.parquet", training_set_sha256="0" * 64, fingerprint="f" * 64,
        vocabulary=folder / "vocabulary.parquet", vocabulary_sha256="0" * 64, latents=home / "latents",
        base_model=home / "base", base_digest="b" * 64,
    )  # fmt: skip
    run_folder.write_inputs(folder, inputs)
    return folder


def train(folder, opening, start, steps, ending=None, every=4):
    """One attempt of a trainer in steps of 10 samples; a checkpoint and a validation after every
    fourth."""
    with EventLog(folder / "events.jsonl") as log:
        log.write(opening, samples_seen=start, run="demo")
        for step in range(start // 10 + 1, start // 10 + 1 + steps):
            seen = step * 10
            log.write(
                "step",
                samples_seen=seen,
                step=step,
                loss=1 / step,
                learning_rate=1e-4,
                images_per_s=3.0,
            )
            if step % every == 0:
                log.write(
                    "validation", samples_seen=seen, loss=0.5 / step, stable_loss=None, seconds=0.1
                )
                name = f"samples_{seen:09d}"
                log.write("checkpoint", samples_seen=seen, checkpoint=f"demo@{seen}", folder=f"checkpoints/{name}",
                          digest="d" * 64, validation_loss=None, seconds=0.2)  # fmt: skip
        if ending:
            log.write(ending, samples_seen=seen, reason="disk full")
    return folder


def rows(home, table="metrics", run="%"):
    """What the database holds on the runs so named, read past MLflow: (key, step, value,
    timestamp), sorted."""
    named = "select run_uuid from tags where key = 'foundry.run' and value like ?"
    query = f"select key, step, value, timestamp from {table} where run_uuid in ({named})"
    with sqlite3.connect(home / "mlflow.db") as database:
        return sorted(database.execute(query, [run]).fetchall())


def expected(folder):
    """The same from the event log, by the log's own reader."""
    names = {
        "step": {"loss": "train/loss", "learning_rate": "train/learning_rate", "step": "progress/optimizer_step",
                 "images_per_s": "perf/images_per_s"},
        "validation": {"loss": "val/loss", "seconds": "perf/validation_s"},
        "checkpoint": {"seconds": "perf/checkpoint_s"},
    }  # fmt: skip
    return sorted(
        (metric, event["samples_seen"], float(event[name]), event["time_ms"])
        for event in read_events(folder / "events.jsonl")
        for name, metric in names.get(event["event"], {}).items()
    )


def client_of(home):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")


def the_run(home, name="demo"):
    client = client_of(home)
    found = client.search_runs(["1"], f"tags.`foundry.run` = '{name}'")
    assert len(found) == 1
    return found[0]


def test_a_run_arrives_whole_with_its_own_times_and_again_changes_nothing(home, run):
    train(run, "started", 0, 9, "finished")
    tracking = workspace_tracking(home)
    assert tracking.forward(run) == len(expected(run)) == 9 * 4 + 2 * 2 + 2
    assert rows(home) == expected(run)
    assert tracking.forward(run) == 0
    (run / "tracking.json").unlink()
    tracking.forward(run)
    assert rows(home) == expected(run)
    info = the_run(home)
    assert info.info.status == "FINISHED"
    assert info.info.end_time == read_events(run / "events.jsonl")[-1]["time_ms"]
    assert len(info.data.params) <= 2
    assert info.data.tags["foundry.seed"] == "7"
    (data,) = info.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("sdxl", "f" * 36)
    assert sorted(output.step for output in info.outputs.model_outputs) == [40, 80]
    experiment = client_of(home).get_experiment("1")
    assert experiment.name == "space"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_checkpoints_are_ready_models_whose_weights_stay_on_disk(home, run):
    train(run, "started", 0, 8, "stopped")
    workspace_tracking(home).forward(run)
    models = client_of(home).search_logged_models(["1"])
    assert sorted(model.name for model in models) == ["demo@40", "demo@80"]
    for model in models:
        assert str(model.status) == "READY"
        assert model.source_run_id == the_run(home).info.run_id
        assert model.params["checkpoint"] == model.name
        assert (
            model.tags["folder"]
            == f"demo/checkpoints/samples_{int(model.params['samples_seen']):09d}"
        )
    assert the_run(home).info.status == "KILLED"


def test_a_log_is_followed_while_it_grows_and_torn_lines_wait(home, run):
    tracking = workspace_tracking(home)
    train(run, "started", 0, 3)
    assert tracking.forward(run) == 12
    assert the_run(home).info.status == "RUNNING"
    log = run / "events.jsonl"
    line = json.dumps({"time_ms": 5, "event": "step", "attempt": 1, "samples_seen": 40, "step": 4, "loss": 0.25,
                       "learning_rate": 1e-4, "images_per_s": 3.0})  # fmt: skip
    with log.open("a") as file:
        file.write(line[:20])
    assert tracking.forward(run) == 0
    with log.open("a") as file:
        file.write(line[20:] + "\n")
    assert tracking.forward(run) == 4
    assert rows(home) == expected(run)


def test_what_a_resume_does_again_is_there_once(home, run):
    tracking = workspace_tracking(home)
    train(run, "started", 0, 7)
    tracking.forward(run)
    sent_before = rows(home)
    train(run, "resumed", 40, 5, "failed")
    tracking.forward(run)
    points = [(key, step) for key, step, _, _ in rows(home)]
    assert len(points) == len(set(points))
    assert points == [(key, step) for key, step, _, _ in expected(run)]
    # What was there stays as it was sent: a resume repeats its values.
    assert set(sent_before) <= set(rows(home))
    assert the_run(home).info.status == "FAILED"
    assert the_run(home).data.tags["foundry.reason"] == "disk full"


def test_a_log_that_is_sent_late_shows_the_run_as_it_happened_in_the_end(home, run):
    train(run, "started", 0, 7)
    train(run, "resumed", 40, 5)
    train(run, "started", 0, 6)
    train(run, "resumed", 40, 8, "finished")
    workspace_tracking(home).forward(run)
    assert rows(home) == expected(run)


@settings(max_examples=60, deadline=None)
@given(
    attempts=st.lists(st.tuples(st.booleans(), st.integers(1, 14)), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 60), max_size=8),
)
def test_every_point_is_owed_once_however_the_log_is_cut(tmp_path_factory, attempts, cuts):
    """The spool without MLflow: any history of resumes, read in any pieces, owes each (metric,
    step) once."""
    folder = tmp_path_factory.mktemp("run")
    seen = 0
    for number, (fresh, steps) in enumerate(attempts):
        start = 0 if fresh or not number else seen // 40 * 40
        train(folder, "started" if not start else "resumed", start, steps)
        seen = start + steps * 10
    whole = (folder / "events.jsonl").read_bytes()
    wanted = {(key, step) for key, step, _, _ in expected(folder)}
    state, sent = spool.State(run_id="r"), []
    ends = sorted(
        {min(sum(cuts[: n + 1]) * 40, len(whole)) for n in range(len(cuts))} | {len(whole)}
    )
    for end in ends:
        (folder / "events.jsonl").write_bytes(whole[:end])
        for chunk in spool.pending(folder, state):
            sent += [(point.name, point.samples_seen) for point in chunk.points]
            state = chunk.state
            spool.write_state(folder, state)
        assert spool.read_state(folder, "r") == state
    assert len(sent) == len(set(sent))
    assert wanted <= set(sent)
    assert state.offset == len(whole)


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_death_at_any_call_loses_and_repeats_nothing(home, run, monkeypatch, after):
    import mlflow

    monkeypatch.setattr(spool, "MAX_METRICS", 112)  # a chunk every few events
    train(run, "started", 0, 8, "finished")
    left, died_at = {"calls": 0}, set()

    def dying(name):
        method = getattr(mlflow.MlflowClient, name)

        def call(*args, **kwargs):
            left["calls"] -= 1
            result = method(*args, **kwargs) if after or left["calls"] else None
            if left["calls"] == 0:
                died_at.add(name)
                raise Killed
            return result

        return call

    calls = ["create_run", "log_batch", "log_inputs", "create_logged_model", "log_outputs", "finalize_logged_model",
             "set_logged_model_tags", "set_terminated", "update_run"]  # fmt: skip
    for name in calls:
        monkeypatch.setattr(mlflow.MlflowClient, name, dying(name))
    tracking = workspace_tracking(home)
    for number in range(1, 100):
        folder = shutil.copytree(run, run.with_name(f"demo{number}"))
        killed = False
        # Each death is followed by one on what it has left behind, then by a forwarder that lives.
        for left["calls"] in (number, 1 + number % 3, 0):
            try:
                tracking.forward(folder)
            except Killed:
                killed = True
        assert rows(home, run=folder.name) == expected(folder)
        info = the_run(home, folder.name)
        assert info.info.status == "FINISHED"
        assert sorted(output.step for output in info.outputs.model_outputs) == [40, 80]
        if not killed:
            break
    assert died_at == set(calls)
    assert len(client_of(home).search_logged_models(["1"])) == 2 * number


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from resources.mlflow import spool
from resources.mlflow.tracking import workspace_tracking
home, kills = Path(sys.argv[1]), int(sys.argv[2])
spool.MAX_METRICS = 130
import mlflow, mlflow.store.tracking.sqlalchemy_store
rng = random.Random(kills)
died = 0
while died < kills:
    child = os.fork()
    if child == 0:
        workspace_tracking(home).forward(home / "runs" / "demo")
        os._exit(0)
    time.sleep(rng.uniform(0.05, 0.6))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        (home / "runs" / "demo" / "tracking.json").unlink()
    died += 1
"""


def kill_forwarders(home, run, kills):
    train(run, "started", 0, 300, "finished", every=100)
    subprocess.run(
        [sys.executable, "-c", KILLER, str(home), str(kills)],
        check=True,
        cwd=Path(__file__).parents[3],
    )
    workspace_tracking(home).forward(run)
    assert rows(home) == expected(run)
    assert the_run(home).info.status == "FINISHED"


def test_killed_forwarders_leave_every_row_once(home, run):
    kill_forwarders(home, run, 5)


@pytest.mark.slow
def test_many_killed_forwarders_leave_every_row_once(home, run):
    kill_forwarders(home, run, 60)


def test_an_absent_server_costs_seconds_and_an_error(run, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    train(run, "started", 0, 3)
    began = time.monotonic()
    tracking = Tracking(uri=f"http://user:secret@127.0.0.1:{port}", experiment="x")
    with pytest.raises(TrackingError, match="sent with the next call") as error:
        tracking.forward(run)
    assert time.monotonic() - began < 20
    assert "secret" not in str(error.value)
    assert tracking.run_url("demo") == ""


def test_a_hung_server_costs_seconds_and_an_error(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    train(run, "started", 0, 3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()  # takes connections and never answers
        began = time.monotonic()
        with pytest.raises(TrackingError, match="forwarding of run demo"):
            Tracking(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}", experiment="x").forward(run)
    assert time.monotonic() - began < 20


def test_two_forwarders_do_not_work_at_once(home, run):
    from training.commit import lock

    train(run, "started", 0, 3)
    with lock(run / "tracking.lock", "forwarding"):
        code = (
            "import sys; from pathlib import Path; from resources.mlflow.tracking import workspace_tracking\n"
            "import training.commit as c; old = c.lock; c.lock = lambda path, what: old(path, what, wait_s=0.2)\n"
            f"workspace_tracking(Path({str(home)!r})).forward(Path({str(run)!r}))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[3],
        )
    assert "TrackingError" in result.stderr
    assert f"is held by pid {os.getpid()}" in result.stderr


def sampled(home, checkpoint, count=20, shift=0.0):
    """Rows of `eval_metrics` and `sample_images` with drawn images."""
    folder = home / "sample_images" / checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    metrics, samples = [], []
    for n in range(count):
        picture = np.full((40, 64, 3), n * 9, np.uint8)
        Image.fromarray(picture).save(folder / f"{n}.png")
        group = "caption" if n % 3 else "../hands & <limbs>"
        key = {"prompt_id": f"p/{n}", "group": group}
        metrics += [{**key, "metric": "clip_score", "value": 0.2 + n / 100 + shift, "embedding": None},
                    {**key, "metric": "aesthetic", "value": 5 + n / 10, "embedding": None},
                    {**key, "metric": "embedding", "value": None, "embedding": [1.0]}]  # fmt: skip
        samples.append(
            {
                **key,
                "text": "t",
                "negative": "",
                "seed": n,
                "height": 40,
                "width": 64,
                "file": f"{n}.png",
                "sha256": "",
            }
        )
    for name, value in {
        "25%_LAIONScore": 5.5,
        "mean_LAIONScore": 6.0,
        "skew_LAIONScore": float("nan"),
        "Clipscore_mean": 0.3 + shift,
    }.items():
        metrics.append(
            {"prompt_id": None, "group": None, "metric": name, "value": value, "embedding": None}
        )
    return {
        "metrics": pl.DataFrame(metrics, schema=TABLES["eval_metrics"].schema),
        "samples": pl.DataFrame(samples, schema=TABLES["sample_images"].schema),
        "folder": folder,
    }


def files_of(home):
    return sorted(
        path.relative_to(home / "mlartifacts").as_posix()
        for path in (home / "mlartifacts").rglob("*")
        if path.is_file()
    )


def test_an_evaluation_is_scores_of_a_model_and_a_grid_of_images(home, run):
    train(run, "started", 0, 4, "finished")
    tracking = workspace_tracking(home)
    tracking.forward(run)
    for _ in range(2):
        tracking.log_evaluation("demo@40", **sampled(home, "demo@40"))
        tracking.log_evaluation("base.abc@0", **sampled(home, "base.abc@0"))
    values = {
        key: (step, value)
        for key, step, value, _ in rows(home)
        if key.startswith("eval") and step == 40
    }
    assert values["eval/clip_score_mean"] == (40, 0.3)
    assert values["eval_spread/aesthetic_q25"] == (40, 5.5)
    assert values["eval_groups/clip_score caption"][1] == pytest.approx(
        0.2 + np.mean([n for n in range(20) if n % 3]) / 100
    )
    assert "eval_spread/aesthetic_skew" not in values
    names = [name for name in rows(home) if name[0] == "eval/clip_score_mean"]
    assert [(step, value) for _, step, value, _ in names] == [(0, 0.3), (40, 0.3)]
    (model,) = client_of(home).search_logged_models(["1"], filter_string="name = 'demo@40'")
    assert {metric.key: metric.value for metric in model.metrics}["eval/clip_score_mean"] == 0.3
    client = client_of(home)
    info = the_run(home)
    assert info.data.tags["mlflow.loggedImages"] == "True"
    folder = info.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    pictures = [
        name for name in files_of(home) if name.startswith(folder) and name.endswith(".png")
    ]
    assert len(pictures) == NUM_IMAGES
    assert all("/images/samples~p_" in name and "+step+40+timestamp+" in name for name in pictures)
    with Image.open(home / "mlartifacts" / pictures[0]) as image:
        assert image.size == (64, 40)
    assert client.search_runs(["1"], "tags.`foundry.run` = 'base.abc'")


def test_new_scores_of_the_same_images_replace_the_old(home, run):
    tracking = workspace_tracking(home)
    tracking.log_evaluation("demo@40", **sampled(home, "demo@40"))
    tracking.log_evaluation("demo@40", **sampled(home, "demo@40", shift=-0.1))
    assert the_run(home).data.metrics["eval/clip_score_mean"] == pytest.approx(0.2)


def test_files_and_verdicts_are_kept_with_the_checkpoint(home):
    tracking = workspace_tracking(home)
    tracking.log_file("demo@40", "report.html", b"<html>")
    row = {
        "metric": "clip_score", "group": "all", "a": "base.abc@0", "b": "demo@40", "num_prompts": 50, "mean_a": 0.2,
        "mean_b": 0.3, "difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "p_holm": 0.02, "margin": 0.003,
        "win_rate": 0.7, "verdict": "better", "num_needed": None,
    }  # fmt: skip
    verdicts = pl.DataFrame([row, {**row, "group": "hands"}], schema=TABLES["verdicts"].schema)
    tracking.log_verdict("demo@40", verdicts, "")
    tags = the_run(home).data.tags
    assert tags["verdict.clip_score"] == "better"
    assert tags["verdict"] == "clip_score better"
    links, _, text = tags["mlflow.note.content"].partition("\n\n")
    assert links.endswith("/artifacts/evaluation/000000040/report.html)")
    said = text.splitlines()
    assert said[0] == "Verdict: demo@40 against base.abc@0"
    assert [line[:21] for line in said[2:]] == ["- clip_score (all): b", "- clip_score (hands):"]
    (model,) = client_of(home).search_logged_models(["1"])
    assert model.tags["verdict.clip_score"] == "better"
    assert files_of(home)[0].endswith("/artifacts/evaluation/000000040/report.html")
    tracking.log_verdict("demo@40", verdicts.clear(), "3 images have no score")
    assert "verdict.clip_score" not in the_run(home).data.tags
    assert "verdict" not in the_run(home).data.tags
    said = f"{links}\n\nVerdict: none on demo@40: 3 images have no score"
    assert the_run(home).data.tags["mlflow.note.content"] == said
    (model,) = client_of(home).search_logged_models(["1"])
    assert "verdict.clip_score" not in model.tags
    client_of(home).set_tag(the_run(home).info.run_id, "mlflow.note.content", "I like it.")
    tracking.log_verdict("demo@40", verdicts, "")
    assert the_run(home).data.tags["mlflow.note.content"] == "I like it."


def test_a_copied_workspace_is_its_own(home, run, tmp_path):
    train(run, "started", 0, 4, "finished")
    workspace_tracking(home).forward(run)
    other = tmp_path / "copy" / "space"
    shutil.copytree(home, other)
    before = files_of(home), rows(home)
    tracking = workspace_tracking(other)
    assert tracking.forward(other / "runs" / "demo") == 0
    tracking.log_evaluation("demo@40", **sampled(other, "demo@40"))
    assert (files_of(home), rows(home)) == before
    assert len(files_of(other)) == 1 + 3 * NUM_IMAGES + 1


def test_links_lead_to_the_pages_of_a_run_and_its_experiment(home):
    tracking = workspace_tracking(home)
    url = tracking.run_url("demo")
    assert (
        url
        == f"/mlflow/#/experiments/1/runs/{the_run(home).info.run_id}?workflowType=machine_learning"
    )
    assert tracking.run_url("demo") == url
    assert tracking.experiment_url().startswith(
        "/mlflow/#/experiments/1/runs?compareRunsMode=CHART"
    )


def test_runs_differ_in_colour_and_are_called_by_names_that_people_know(home):
    tracking = workspace_tracking(home)
    names = ["base.7d8632a3", *(f"run-{number}" for number in range(9))]
    for name in names:
        tracking.run_url(name)
    runs = [the_run(home, name) for name in names]
    colors = [run.data.tags["mlflow.runColor"] for run in runs]
    assert len(set(colors)) == len(names)
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    assert [run.info.run_name for run in runs] == ["base model 7d8632a3", *names[1:]]
    tracking.run_url("one more")
    assert the_run(home, "one more").data.tags["mlflow.runColor"] in colors


def test_a_run_that_is_sent_late_began_when_it_began(home, run):
    train(run, "started", 0, 4, "finished")
    first, last = (read_events(run / "events.jsonl")[number]["time_ms"] for number in (0, -1))
    time.sleep(0.01)
    workspace_tracking(home).forward(run)
    info = the_run(home).info
    assert (info.start_time, info.end_time) == (first, last)


def test_the_options_in_which_runs_differ_are_parameters_of_all_of_them(home):
    tracking, sent = workspace_tracking(home), {}
    for name, options in {
        "one": "[batch]\nglobal_batch_size = 64\nmicro_batch_size = 32\n",
        "two": "[batch]\nglobal_batch_size = 32\nmicro_batch_size = 32\n",
    }.items():
        folder = prepare_run(home, name, options)
        train(folder, "started", 0, 2, "finished")
        tracking.forward(folder)
        sent[name] = the_run(home, name).data.params
    assert sent["one"].keys() == {"num_samples", "learning_rate"}
    both = [the_run(home, name).data.params for name in ("one", "two")]
    assert [params["batch.global_batch_size"] for params in both] == ["64", "32"]
    assert (
        both[0].keys()
        == both[1].keys()
        == {"num_samples", "learning_rate", "batch.global_batch_size"}
    )
    view = json.loads(
        client_of(home).get_experiment("1").tags.get("mlflow.sharedViewState.foundry-runs", "{}")
    )
    assert not view
    tracking.views()
    tag = client_of(home).get_experiment("1").tags["mlflow.sharedViewState.foundry-runs"]
    columns = json.loads(zlib.decompress(base64.b64decode(json.loads(tag)["state"][8:])))[
        "selectedColumns"
    ]
    assert columns[:2] == ["attributes.`Created`", "params.`batch.global_batch_size`"]
    assert len(columns) == 7


@pytest.mark.parametrize(
    ("step", "shown"),
    [
        (40, 40),
        (4_000, 4_000),
        (4_018, 4_000),
        (4_031, 4_000),
        (4_032, 4_032),
        (8_005, 8_000),
        (9_010, 9_001),
        (12, 12),
    ],
)
def test_a_checkpoint_is_shown_where_it_was_due(step, shown):
    tags = {"mlflow.foundry.checkpoints_due": "[4000, 9001]", "foundry.global_batch_size": "32"}
    assert due_step(tags, step) == shown
    assert (
        due_step({}, step)
        == due_step(tags | {"mlflow.foundry.checkpoints_due": "rotten"}, step)
        == step
    )


def test_images_of_runs_with_other_batch_sizes_have_steps_in_common(home):
    tracking, shown = workspace_tracking(home), {}
    for name, batch, step in (("one", 32, 4_018), ("two", 64, 4_050)):
        options = (
            f"num_samples = 9001\n[batch]\nglobal_batch_size = {batch}\nmicro_batch_size = 32\n"
        )
        folder = prepare_run(home, name, f"{options}[checkpoints]\nevery_samples = 4000\n")
        train(folder, "started", 0, 1, "finished")
        tracking.forward(folder)
        tracking.log_evaluation(f"{name}@{step}", **sampled(home, f"{name}@{step}", count=2))
        shown[name] = json.loads(the_run(home, name).data.tags["foundry.pictures"])["steps"]
        # Scores stand where they were measured.
        assert {row[1] for row in rows(home, run=name) if row[0].startswith("eval")} == {step}
    assert shown == {"one": [4_000], "two": [4_000]}


def test_a_shared_server_keeps_workspaces_apart(tmp_path):
    one, two = (workspace_tracking(tmp_path / name / "space", "http://host:5000/") for name in "ab")
    assert one.experiment != two.experiment
    assert (one.ui, one.artifacts) == ("http://host:5000", None)


def test_the_same_prompts_are_shown_for_every_checkpoint_and_every_group_has_some():
    frame = pl.DataFrame(
        {"prompt_id": [f"{n:03d}" for n in range(100)], "group": ["a"] * 96 + ["b"] * 4}
    )
    chosen = choose_images(frame.sample(fraction=1, shuffle=True, seed=3), 8)
    assert sorted(chosen["prompt_id"]) == ["000", "001", "002", "003", "096", "097", "098", "099"]


def test_tracking_is_drawn_into_the_graph_without_mlflow():
    code = "import sys, resources.mlflow.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_thousand_metrics_a_second(home, run):
    train(run, "started", 0, 1000, "finished", every=1000)
    tracking = workspace_tracking(home)
    tracking.run_url("demo")
    began = time.process_time()
    sent = tracking.forward(run)
    assert sent / (time.process_time() - began) > 1_000
