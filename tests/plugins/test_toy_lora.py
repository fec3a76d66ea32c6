"""A trainable that comes from outside the package goes through all that trains, saves, estimates and
draws: nothing in there assumes that the whole UNet is trained."""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import toy_lora
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from saved_tensors import TINY, saved_bytes
from tiny_runs import TinyRun, build_run, train_here
from tiny_sampling import changed, prompt_frame
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_lora import FILE, ToyLora

from training.config.run import OptimizerConfig, RunConfig
from training.errors import ConfigError, ModelError
from training.estimates.flops import read_model_configs, training_flops
from training.estimates.memory import activation_bytes, estimate_memory
from training.loop.conditioning import predict
from training.loop.requirements import check_trainable
from training.models.trainables import TRAINABLES, trainable_of
from training.models.unet import load_pipeline_parts, named_modules
from training.runs import bundle, release, run_folder
from training.runs.event_log import read_events
from training.sampling import sampling
from training.sampling.image_files import read_image

TOY = {"trainable": "toy_lora"}
# Of little weight in a random model: at the rate of the other tests no pixel would change.
RATE = {"optimizer.learning_rate": 0.3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_sdxl):
    """A finished run of it that no one disturbed; not to be written to."""
    run = build_run(tmp_path_factory.mktemp("toy"), tiny_sdxl, "toy", {**TOY, **RATE})
    assert train_here(run) == "finished"
    return run


def contents(folder):
    """Digests of all files of a run's checkpoints, optimizer and clock included."""
    return {
        (path.name, entry.name): entry.sha256
        for path in run_folder.checkpoints(folder)
        for ready in [run_folder.check_checkpoint(path)]
        for entry in (*ready.files, *ready.state_files)
    }


def last(run):
    return run_folder.checkpoints(run.folder)[-1]


def losses(run, event, name="loss"):
    events = read_events(run.folder / run_folder.EVENTS)
    return [line[name] for line in events if line["event"] == event]


def test_a_checkpoint_holds_its_own_weights_and_names_its_base(whole, tiny_sdxl):
    ready = run_folder.check_checkpoint(last(whole))
    assert {entry.name for entry in ready.files} == {FILE, f"ema/{FILE}"}
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    values = [name for name, _ in parts.unet.named_modules() if name.endswith(".attn2.to_v")]
    names = {f"unet.{name}.{matrix}" for name in values for matrix in ("up", "down")}
    for folder in (last(whole), last(whole) / "ema"):
        with safe_open(folder / FILE, "pt") as file:
            assert set(file.keys()) == names
            assert file.metadata() == {"base_digest": whole.inputs.base_digest}
        assert all(tensor.abs().sum() > 0 for tensor in load_file(folder / FILE).values())
    averages, own = load_file(last(whole) / "ema" / FILE), load_file(last(whole) / FILE)
    assert all(not torch.equal(averages[name], own[name]) for name in names)


