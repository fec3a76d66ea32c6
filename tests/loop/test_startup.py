import dataclasses
import functools
import json
import shutil
import signal

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TinyRun, training_rows

from assets.checkpoints import prepare as launch
from resources.graph import Scope, Stage
from resources.workspace.setup import configure_run, resolve_run
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import commit, manifests
from training.config.run import RunConfig
from training.errors import ConfigError, DamageError, DataError, ModelError, TrainingError
from training.loop import loading
from training.loop.run import main
from training.models.weights import model_digest
from training.runs import bundle, run_folder
from training.runs.event_log import read_events


def change_config(run, old, new):
    path = run.folder / run_folder.CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_inputs(run, **values):
    path = run.folder / run_folder.INPUTS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def run_again(run, train):
    run.config = run_folder.read_config(run.folder)
    run.inputs = run_folder.read_inputs(run.folder)
    return train(run)


def test_inputs_survive_a_move_of_the_whole_workspace(make_run, train, tmp_path):
    run = make_run(num_samples=8)
    assert run_folder.read_inputs(run.folder) == run.inputs
    assert not json.loads((run.folder / run_folder.INPUTS).read_text())["latents"].startswith("/")
    moved = tmp_path / "elsewhere"
    for name in ("tables", "latents", "runs"):
        shutil.move(tmp_path / name, moved / name)
    inputs = run_folder.read_inputs(moved / "runs" / "demo")
    assert inputs.latents == moved / "latents" / "tiny"
    assert inputs.training_set.is_file()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_digest": "0" * 64}, ModelError, "base model .* inputs.json says 0000"),
        (
            {"training_set_sha256": "0" * 64},
            DamageError,
            "training set .*inputs.json says SHA-256 0000",
        ),
        ({"training_set": "nowhere.parquet"}, DamageError, "nowhere.parquet: no such file"),
        ({"latents": "nowhere"}, DataError, "27 of 27 images of the training set have no latents"),
        ({"format": 2}, ConfigError, "format 2"),
        ({"surprise": 1}, ConfigError, "surprise"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    make_run, train, change, error, message
):
    run = make_run()
    change_inputs(run, **change)
    with pytest.raises(error, match=message):
        run_again(run, train)
    assert not (run.folder / run_folder.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"family": "sd1"}, ModelError, r"family='sd1', but base model .* is of family 'sdxl'"),
        (
            {"compute.gradient_checkpointing": ["down_blocks.7"]}, ConfigError,
            r"compute\.gradient_checkpointing: no block 'down_blocks\.7'; there are",
        ),
        ({"zero_terminal_snr": True, "loss.weighting": "plain"}, ConfigError, "zero_terminal_snr=true, and the UNet"),
        ({"optimizer.name": "adamw_8bit"}, ConfigError, "optimizer.name=adamw_8bit needs bitsandbytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(
    make_run, train, monkeypatch, changes, error, message
):
    monkeypatch.setattr(
        loading, "load_pipeline_parts", lambda *_: pytest.fail("weights were loaded")
    )
    with pytest.raises(error, match=message):
        train(make_run(**changes))


def test_a_run_keeps_its_values_but_may_change_intervals_and_ranks(make_run, train):
    run = make_run(num_samples=8)
    train(run)
    change_config(run, "every_samples = 24", "every_samples = 48")
    change_config(run, "num_processes = 1", "num_processes = 2")
    assert run_again(run, train) == "finished"
    change_config(run, "weight_decay = 0.1", "weight_decay = 0.2")
    change_config(run, "seed = 11", "seed = 12")
    with pytest.raises(TrainingError, match=r"optimizer.weight_decay: 0.1 -> 0.2; seed: 11 -> 12"):
        run_again(run, train)


def test_a_run_keeps_its_training_set(make_run, train):
    run = make_run(num_samples=8)
    train(run)
    change_inputs(run, fingerprint="e" * 16)
    with pytest.raises(
        TrainingError, match=r"was trained on set ffffffffffffffff, inputs\.json names eeee"
    ):
        run_again(run, train)


