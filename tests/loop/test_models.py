"""Runs of the whole trainer on models and precisions that its other tests do not use."""

import dataclasses
import shutil

import pytest
import torch
from original_names import write_single_file

from training.models.unet import load_pipeline_parts
from training.models.weights import model_digest
from training.runs import run_folder


def states(parts):
    modules = [parts.unet, *parts.text_encoders]
    return {
        f"{number}.{key}": value
        for number, m in enumerate(modules)
        for key, value in m.state_dict().items()
    }


def test_a_run_begins_from_a_single_file_as_from_its_folder(
    unbroken, make_run, train, tmp_path, tiny_sdxl
):
    path = tmp_path / "photo.safetensors"
    write_single_file(load_pipeline_parts(tiny_sdxl, "cpu"), path)
    shutil.copytree(tiny_sdxl, tmp_path / "photo", ignore=shutil.ignore_patterns("*.safetensors"))
    run = make_run("single")
    run.inputs = dataclasses.replace(run.inputs, base_model=path, base_digest=model_digest(path))
    run_folder.write_inputs(run.folder, run.inputs)
    assert train(run) == "finished"
    ours, theirs = (
        states(load_pipeline_parts(run_folder.checkpoint_folder(r.folder, 52), "cpu"))
        for r in (run, unbroken)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16_amp"},
        {"optimizer.name": "adafactor", "compute.channels_last": True},
        {
            "prediction_type": "v_prediction",
            "zero_terminal_snr": True,
            "loss.weighting": "debiased",
        },
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer.name": "lion", "optimizer.learning_rate": 1e-4, "freeze_embeddings": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer.name": "prodigy", "optimizer.learning_rate": 1.0}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_a_resume_equals_an_unbroken_run_and_keeps_what_it_does_not_train(
    make_run, train, tiny_sdxl, changes
):
    whole, broken = make_run("whole", **changes), make_run("broken", **changes)
    assert train(whole) == "finished"
    assert train(broken, stop_at=7) == "stopped"
    assert train(broken) == "finished"
    before = load_pipeline_parts(tiny_sdxl, "cpu")
    for folder in ("", "ema"):
        ours, theirs = (
            load_pipeline_parts(run_folder.checkpoint_folder(run.folder, 52) / folder, "cpu")
            for run in (broken, whole)
        )
        assert all(torch.equal(states(ours)[key], value) for key, value in states(theirs).items())
        assert not torch.equal(ours.unet.conv_in.weight, before.unet.conv_in.weight)
        frozen = before.text_encoders[1].state_dict()
        assert all(
            torch.equal(value, frozen[key])
            for key, value in ours.text_encoders[1].state_dict().items()
        )
        asked = changes.get("prediction_type", "epsilon")
        assert ours.noise_scheduler_config["prediction_type"] == asked
        assert ours.noise_scheduler_config.get("rescale_betas_zero_snr", False) == (
            asked == "v_prediction"
        )
