"""A bundle trains where neither Dagster nor MLflow is, and its run comes back as if it had been
trained at home."""

import ast
import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from training import manifests
from training.errors import ConfigError, DamageError, DataError
from training.latents.generations import generations
from training.runs import bundle, run_folder
from training.runs.event_log import read_events

BLOCKER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"dagster", "mlflow", "assets", "resources", "jobs"}:
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Absent())
"""


def contents(run, samples_seen):
    ready = run_folder.read_ready(run_folder.checkpoint_folder(run.folder, samples_seen))
    return {entry.name: entry.sha256 for entry in (*ready.files, *ready.state_files)}


def start(folder, tmp_path, **environment):
    """Run `start.sh` as on another machine: no Dagster, no MLflow, none of our packages that need
    them."""
    blocked = tmp_path / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "sitecustomize.py").write_text(BLOCKER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [folder / "start.sh"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(blocked), "PATH": path, **environment},
    )  # fmt: skip


def test_a_bundle_trains_elsewhere_and_its_run_comes_home(unbroken, make_run, tmp_path):
    run = make_run("away")
    size = bundle.write_bundle(run.folder, tmp_path / "made")
    folder = tmp_path / "other machine"
    shutil.move(tmp_path / "made", folder)
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    home = run.inputs.training_set.parent
    shutil.move(home, tmp_path / "out of reach")
    done = start(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    events = read_events(folder / "runs" / "away" / run_folder.EVENTS)
    assert events[-1]["event"] == "finished"
    shutil.move(tmp_path / "out of reach", home)

    shutil.rmtree(run.folder)
    shutil.copytree(folder / "runs" / "away", run.folder)
    shutil.rmtree(folder)
    here = {
        "training_sets": home,
        "latents": run.inputs.latents,
        "base_model": run.inputs.base_model,
        "vae": None,
    }
    assert run_folder.adopt(run.folder, **here)
    assert not run_folder.adopt(run.folder, **here)
    assert run_folder.read_inputs(run.folder) == run.inputs
    assert contents(run, 52) == contents(unbroken, 52)


def test_a_stopped_run_goes_on_in_its_bundle(unbroken, make_run, train, tmp_path):
    run = make_run("moved")
    assert train(run, stop_at=5) == "stopped"
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "models").exists()
    assert start(tmp_path / "bundle", tmp_path).returncode == 0
    run.folder = tmp_path / "bundle" / "runs" / "moved"
    assert contents(run, 52) == contents(unbroken, 52)


def test_a_run_stopped_before_latents_were_encoded_anew_goes_on_in_its_bundle(
    make_run, train, write_generation, tmp_path
):
    run = make_run("moved", num_samples=32)
    assert train(run, stop_at=5) == "stopped"  # in its first epoch, which has pinned generation 1
    shard = run.inputs.latents / "s000000"
    write_generation(shard, 2, run.rows.filter(pl.col("shard") == shard.name))
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    latents = tmp_path / "bundle" / "latents" / "tiny"
    assert {path.name: generations(path) for path in latents.iterdir()} == {
        "s000000": [1, 2],
        "s000001": [1],
    }
    assert train(run) == "finished"
    here = contents(run, 38)
    run.folder = tmp_path / "bundle" / "runs" / "moved"
    run.inputs = run_folder.read_inputs(run.folder)
    assert train(run) == "finished"
    assert contents(run, 38) == here


def test_a_generation_that_the_run_has_pinned_must_be_there(
    make_run, train, write_generation, tmp_path
):
    run = make_run("moved", num_samples=16)
    assert train(run, stop_at=5) == "stopped"
    shard = run.inputs.latents / "s000000"
    write_generation(shard, 2, run.rows.filter(pl.col("shard") == shard.name))
    next(shard.glob("g0001-*.safetensors")).unlink()
    with pytest.raises(
        DamageError, match=r"g0001-.*\.safetensors is missing, which generation 1 names"
    ):
        bundle.write_bundle(run.folder, tmp_path / "bundle")
    (shard / "g0001.json").unlink()
    with pytest.raises(DamageError, match=r"has no generation 1; it has \[2\]"):
        bundle.write_bundle(run.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_says_what_it_lacks(make_run, tmp_path):
    run = make_run()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        bundle.write_bundle(run.folder, tmp_path / "there")
    shutil.rmtree(run.inputs.latents / "s000001")
    with pytest.raises(DataError, match=r"13 images of shard s000001"):
        bundle.write_bundle(run.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_run_of_a_set_that_is_not_here_is_not_adopted(make_run, tmp_path):
    run = make_run()
    run.inputs.training_set.unlink()
    with pytest.raises(DataError, match="not in this workspace"):
        run_folder.adopt(
            run.folder,
            training_sets=tmp_path,
            latents=run.inputs.latents,
            base_model=run.inputs.base_model,
            vae=None,
        )


def test_a_bundle_carries_the_vae_of_its_latents(make_run, train, other_vae, tmp_path):
    run = make_run("away", num_samples=8)
    other_vae(run)
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    own, vae = run.inputs, run.inputs.vae
    shutil.move(vae, tmp_path / "out of reach")
    run.folder = tmp_path / "bundle" / "runs" / "away"
    run.inputs = run_folder.read_inputs(run.folder)
    assert run.inputs.vae.is_relative_to(tmp_path / "bundle")
    assert train(run) == "finished"

    shutil.copytree(run.folder, tmp_path / "runs" / "back")
    shutil.rmtree(tmp_path / "bundle")
    here = {
        "training_sets": own.training_set.parent,
        "latents": own.latents,
        "base_model": own.base_model,
    }
    assert run_folder.adopt(tmp_path / "runs" / "back", vae=vae, **here)
    assert run_folder.read_inputs(tmp_path / "runs" / "back").vae == vae


def test_latents_of_another_vae_are_not_bundled(make_run, other_vae, tmp_path):
    run = make_run()
    other_vae(run)
    path = run.inputs.latents / "s000001" / "g0001.json"
    manifests.commit_manifest(
        path, dataclasses.replace(manifests.read_manifest(path), models={"vae": "e" * 64})
    )
    with pytest.raises(
        DataError, match=r"13 images of shard s000001 .*g0001 was encoded with VAE eeee"
    ):
        bundle.write_bundle(run.folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"optimizer.name": "lion_8bit"}, {"bitsandbytes"}),
        ({"latents_url": "s3://bucket/latents/tiny"}, {"fsspec[s3]"}),
        ({"latents_url": "gs://bucket/latents/tiny"}, {"fsspec[gcs]"}),
        ({"latents_url": "simplecache::https://host/latents/tiny"}, {"fsspec[http]"}),
        ({"latents_url": "oss://bucket/latents/tiny"}, {"ossfs"}),
        ({"latents_url": "file:///latents/tiny"}, set()),
        ({"latents_url": "/latents/tiny"}, set()),
    ],
)
def test_requirements_have_what_the_runs_options_need(make_run, tmp_path, changes, added):
    bundle.write_bundle(make_run(**changes).folder, tmp_path / "bundle")
    lines = (tmp_path / "bundle" / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in lines} == {*bundle.PACKAGES} | added
    pinned = f"=={importlib.metadata.version('fsspec')}"
    assert all(line.endswith(pinned) for line in lines if line.startswith("fsspec"))


def test_latents_of_an_unknown_protocol_are_refused(make_run, tmp_path):
    with pytest.raises(ConfigError, match="knows no protocol 'nowhere'"):
        bundle.write_bundle(make_run(latents_url="nowhere://latents").folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_requirements_cover_all_that_training_imports(make_run, tmp_path):
    bundle.write_bundle(make_run().folder, tmp_path / "bundle")
    lines = (tmp_path / "bundle" / "requirements.txt").read_text().split()
    wanted = {line.partition("==")[0] for line in lines}
    assert not {"dagster", "mlflow"} & wanted
    code = """import training.loop.run, training.loop.trainer, training.runs.bundle, sys
print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('training.') and m.__file__))"""
    files = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(files) > 30
    nodes = [node for file in files for node in ast.walk(ast.parse(Path(file).read_text()))]
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"training"}
    owners = importlib.metadata.packages_distributions()
    # Optional ones are imported where an option asks for them.
    assert {
        owners[name][0].lower().replace("_", "-") for name in names if name in owners
    } <= wanted | {
        "pillow",
        "bitsandbytes",
    }