def test_a_resume_needs_no_base_model(make_run, train, tmp_path, tiny_sdxl):
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    run = make_run(num_samples=22)
    change_inputs(run, base_model=str(base))
    run.inputs = run_folder.read_inputs(run.folder)
    assert train(run, stop_at=5) == "stopped"
    shutil.rmtree(base)
    assert run_again(run, train) == "finished"


def vae_of(folder):
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_checkpoints_carry_the_vae_that_encoded_the_latents(
    make_run, train, other_vae, tiny_sdxl, tmp_path
):
    run = make_run(num_samples=22)
    other_vae(run)
    encoded_with = load_file(run.inputs.vae / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(
        encoded_with["encoder.conv_in.weight"], vae_of(tiny_sdxl)["encoder.conv_in.weight"]
    )
    assert train(run, stop_at=5) == "stopped"
    shutil.rmtree(run.inputs.vae)  # what goes on, here or in a bundle, has it from its checkpoint
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "vae").exists()
    assert run_again(run, train) == "finished"
    first, *_, last = run_folder.checkpoints(run.folder)
    for folder in (first, last, last / "ema"):
        assert all(torch.equal(vae_of(folder)[name], value) for name, value in encoded_with.items())


def test_a_run_is_launched_with_its_encodings_vae(tiny_sdxl, tmp_path):
    vae = shutil.copytree(tiny_sdxl / "vae", tmp_path / "models" / "better")
    (vae / "config.json").write_text(
        json.dumps(json.loads((vae / "config.json").read_text()) | {"sample_size": 8})
    )
    base = shutil.copytree(tiny_sdxl, tmp_path / "models" / "base")
    (tmp_path / "foundry.toml").write_text("""
format = 1
sources = []
models = {base = "models/base"}
[encodings.own]
[encodings.better]
vae = "models/better"
""")
    store = Store(tmp_path)
    for encoding, carried in (("own", None), ("better", vae)):
        stage = Stage(name="training_set", version=1, scope=Scope.ENCODING)
        made = Made(frame=training_rows(4, 1))
        store.writer.commit(stage, encoding, made, {"inputs": {}, "models": {}}, seconds=0)
        launch(store, encoding, RunConfig(encoding=encoding))
        inputs = run_folder.read_inputs(store.paths.run_folder(encoding))
        assert (inputs.vae, inputs.vae_digest) == (carried, model_digest(carried or base / "vae"))
    # A run that comes back from a bundle needs no base model any more.
    shutil.rmtree(base)
    change_inputs(TinyRun(store.paths.run_folder("better"), None, None, None), vae="nowhere")
    launch(store, "better", RunConfig(encoding="better"))
    assert run_folder.read_inputs(store.paths.run_folder("better")).vae == vae


def test_another_vae_than_recorded_is_refused_before_the_first_step(make_run, train, other_vae):
    run = make_run()
    other_vae(run)
    config = run.inputs.vae / "config.json"
    config.write_text(config.read_text().replace("0.13025", "0.18215"))
    with pytest.raises(
        ModelError, match=r"VAE .*other_vae has digest .* inputs\.json says .* changed since"
    ):
        train(run)
    change_inputs(run, vae_digest=model_digest(run.inputs.vae))
    with pytest.raises(
        ModelError, match=r"scales latents by 0\.18215, the model's own by 0\.13025"
    ):
        run_again(run, train)
    assert not (run.folder / run_folder.CHECKPOINTS).exists()


def test_inputs_of_a_version_without_vae_are_read(make_run):
    run = make_run()
    path = run.folder / run_folder.INPUTS
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in values.items() if not name.startswith("vae")})
    )
    assert run_folder.read_inputs(run.folder) == run.inputs


@pytest.fixture
def keep_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


