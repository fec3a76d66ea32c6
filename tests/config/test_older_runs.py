"""Runs that older versions began go on as they began; what those versions did is kept here as
numbers."""

import dataclasses
import json

import pytest
import tomlkit

from resources.workspace.setup import write_run
from training import commit, toml
from training.config import older_runs
from training.config.run import OptimizerConfig, RunConfig
from training.errors import ConfigError, DamageError, TrainingError
from training.loop import epochs
from training.runs import run_folder
from training.runs.event_log import read_events

AVERAGED = [1.179133367538452, 1.157539427280426, 1.1338825345039367]
"""Validation losses of the tiny run's averaged weights, as the version before
`optimizer.ema_warmup` had them."""
ORDER_KEY = "eaf6c957542b12d47a229a0659f62453b13462ba633619c1ff3d1198ff156383"
"""What that version named the order of epoch 0, of the tiny run on a set with fingerprint `f`."""


def forget(run, *keys):
    """Leave options out of what a run has recorded, as a version does that does not know them; then
    read it."""
    path = run.folder / run_folder.CONFIG
    path.write_text(tomlkit.dumps(older_runs.without(toml.load(path), keys)))
    for checkpoint in run_folder.checkpoint_folders(run.folder):
        ready = run_folder.read_ready(checkpoint)
        run_folder.write_ready(
            checkpoint, dataclasses.replace(ready, config=older_runs.without(ready.config, keys))
        )
    run.config = run_folder.read_config(run.folder)
    return run


def test_options_that_a_record_lacks_are_as_they_were():
    values = {"encoding": "e", "optimizer": {"learning_rate": 1e-3}}
    config = older_runs.build(values)
    assert (config.rules_version, config.optimizer.ema_warmup, config.optimizer.learning_rate) == (
        1,
        False,
        1e-3,
    )
    config = older_runs.build({**values, "rules_version": 2, "optimizer": {"ema_warmup": True}})
    assert (config.rules_version, config.optimizer.ema_warmup) == (2, True)
    assert older_runs.build(toml.dump(RunConfig(encoding="e"))) == RunConfig(encoding="e")
    with pytest.raises(ConfigError, match="optimizer=3 must be a table"):
        older_runs.build({"encoding": "e", "optimizer": 3})
    with pytest.raises(ConfigError, match="rules_version=4 must lie between 1 and 3"):
        RunConfig(encoding="e", rules_version=4)


def test_every_such_option_is_one_of_a_run():
    assert set(older_runs.BEFORE) <= set(toml.flatten(toml.dump(RunConfig(encoding="e"))))


def test_an_older_run_goes_on_as_it_began(make_run, train):
    run = forget(make_run("older"), *older_runs.BEFORE)
    assert train(run, stop_at=14) == "stopped"
    assert train(forget(run, *older_runs.BEFORE)) == "finished"
    losses = [
        event["ema_loss"]
        for event in read_events(run.folder / run_folder.EVENTS)
        if "ema_loss" in event
    ]
    assert losses == pytest.approx(AVERAGED, rel=1e-4)


def test_a_resume_by_other_rules_is_refused(make_run, train):
    run = make_run("one")
    assert train(run, stop_at=14) == "stopped"
    run.config = dataclasses.replace(run.config, rules_version=1)
    with pytest.raises(TrainingError, match=r"keeps its config.*rules_version: 3 -> 1"):
        train(run)


def test_an_epoch_that_an_older_version_began_is_finished(make_run):
    run = make_run("one")
    manifest = run.folder / run_folder.EPOCHS / "0.json"
    manifest.parent.mkdir()
    order = manifest.with_suffix(".npz")
    order.write_bytes(b"")
    described = {"key": ORDER_KEY, "file": order.name, "sha256": commit.sha256_file(order)}
    manifest.write_text(json.dumps({"order": described, "latents": {"a shard": "pinned"}}))
    assert epochs.prepare_epoch(run.folder, 0, None, run.config, "f") == ({"a shard": "pinned"}, [])
    other = dataclasses.replace(run.config.prompts, missing_space_prob=0.2)
    with pytest.raises(DamageError, match="another set or config"):
        epochs.prepare_epoch(
            run.folder, 0, None, dataclasses.replace(run.config, prompts=other), "f"
        )


