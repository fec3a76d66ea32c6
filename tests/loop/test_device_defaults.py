"""What `auto` comes to: by device at the first launch, from then on as recorded, or refused by
name."""

import dataclasses
import json

import pytest

from training import toml
from training.config.run import ComputeConfig, RunConfig
from training.errors import ConfigError, DamageError, TrainingError
from training.loop.device_defaults import (
    CPU,
    RECORD,
    Device,
    read_record,
    record,
    recorded_in,
    resolve,
)
from training.runs import run_folder
from training.runs.event_log import read_events

H200 = Device(name="NVIDIA H200", is_gpu=True, has_bf16=True, has_tf32=True)
V100 = Device(name="Tesla V100", is_gpu=True, has_bf16=False, has_tf32=False)
AUTO = RunConfig(encoding="sdxl")


@pytest.mark.parametrize(
    ("device", "values"), [(CPU, ("fp32", False, False)), (H200, ("bf16_amp", True, "blocks")),
                           (V100, ("fp16_amp", True, "blocks"))],
)  # fmt: skip
def test_absent_values_follow_the_device(device, values):
    found = resolve(AUTO, device, {})
    assert (found.precision, found.compute.channels_last, found.compute.compile) == values
    assert dataclasses.replace(found, precision="auto", compute=AUTO.compute) == AUTO, (
        "nothing else changes"
    )


def test_a_recipe_decides_what_it_names():
    named = dataclasses.replace(
        AUTO, precision="bf16", compute=ComputeConfig(channels_last=False, compile="whole")
    )
    assert resolve(named, H200, {"precision": "fp32", "compute.channels_last": True}) == named


def test_the_first_step_decides_and_resumes_keep_it_on_another_device(tmp_path):
    assert read_record(tmp_path) is None
    record(tmp_path, resolve(AUTO, CPU, {}), CPU.name)
    first = resolve(AUTO, H200, {})
    record(tmp_path, first, H200.name)  # the first launch never came to a checkpoint
    assert read_record(tmp_path) == {
        "precision": "bf16_amp", "compute.channels_last": True, "compute.compile": "blocks"
    }  # fmt: skip
    assert json.loads((tmp_path / RECORD).read_bytes())["device"] == "NVIDIA H200"
    assert resolve(AUTO, CPU, recorded_in(toml.dump(first))) == first


def test_a_device_that_cannot_be_compiled_for_is_not_by_default_and_refused_by_name():
    lacking = dataclasses.replace(H200, not_compiled=lambda: "no C++ compiler")
    assert resolve(AUTO, lacking, {}).compute.compile is False
    named = dataclasses.replace(AUTO, compute=ComputeConfig(compile="whole"))
    with pytest.raises(
        ConfigError,
        match=r'compute.compile="whole": nothing can be compiled .*\(no C\+\+ compiler\)',
    ):
        resolve(named, lacking, {})
    asked = dataclasses.replace(
        CPU, not_compiled=lambda: pytest.fail("asked where nothing is to be compiled")
    )
    assert resolve(AUTO, asked, {}).compute.compile is False


@pytest.mark.parametrize(
    ("precision", "device"), [("bf16", V100), ("bf16_amp", V100), ("tf32", V100), ("tf32", CPU)]
)
def test_a_precision_that_the_device_lacks_is_refused(tmp_path, precision, device):
    named = dataclasses.replace(AUTO, precision=precision)
    with pytest.raises(
        ConfigError,
        match=rf'precision="{precision}" \(as configured\): {device.name} (has no|cannot)',
    ):
        resolve(named, device, {})
    with pytest.raises(ConfigError, match=r"\(recorded at the run's first step\)"):
        resolve(AUTO, device, {"precision": precision})


def test_a_run_of_an_older_version_keeps_what_its_checkpoints_say():
    old = toml.dump(AUTO) | {
        "precision": "fp32",
        "compute": {"channels_last": False, "compile": False},
    }
    found = resolve(AUTO, H200, recorded_in(old))
    assert (found.precision, found.compute.channels_last, found.compute.compile) == (
        "fp32",
        False,
        False,
    )


def test_a_damaged_record_is_an_error_that_names_it(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(DamageError, match=RECORD):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text('{"format": 9, "values": {}}')
    with pytest.raises(DamageError, match="format 9"):
        read_record(tmp_path)


def test_a_run_resumes_with_what_its_first_launch_resolved(make_run, train):
    run = make_run(num_samples=16)
    assert run.config.precision == "auto"
    assert read_record(run.folder) is None
    assert train(run, stop_at=6) == "stopped"
    assert read_record(run.folder)["precision"] == "fp32"
    (opening,) = (
        event
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] == "started"
    )
    assert (opening["precision"], opening["channels_last"], opening["compile"]) == (
        "fp32",
        False,
        False,
    )
    assert opening["tf32"] is False
    (ready,) = map(run_folder.read_ready, run_folder.checkpoints(run.folder))
    assert ready.config["precision"] == "fp32"
    assert train(run) == "finished"
    run.config = dataclasses.replace(run.config, precision="bf16_amp", num_samples=16)
    with pytest.raises(TrainingError, match=r"precision: 'fp32' -> 'bf16_amp'"):
        train(run)
