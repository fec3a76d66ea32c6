"""A workspace that was moved works at once, wherever models and sources lie."""

import json
import shutil

import pytest
from graph_tools import digests, foundry

from resources.workspace.store import Store
from training.runs.run_folder import INPUTS

SETTINGS = (
    "num_samples=16", "batch.global_batch_size=16", "batch.micro_batch_size=16", "optimizer.warmup_samples=0",
)  # fmt: skip


@pytest.fixture
def moved(small_copy, tmp_path):
    """The small workspace at another depth, its run recorded as older versions did: all paths
    relative."""
    home = tmp_path / "some" / "where" / "else" / "workspace"
    home.parent.mkdir(parents=True)
    shutil.move(small_copy, home)
    path = home / "runs" / "demo" / INPUTS
    values = json.loads(path.read_text()) | {"base_model": "../../../demo/models/base"}
    path.write_text(json.dumps(values))
    return home


def test_every_command_works_in_a_moved_workspace(moved, small, tmp_path):
    last = Store(moved).checkpoints.last("demo")
    home = ("--home", moved)
    assert "everything is up to date" in foundry("status", *home).stdout
    assert "nothing was done" in foundry("run", *home).stdout
    assert (
        len(foundry("prompts", "--run", "demo", "--n", 3, "--trace", *home).stdout.splitlines())
        == 9
    )
    for command in (
        ("sql", "select count(*) from raw_images"), ("verify",), ("digest",), ("digest", "--run", "demo"), ("gc",),
        ("train", "--run", "demo"), ("train", "--run", "demo", "--stop"), ("train", "--run", "demo", "--dry-run"),
        ("cost", "--run", "demo"), ("compare", "base", last), ("evaluate", last), ("rival", "list"),
        ("latents", "export", tmp_path / "out", "--encoding", "sdxl"),
    ):  # fmt: skip
        foundry(*command, *home)
    assert digests(moved) == digests(small)
    foundry("latents", "reencode", *home)
    foundry("forget", "0" * 64, *home)


def test_a_run_that_was_stopped_goes_on_in_a_moved_workspace(moved):
    """Its start needs the base model's tokenizers, its bundle the model itself."""
    settings = [f"--set={one}" for one in SETTINGS]
    made = ("train", "--home", moved, "--run", "new", "--recipe", "demo", *settings)
    foundry(*made, "--bundle", moved.parent / "bundle")
    shutil.move(moved, again := moved.parents[2] / "again")
    (again / "runs" / "new" / "bundled.json").unlink()
    inputs = json.loads((again / "runs" / "new" / INPUTS).read_text())
    assert not inputs["latents"].startswith("/"), "inside the workspace: moved with it"
    assert inputs["base_model"].startswith("/"), "outside: stays where it is"
    foundry("train", "--home", again, "--run", "new")
