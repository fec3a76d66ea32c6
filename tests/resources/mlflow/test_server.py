"""A real MLflow server that is stopped, hung and killed while runs are forwarded: every row exactly
once afterwards."""

import random
import shutil
import signal
import sqlite3
import threading
import time

import pytest
from mlflow_world import Server, evaluate, judge, prepare_run, train

from resources.mlflow import spool
from resources.mlflow.tracking import NUM_IMAGES, Tracking, workspace_tracking
from training.errors import TrackingError
from training.runs import run_folder
from training.runs.event_log import EventLog, read_events

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]
STEPS, EVERY = 1_200, 150


class Trainer(threading.Thread):
    """Writes an event log as fast as no trainer does, whatever MLflow does; measures how long a
    line takes."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder = folder
        self.slowest_s = 0.0
        self.go_on = threading.Semaphore(0)

    def run(self):
        with EventLog(self.folder / run_folder.EVENTS) as log:
            log.write("started", samples_seen=0, run="demo")
            for step in range(1, STEPS + 1):
                if step % EVERY == 1:
                    self.go_on.acquire()
                began = time.monotonic()
                log.write(
                    "step", samples_seen=step * 10, step=step, loss=1 / step, learning_rate=1e-4
                )
                if step % (EVERY // 2) == 0:
                    log.write("checkpoint", samples_seen=step * 10, checkpoint=f"demo@{step * 10}", seconds=0.2,
                              folder=f"checkpoints/samples_{step * 10:09d}", digest="d" * 64)  # fmt: skip
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            log.write("finished", samples_seen=step * 10)


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "space"
    prepare_run(home, "demo")
    workspace_tracking(home).experiment_url()  # creates the database
    yield home
    shutil.rmtree(home)


def wanted(folder):
    names = {"step": {"loss": "train/loss", "learning_rate": "train/learning_rate", "step": "progress/optimizer_step"},
             "checkpoint": {"seconds": "perf/checkpoint_s"}}  # fmt: skip
    return sorted(
        (metric, event["samples_seen"], float(event[name]), event["time_ms"])
        for event in read_events(folder / run_folder.EVENTS)
        for name, metric in names.get(event["event"], {}).items()
    )


def stored(home, what):
    with sqlite3.connect(home / "mlflow.db") as database:
        return sorted(database.execute(what).fetchall())


def test_a_server_stopped_hung_and_killed_loses_and_repeats_nothing(home, monkeypatch):
    monkeypatch.setattr(spool, "MAX_METRICS", 130)  # some ten batches for each round
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    folder = home / "runs" / "demo"
    server, trainer, rng = Server(home), Trainer(folder), random.Random(5)
    tracking = Tracking(uri=server.url, experiment="shared")
    failed = []

    def forward():
        """Returns whether it came through; a server in trouble costs seconds and a
        TrackingError."""
        began = time.monotonic()
        try:
            tracking.forward(folder)
        except TrackingError as error:
            failed.append(str(error))
            assert time.monotonic() - began < 30
            return False
        return True

    def come_through():
        deadline = time.monotonic() + 90
        while not forward():
            assert time.monotonic() < deadline, failed[-1]

    def disturb(number, restart):
        """In the middle of forwarding, or just before it."""
        time.sleep(rng.uniform(0, 0.4))
        if restart:
            server.end(number)
        else:
            server.send(number)

    trainer.start()
    server.start()
    try:
        for trouble in (
            None,
            signal.SIGSTOP,
            signal.SIGKILL,
            signal.SIGTERM,
            signal.SIGSTOP,
            signal.SIGKILL,
            None,
            None,
        ):
            trainer.go_on.release()
            time.sleep(0.3)
            if trouble is None:
                come_through()
                continue
            restart = trouble != signal.SIGSTOP
            thread = threading.Thread(target=disturb, args=(trouble, restart))
            thread.start()
            forward()
            thread.join()
            assert not forward(), "the server is away"
            server.start() if restart else server.send(signal.SIGCONT)
            time.sleep(1)
        trainer.join(30)
        come_through()
        assert tracking.forward(folder) == 0
    finally:
        server.end(signal.SIGKILL)
    assert len(failed) >= 5
    assert trainer.slowest_s < 1
    rows = "select key, step, value, timestamp from metrics"
    assert stored(home, rows) == wanted(folder)
    assert stored(home, "select status from runs") == [("FINISHED",)]
    names = [name for (name,) in stored(home, "select name from logged_models")]
    assert names == sorted(f"demo@{step * 10}" for step in range(EVERY // 2, STEPS + 1, EVERY // 2))


def test_all_that_is_sent_arrives_through_a_server(home):
    server = Server(home)
    server.start()
    try:
        tracking = Tracking(uri=server.url, experiment="shared", ui=server.url)
        evaluate(tracking, home, "base.sdxl@0", 0.2)
        train(tracking, home, "far", 1e-5, 0.6, seed=3)
        said = judge(tracking, "base.sdxl@0", "far@60000", "better", 0.2)
        tracking.log_file("far@60000", "report.html", b"<html>")
        for _ in range(2):
            tracking.set_champion("far@60000", said)
        links = tracking.views()
    finally:
        server.end()
    assert {"Curves", "Prompts beside runs", "Checkpoints", "Champion"} < links.keys()
    assert links["Curves"].startswith(f"{server.url}/#/experiments/")
    assert "viewStateShareKey=foundry-curves" in links["Curves"]
    assert stored(home, "select name, version, description from model_versions") == [
        ("shared", 1, said)
    ]
    assert stored(home, "select alias, version from registered_model_aliases") == [("champion", 1)]
    names = [path.name for path in (home / "mlartifacts").rglob("*") if path.is_file()]
    assert sum(name.endswith(".png") for name in names) == 4 * NUM_IMAGES
    assert sum(name.startswith("prompts-") for name in names) == 2
    assert {"config.toml", "report.html"} <= set(names)
