"""A trainer lives on its own: launchers die, bundles travel, and the run is the same one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
from graph_tools import foundry

from assets import checkpoints
from assets.partitions import mirror
from jobs.definitions import defs
from resources.instance import instance as open_instance
from resources.operations.forget import forget
from resources.workspace.setup import configure_run
from resources.workspace.store import Store
from training.runs.event_log import read_events
from training.runs.run_folder import EVENTS, INPUTS, LOCK, read_config

SMALL = (
    "prompts.max_chunks=1", "batch.global_batch_size=8", "batch.micro_batch_size=8", "optimizer.warmup_samples=8",
    "validation.every_samples=1000", "checkpoints.every_samples=1000",
)  # fmt: skip


def settings(**values):
    """`--set` for a short run of the demo's recipe."""
    return [
        part
        for item in (*SMALL, *(f"{key}={value}" for key, value in values.items()))
        for part in ("--set", item)
    ]


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def count(folder, kind):
    return sum(event["event"] == kind for event in read_events(folder / EVENTS))


def test_the_trainer_does_not_notice_that_its_launcher_died(small_copy):
    folder = small_copy / "runs" / "long"
    command = [
        Path(sys.executable).with_name("foundry"),
        "train",
        "--home",
        small_copy,
        "--run",
        "long",
    ]
    launcher = subprocess.Popen(
        [*command, "--recipe", "demo", *settings(num_samples=4000)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: count(folder, "step"))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    trainer = int((folder / LOCK).read_text().split()[1])
    before = count(folder, "step")
    wait_for(lambda: count(folder, "step") > before + 1)
    os.kill(trainer, 0)
    # Another process finds the trainer by its lock, follows it to its end and reports it.
    assert "stopped at" in foundry("train", "--home", small_copy, "--run", "long", "--stop").stdout
    opened = [
        event["event"]
        for event in read_events(folder / EVENTS)
        if event["event"] in ("started", "resumed")
    ]
    assert opened == ["started"]


def test_a_bundle_is_trained_elsewhere_and_adopted(small_copy, tmp_path):
    bundle, folder = tmp_path / "bundle", small_copy / "runs" / "away"
    made = (
        "train",
        "--home",
        small_copy,
        "--run",
        "away",
        "--recipe",
        "demo",
        *settings(num_samples=16),
    )
    assert "wrote" in foundry(*made, "--bundle", bundle).stdout
    refused = foundry(*made, "--bundle", bundle, check=False)
    assert (refused.returncode, "exists already" in refused.stderr) == (2, True)
    here = foundry("train", "--home", small_copy, "--run", "away", check=False)
    assert (here.returncode, "was bundled to be trained elsewhere" in here.stderr) == (2, True)
    assert (
        "run away is away" in foundry("run", "--home", small_copy, "--select", "checkpoints").stdout
    )
    assert not (folder / EVENTS).exists()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [bundle / "start.sh"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    inputs = (folder / INPUTS).read_text()
    shutil.rmtree(folder)
    shutil.copytree(bundle / "runs" / "away", folder)
    shutil.rmtree(bundle)
    lines = (folder / EVENTS).read_bytes()
    foundry("train", "--home", small_copy, "--run", "away")
    assert (folder / EVENTS).read_bytes() == lines, "a finished run is not trained again"
    assert (folder / INPUTS).read_text() == inputs
    rows = foundry(
        "sql", "--home", small_copy, "--format", "csv", "select checkpoint from checkpoints"
    ).stdout
    assert "away@16" in rows


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "1 images of its training set were forgotten"),
        ({"without_forgotten": True}, "run new stopped at 0 samples"),
    ],
)
def test_the_launch_dialog_lets_a_run_go_on_without_forgotten_images(
    small_copy, monkeypatch, asked, words
):
    """The trainer itself is left out: `tests/test_forget.py` proves what it does with such a set."""
    store = Store(small_copy)
    configure_run(small_copy, "new", "demo", [])
    checkpoints.prepare(store, "new", read_config(store.paths.run_folder("new")))
    forget(store, [store.read("training_set", ["image_id"])["image_id"][0]])
    monkeypatch.setenv("FOUNDRY_HOME", str(small_copy))
    monkeypatch.setattr(
        checkpoints, "follow", lambda *arguments: {"event": "stopped", "samples_seen": 0}
    )
    with open_instance(small_copy) as instance:
        mirror(instance, Store(small_copy))
        done = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("checkpoints")], partition_key="new", raise_on_error=False,
            run_config={
                "ops": {"checkpoints": {"config": asked}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
        )  # fmt: skip
    error = next(
        event for event in done.all_events if event.is_step_failure
    ).step_failure_data.error
    assert words in (error.cause or error).message