def test_the_entry_point_logs_why_it_failed_and_says_so_in_one_line(make_run, keep_signals, capsys):
    run = make_run()
    for shard in ("s000000", "s000001"):
        folder = run.inputs.latents / shard
        rows = run.rows.filter(pl.col("shard") == shard)
        manifest = manifests.read_manifest(folder / "g0001.json")
        table = pl.read_parquet(folder / manifest.files[0].name)
        entry = manifests.write_parquet(folder, "g0001", table.head(len(rows) - 2))
        files = (entry, *manifest.files[1:])
        manifests.commit_manifest(folder / "g0001.json", dataclasses.replace(manifest, files=files))
    assert main([str(run.folder)]) == 1
    (event,) = read_events(run.folder / run_folder.EVENTS)
    assert event["event"] == "failed"
    assert event["reason"].startswith("4 of 27 images of the training set have no latents")
    assert capsys.readouterr().err == f"training failed: {event['reason']}\n"


def test_a_second_trainer_leaves_the_first_ones_log_alone(
    make_run, keep_signals, capsys, monkeypatch
):
    run = make_run()
    lock = commit.lock
    monkeypatch.setattr(commit, "lock", functools.partial(lock, wait_s=0.2))
    with lock(run.folder / run_folder.LOCK, "the run"):
        assert main([str(run.folder)]) == 1
    assert "is held by pid" in capsys.readouterr().err
    assert not (run.folder / run_folder.EVENTS).exists()


def test_wrong_calls_are_refused(tmp_path, keep_signals, capsys):
    assert main([]) == 2
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_run_starts_from_a_named_base(tiny_sdxl, tmp_path):
    other = shutil.copytree(tiny_sdxl, tmp_path / "models" / "other")
    (tmp_path / "foundry.toml").write_text("""
format = 1
[models.bases.other]
path = "models/other"
license = "mit"
[models.bases.gone]
path = "models/gone"
[encodings.own]
vae = "models/other/vae"
""")
    store = Store(tmp_path)
    stage = Stage(name="training_set", version=1, scope=Scope.ENCODING)
    store.writer.commit(
        stage, "own", Made(frame=training_rows(4, 1)), {"inputs": {}, "models": {}}, seconds=0
    )
    launch(store, "one", RunConfig(encoding="own", base="other"))
    inputs = run_folder.read_inputs(store.paths.run_folder("one"))
    assert (inputs.base_model, inputs.base_digest, inputs.vae) == (other, model_digest(other), None)
    with pytest.raises(
        ModelError, match=r"\[models\] bases\.gone\.path = 'models/gone': folder .* is missing"
    ):
        launch(store, "two", RunConfig(encoding="own", base="gone"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("base=nowhere", "base='nowhere' is no model of .*; there are: base, other"),
        ("base=clip", "base='clip' is no model"),  # a key under [models] that is no base
        ("encoding=nowhere", "encoding='nowhere' is none of the workspace's: sdxl"),
    ],
)
def test_a_run_that_names_what_is_not_there_is_not_written(tmp_path, assignment, message):
    (tmp_path / "foundry.toml").write_text(
        'format = 1\n[models.bases.other]\npath = "x"\n[encodings.sdxl]\n'
    )
    with pytest.raises(ConfigError, match=message):
        configure_run(tmp_path, "one", "demo", [assignment])
    with pytest.raises(ConfigError, match=message):
        resolve_run(Store(tmp_path), "one", "demo", [assignment], tiny=False)
    assert not (tmp_path / "runs").exists()
    configure_run(tmp_path, "one", "demo", ["base=other"])
    assert run_folder.read_config(tmp_path / "runs" / "one").base == "other"


def test_a_started_run_keeps_its_base_when_foundry_toml_names_it_no_more(tiny_sdxl, tmp_path):
    config = tmp_path / "foundry.toml"
    config.write_text(
        f'format = 1\n[models.bases.other]\npath = "{tiny_sdxl}"\n[encodings.own]\nvae = "{tiny_sdxl}/vae"\n'
    )
    store = Store(tmp_path)
    stage = Stage(name="training_set", version=1, scope=Scope.ENCODING)
    store.writer.commit(
        stage, "own", Made(frame=training_rows(4, 1)), {"inputs": {}, "models": {}}, seconds=0
    )
    launch(store, "one", RunConfig(encoding="own", base="other"))
    config.write_text("format = 1\n[encodings.own]\n")
    launch(Store(tmp_path), "one", RunConfig(encoding="own", base="other"))
    assert run_folder.read_inputs(store.paths.run_folder("one")).base_model == tiny_sdxl