def test_a_recipe_does_not_change_an_older_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    recipe = RunConfig(encoding="e", num_samples=48)
    write_run(tmp_path, "one", recipe)
    assert run_folder.read_config(folder) == recipe
    path = folder / run_folder.CONFIG
    path.write_text(tomlkit.dumps(older_runs.without(toml.load(path), older_runs.BEFORE)))
    (folder / run_folder.EVENTS).write_text("")
    older = run_folder.read_config(folder)
    assert older != recipe
    for num_processes in (2, 4):
        write_run(tmp_path, "one", dataclasses.replace(recipe, num_processes=num_processes))
        assert run_folder.read_config(folder) == dataclasses.replace(
            older, num_processes=num_processes
        )
    spaces = dataclasses.replace(
        recipe, prompts=dataclasses.replace(recipe.prompts, missing_space_prob=0.2)
    )
    with pytest.raises(
        ConfigError, match=r"other values \(prompts.missing_space_prob: 0.0 -> 0.2\)"
    ):
        write_run(tmp_path, "one", spaces)


def test_a_recipe_that_leaves_the_precision_to_the_device_launches_an_older_run_again(tmp_path):
    """Versions before `auto` wrote what their default was, fp32, into the run's config."""
    folder = tmp_path / "runs" / "one"
    recipe = RunConfig(encoding="e")
    write_run(tmp_path, "one", dataclasses.replace(recipe, precision="fp32"))
    path = folder / run_folder.CONFIG
    path.write_text(tomlkit.dumps(older_runs.without(toml.load(path), older_runs.BEFORE)))
    (folder / run_folder.EVENTS).write_text("")
    for _ in range(2):
        write_run(tmp_path, "one", recipe)
        assert run_folder.read_config(folder).precision == "fp32"
    with pytest.raises(ConfigError, match="precision: 'fp32' -> 'bf16'"):
        write_run(tmp_path, "one", dataclasses.replace(recipe, precision="bf16"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_recorded_rate_of_0_of_the_text_encoders_stays_the_unets(tmp_path, version):
    """Versions 1 and 2 recorded 0 for "the UNet's rate"; since then it freezes the text
    encoders."""
    folder = tmp_path / "runs" / "one"
    recipe = RunConfig(encoding="e", optimizer=OptimizerConfig(learning_rate=2e-5))
    write_run(tmp_path, "one", recipe)
    path = folder / run_folder.CONFIG
    recorded = toml.load(path) | {"rules_version": version}
    recorded["optimizer"]["text_encoder_learning_rate"] = 0.0
    path.write_text(tomlkit.dumps(recorded))
    assert run_folder.read_config(folder).optimizer.text_encoder_learning_rate is None
    (folder / run_folder.EVENTS).write_text("")
    for _ in range(2):
        write_run(tmp_path, "one", recipe)
        assert run_folder.read_config(folder) == dataclasses.replace(recipe, rules_version=version)
    frozen = dataclasses.replace(recipe.optimizer, text_encoder_learning_rate=0.0)
    with pytest.raises(ConfigError, match=r"text_encoder_learning_rate: None -> 0\.0"):
        write_run(tmp_path, "one", dataclasses.replace(recipe, optimizer=frozen))


def test_a_run_of_this_version_keeps_what_it_began_with(tmp_path):
    cold = RunConfig(encoding="e")
    cold = dataclasses.replace(
        cold, optimizer=dataclasses.replace(cold.optimizer, ema_warmup=False)
    )
    write_run(tmp_path, "one", cold)
    (tmp_path / "runs" / "one" / run_folder.EVENTS).write_text("")
    with pytest.raises(ConfigError, match="ema_warmup: False -> True"):
        write_run(tmp_path, "one", RunConfig(encoding="e"))