def test_it_begins_as_the_base_model_and_learns(whole, unbroken):
    begins, full = losses(whole, "validation"), losses(unbroken, "validation")
    assert begins[0] == pytest.approx(full[0], rel=1e-6)  # nothing but rounding is added yet
    assert begins[-1] != pytest.approx(begins[0], rel=1e-5)
    opening = read_events(whole.folder / run_folder.EVENTS)[0]
    own = load_file(last(whole) / FILE)
    assert opening["num_trained_parameters"] == sum(weight.numel() for weight in own.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_is_unbroken_bit_for_bit(tmp_path, tiny_sdxl, precision):
    runs = [
        build_run(tmp_path, tiny_sdxl, name, {**TOY, "precision": precision})
        for name in ("straight", "broken")
    ]
    frozen = []

    def look(trainer):
        frozen.append(trainer.state.arithmetic.frozen)

    assert train_here(runs[0], prepare=look) == "finished"
    assert frozen == [{}], "no copy of what is never saved"
    assert train_here(runs[1], stop_at=8) == "stopped"
    assert train_here(runs[1]) == "finished"
    found = [contents(run.folder) for run in runs]
    stops = {key for key in found[1] if key[0] not in {name for name, _ in found[0]}}
    assert stops, "the stop saved a checkpoint of its own"
    assert {key: value for key, value in found[1].items() if key not in stops} == found[0]


def test_a_resume_reads_the_base_again_and_refuses_another(make_run, train, tmp_path):
    run = make_run(**TOY)
    assert train(run, stop_at=8) == "stopped"
    config = run.inputs.base_model / "model_index.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"note": "changed"}))
    try:
        with pytest.raises(ModelError, match=r"base model .* the folder changed"):
            train(run)
        with pytest.raises(ModelError, match=r"base model .* the folder changed"):
            draw(last(run), tmp_path / "drawn")
    finally:
        config.write_text(text)
    assert train(run) == "finished"


def test_retention_frees_and_keeps_its_checkpoints(make_run, train):
    run = make_run(
        **TOY, **{"checkpoints.every_samples": 8, "checkpoints.keep_last": 1, "checkpoints.keep_every_samples": 1000}
    )  # fmt: skip
    assert train(run) == "finished"
    kept = run_folder.checkpoints(run.folder)
    best = min((run_folder.read_ready(path).validation_loss, path) for path in kept)[1]
    assert {*kept} == {best, kept[-1]}
    assert [(path / run_folder.STATE).exists() for path in kept] == [
        path == kept[-1] for path in kept
    ]


def test_a_bundle_of_a_begun_run_takes_the_base_along_and_goes_on_as_at_home(
    make_run, train, tmp_path
):
    run = make_run(**TOY)
    assert train(run, stop_at=8) == "stopped"
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    folder = tmp_path / "bundle" / "runs" / "demo"
    inputs = run_folder.read_inputs(folder)
    assert inputs.base_model.is_relative_to(tmp_path / "bundle")
    assert train(TinyRun(folder, run.config, inputs, run.rows)) == "finished"
    assert train(run) == "finished"
    assert contents(folder) == contents(run.folder)


def draw(checkpoint, folder, **changes):
    frame = prompt_frame(("a", "tag_a tag_b", "", 32, 32))
    return sampling.sample_folder(checkpoint, "toy@52", frame, changed(**changes), folder)[
        "sha256"
    ][0]


def test_samples_are_drawn_by_base_and_weights_together(whole, tiny_sdxl, tmp_path):
    raw, averaged = (
        draw(last(whole), tmp_path / weights, weights=weights) for weights in ("raw", "ema")
    )
    assert len({raw, averaged, draw(tiny_sdxl, tmp_path / "base")}) == 3
    # By hand: the products added to the base model's own weights.
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    saved = load_file(last(whole) / FILE)
    with torch.no_grad():
        for name, module in parts.unet.named_modules():
            if name.endswith(".attn2.to_v"):
                module.weight += saved[f"unet.{name}.up"] @ saved[f"unet.{name}.down"]
    ((_, by_hand),) = sampling.sample(
        parts, prompt_frame(("a", "tag_a tag_b", "", 32, 32)), changed(weights="raw")
    )
    (file,) = (tmp_path / "raw").glob("*.png")
    assert abs(read_image(file).astype(int) - by_hand.astype(int)).max() <= 1


def test_a_checkpoint_without_its_run_is_refused_by_the_base_that_it_lacks(whole, tmp_path):
    alone = tmp_path / "runs" / "copied" / "checkpoints" / last(whole).name
    shutil.copytree(last(whole), alone)
    named = f"is put into base model {whole.inputs.base_digest[:16]}, which its run names: .*inputs.json"
    with pytest.raises(ModelError, match=named):
        draw(alone, tmp_path / "drawn")
    # Named from within its folder, as people do on other machines.
    inputs = dataclasses.replace(whole.inputs, run="copied")
    run_folder.write_inputs(tmp_path / "runs" / "copied", inputs)
    with contextlib.chdir(alone.parent):
        assert draw(Path(alone.name), tmp_path / "drawn") == draw(last(whole), tmp_path / "theirs")


def test_its_memory_is_that_of_what_it_trains(tiny_sdxl):
    model = read_model_configs(tiny_sdxl)
    estimate = functools.partial(
        estimate_memory, model, height=64, width=64, num_chunks=1, num_ranks=1
    )
    averages = {"ema_half_life_samples": 8}
    full, toy = (
        estimate(RunConfig(encoding="tiny", trainable=name, optimizer=OptimizerConfig(**averages)))
        for name in (None, "toy_lora")
    )
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    trained = ToyLora(RunConfig(encoding="tiny")).inject(parts)
    assert toy.num_trained == sum(parameter.numel() for parameter in trained.values())
    everything = (p for module in named_modules(parts).values() for p in module.parameters())
    assert toy.num_parameters == sum(parameter.numel() for parameter in everything)
    assert toy.optimizer == 8 * toy.num_trained
    assert toy.gradients == toy.ema == 4 * toy.num_trained
    for name in ("optimizer", "gradients", "ema", "weights", "activations", "total"):
        assert getattr(toy, name) < getattr(full, name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_activations_are_what_autograd_keeps(dtype):
    unet = UNet2DConditionModel.from_config(TINY)
    toy_lora.adapt(unet, seed=0)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    config = RunConfig(encoding="tiny", precision=precision, train_text_encoder=False, **TOY)
    ours = activation_bytes(TINY, config, 192, 320, 77)
    assert ours == pytest.approx(saved_bytes(unet.to(dtype), 192, 320), rel=0.03)


def test_its_operations_are_those_that_torch_counts(tiny_sdxl):
    model, config = read_model_configs(tiny_sdxl), RunConfig(encoding="tiny", **TOY)
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    trainable_of(config).inject(parts)
    ids = [torch.zeros(1, 2, 77, dtype=torch.int64) for _ in parts.text_encoders]
    arguments = (torch.zeros(1, 4, 8, 6), torch.zeros(1, dtype=torch.int64), ids, torch.zeros(1, 6))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        prediction = predict(parts, *arguments)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    ours = training_flops(model, config)(64, 48, 2)
    assert (ours.forward, ours.backward) == (
        forward.get_total_flops(),
        backward.get_total_flops(),
    )


def test_a_release_says_what_its_files_are(whole, tmp_path):
    checkpoint, config = last(whole), whole.config
    files = [entry.name for entry in run_folder.read_ready(checkpoint).files]
    release.assemble(tmp_path / "out", model=checkpoint, model_files=files, texts={}, copies={})
    rows = release.table(tmp_path / "out", config)
    assert dict(rows.select("file", "about").iter_rows()) == {
        f"model/{name}": ToyLora.about_files for name in files
    }
    found = release.inspect_model(checkpoint, whole.inputs.base_model, config)
    assert (found["family"], found["prediction_type"]) == ("sdxl", "epsilon")


def test_an_unknown_name_is_refused_before_anything_is_loaded(tiny_sdxl, monkeypatch):
    config = RunConfig(encoding="tiny", trainable="lokr")
    with pytest.raises(ConfigError, match=r"trainable='lokr' is not known \(toy_lora\)"):
        check_trainable(tiny_sdxl, read_model_configs(tiny_sdxl), config, 1)
    monkeypatch.delitem(TRAINABLES, "toy_lora")
    with pytest.raises(ConfigError, match=r"not known \(none\); leave it out"):
        trainable_of(dataclasses.replace(config, trainable="toy_lora"))
