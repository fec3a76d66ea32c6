import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from training.errors import DamageError, TrainingError, WorkspaceError
from training.loop import checkpoint
from training.loop.order import read_order
from training.loop.prefetch import Prefetch
from training.loop.state import Capture, Clock
from training.loop.trainer import Trainer
from training.models.unet import load_pipeline_parts
from training.optimization.ranks import Ranks
from training.runs import run_folder
from training.runs.event_log import read_events
from training.runs.resumable import find_resumable

MEASURED = ("images_per_s", "data_wait", "eta_s", "memory_bytes")


def contents(run, samples_seen):
    """Digests of all files of a checkpoint: every tensor of the model, the optimizer and the
    average, and the clock."""
    ready = run_folder.read_ready(run_folder.checkpoint_folder(run.folder, samples_seen))
    return {entry.name: entry.sha256 for entry in (*ready.files, *ready.state_files)}


def history(run, *events):
    """The run's numbers, losses as exact hex."""
    return [
        {
            key: value.hex() if isinstance(value, float) else value
            for key, value in event.items()
            if key not in ("time_ms", "attempt", "seconds", *MEASURED)
        }
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] in events
    ]


def last(run):
    return read_events(run.folder / run_folder.EVENTS)[-1]


def test_a_run_writes_its_log_and_checkpoints_that_sampling_can_load(unbroken):
    events = read_events(unbroken.folder / run_folder.EVENTS)
    assert events[0]["event"] == "started"
    assert events[0]["fingerprint"] == unbroken.inputs.fingerprint
    steps = [event for event in events if event["event"] == "step"]
    # 22 images in steps of 8: 8, 8, 6, and the run ends with the step that reaches 48.
    assert [event["samples_seen"] for event in steps] == [8, 16, 22, 30, 38, 44, 52]
    assert [event["epoch"] for event in steps] == [0, 0, 0, 1, 1, 1, 2]
    assert [event["samples_seen"] for event in events if event["event"] == "validation"] == [
        0,
        30,
        52,
    ]
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["checkpoint"] for event in saved] == ["unbroken@30", "unbroken@52"]
    assert events[-1]["event"] == "finished"
    for event in saved:
        folder = unbroken.folder / event["folder"]
        ready = run_folder.read_ready(folder)
        assert ready.digest == event["digest"]
        assert ready.validation_loss == event["validation_loss"]
        assert load_pipeline_parts(folder, "cpu").family == "sdxl"
    assert run_folder.checkpoints(unbroken.folder) == [
        unbroken.folder / event["folder"] for event in saved
    ]


# Stop requests are asked for before each micro-batch of up to 3 samples: in the first step, inside
# a step, at the border of an epoch, just after a checkpoint.
@pytest.mark.parametrize(
    "stops",
    [
        (3, 5),
        (14, 1, 4),
        *(pytest.param(stops, marks=pytest.mark.slow) for stops in ((1,), (10, 10), (2, 2, 2, 2))),
    ],
)
def test_stop_and_resume_equals_an_unbroken_run_bit_for_bit(unbroken, make_run, train, stops):
    broken = make_run("broken")
    for stop_at in stops:
        assert train(broken, stop_at=stop_at) == "stopped"
        assert last(broken)["event"] == "stopped"
    assert train(broken) == "finished"
    assert history(broken, "step", "validation") == history(unbroken, "step", "validation")
    assert contents(broken, 52) == contents(unbroken, 52)


def test_a_stop_during_a_validation_saves_first_and_is_made_up_for(unbroken, make_run, train):
    broken = make_run("broken")

    def stop_at(number):
        """Of the 12 questions of a validation, after the first validation those of the next."""

        def prepare(trainer):
            asked = itertools.count(1)
            trainer.stop_requested = lambda: (
                trainer.state.clock.validation_owed and next(asked) == number
            )

        return prepare

    # In the one before the first step, in that at 30, again in the same, in the last one, again in
    # the same.
    for number, samples_seen in ((5, 0), (16, 30), (9, 30), (15, 52), (12, 52)):
        assert train(broken, prepare=stop_at(number)) == "stopped"
        assert last(broken)["samples_seen"] == samples_seen
        if samples_seen:
            assert run_folder.read_ready(
                run_folder.checkpoint_folder(broken.folder, samples_seen)
            ).validation_owed
    assert train(broken) == "finished"
    assert history(broken, "step", "validation") == history(unbroken, "step", "validation")
    lines = [
        [
            (event["samples_seen"], event["digest"], event["validation_loss"])
            for event in log
            if event["event"] == name
        ]
        for log, name in (
            (read_events(run.folder / run_folder.EVENTS), "checkpoint")
            for run in (broken, unbroken)
        )
    ]
    assert lines[0] == lines[1]
    for path in run_folder.checkpoints(unbroken.folder):
        expected, ready = (
            run_folder.read_ready(run.folder / "checkpoints" / path.name)
            for run in (unbroken, broken)
        )
        assert (
            dataclasses.replace(ready, run=expected.run, checkpoint=expected.checkpoint) == expected
        )


def lose_moments(path, state):
    state.clock = Clock(**json.loads((path / "state" / "clock.json").read_text()))


def lose_clock(path, state):
    original_restore(path, state)
    state.clock.step_in_epoch = 0


def lose_average(path, state):
    ema, state.ema = state.ema, None
    original_restore(path, state)
    state.ema = ema


original_restore = checkpoint.restore_state


@pytest.mark.parametrize("forget", [lose_moments, lose_clock, lose_average])
def test_a_resume_that_forgets_something_is_seen_to_differ(
    unbroken, make_run, train, monkeypatch, forget
):
    broken = make_run("broken")
    train(broken, stop_at=5)
    monkeypatch.setattr(checkpoint, "restore_state", forget)
    train(broken)
    samples_seen = last(broken)["samples_seen"]
    assert samples_seen != 52 or contents(broken, 52) != contents(unbroken, 52)


def test_torn_checkpoints_are_ignored_reported_and_written_again(unbroken, make_run, train):
    broken = make_run("broken")
    train(broken)
    newest, older = (run_folder.checkpoint_folder(broken.folder, samples) for samples in (52, 30))
    weights = newest / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (broken.folder / "checkpoints" / ".tmp-1-samples_000000052").mkdir()
    train(broken)
    resumed = next(
        event
        for event in read_events(broken.folder / run_folder.EVENTS)
        if event["event"] == "resumed"
    )
    assert resumed["checkpoint"] == "broken@30"
    (warning,) = [
        event
        for event in read_events(broken.folder / run_folder.EVENTS)
        if event["event"] == "warning"
    ]
    assert "diffusion_pytorch_model.safetensors has SHA-256" in warning["message"]
    assert not list((broken.folder / "checkpoints").glob(".tmp-*"))
    assert contents(broken, 52) == contents(unbroken, 52)

    (older / run_folder.READY).unlink()
    shutil.rmtree(newest)
    train(broken)
    assert read_events(broken.folder / run_folder.EVENTS)[-1]["event"] == "finished"
    assert contents(broken, 52) == contents(unbroken, 52)
    assert contents(broken, 30) == contents(unbroken, 30)


def test_what_is_whole_is_not_written_over(make_run, train):
    run = make_run(num_samples=8)
    train(run)
    folder = run_folder.checkpoint_folder(run.folder, 8)
    path, text = folder / run_folder.READY, (folder / run_folder.READY).read_text()
    ready = json.loads(text)
    for other in (
        {**ready, "format": 0},
        {**ready, "epochs": 3},
        {key: ready[key] for key in ready if key != "files"},
    ):
        path.write_text(json.dumps(other))
        with pytest.raises(
            TrainingError,
            match=rf"READY.json was written by another .* format {other['format']} with",
        ):
            train(run)
        assert json.loads(path.read_text()) == other
    del ready["validation_owed"]  # an older version's
    path.write_text(json.dumps(ready))
    assert train(run) == "finished"
    path.write_text(text[:-9])
    assert find_resumable(run.folder)[0] is None

    path.write_text(text)
    moved = (folder / run_folder.STATE).rename(run.folder / "moved")
    with pytest.raises(
        TrainingError, match=r"samples_000000008 is the newest whole checkpoint, but has no state/"
    ):
        train(run)
    moved.rename(folder / run_folder.STATE)
    snapshot = []
    train(run, prepare=lambda trainer: snapshot.append(Capture(trainer.state).copy()))
    with pytest.raises(WorkspaceError, match="never overwritten"):
        checkpoint.write(run.folder, *snapshot, run.config, run.inputs)
    assert run_folder.check_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "message"), [("run", "of run demo, .* run other"), ("base_digest", "from base model")]
)
def test_a_checkpoint_of_another_run_or_base_is_refused(make_run, train, key, message):
    run = make_run(num_samples=8)
    train(run)
    run.inputs = dataclasses.replace(run.inputs, **{key: "other"})
    with pytest.raises(TrainingError, match=message):
        train(run)


def test_older_checkpoints_keep_their_weights_and_a_true_ready_file(make_run, train):
    run = make_run(**{"checkpoints.every_samples": 8, "checkpoints.keep_last": 2})
    train(run)
    folders = run_folder.checkpoints(run.folder)
    assert [int(folder.name[8:]) for folder in folders] == [8, 16, 30, 38, 44, 52]
    assert [(folder / "state").exists() for folder in folders] == [False] * 4 + [True] * 2
    for folder in folders:
        ready = run_folder.read_ready(folder)
        present = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        assert {entry.name for entry in ready.files} <= present
        assert run_folder.check_checkpoint(folder) == ready
    (folders[-1] / "state" / "clock.json").unlink()
    with pytest.raises(DamageError, match=r"clock\.json is missing"):
        run_folder.check_checkpoint(folders[-1])


def test_only_what_the_config_names_is_trained(make_run, train):
    run = make_run(**{"train_text_encoder": True, "train_text_encoder_2": False})
    trained = {}
    train(run, prepare=lambda trainer: trained.update(trainer.state.parameters))
    before = load_pipeline_parts(run.inputs.base_model, "cpu")
    after = load_pipeline_parts(run_folder.checkpoint_folder(run.folder, 52), "cpu")
    for old, new in zip(
        before.text_encoders[1].parameters(), after.text_encoders[1].parameters(), strict=True
    ):
        assert torch.equal(old, new)
    changed = {
        name
        for name, old in before.text_encoders[0].named_parameters()
        if not torch.equal(old, after.text_encoders[0].get_parameter(name))
    }
    assert {f"text_encoder.{name}" for name in changed} == {
        name for name in trained if name.startswith("text_")
    }
    assert not any("layers.2" in name or "final_layer_norm" in name for name in trained)
    assert any("layers.1" in name for name in changed)
    # Every trained parameter takes part, so that none waits for a gradient that never comes.
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in trained.values()
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_text_encoder": False, "train_text_encoder_2": False}, set()),
        ({"train_text_encoder": True, "train_text_encoder_2": True}, {"1", "2"}),
        ({"train_text_encoder_2": True, "optimizer.text_encoder_learning_rate": 1e-3}, {"1", "2"}),
        ({"train_text_encoder_2": True, "optimizer.text_encoder_learning_rate": 0.0}, set()),
    ],
)
def test_text_encoders_train_only_when_asked(make_run, train, changes, expected):
    run = make_run(**changes, num_samples=8)
    trained = []
    train(run, prepare=lambda trainer: trained.extend(trainer.state.parameters))
    before = load_pipeline_parts(run.inputs.base_model, "cpu")
    after = load_pipeline_parts(run_folder.checkpoint_folder(run.folder, 8), "cpu")
    changed = {
        str(number)
        for number, (old, new) in enumerate(
            zip(before.text_encoders, after.text_encoders, strict=True), 1
        )
        if any(
            not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)
        )
    }
    assert changed == expected
    assert any(name.startswith("text_encoder") for name in trained) == bool(expected), (
        "what is frozen costs nothing"
    )


def test_fast_reduction_agrees_with_canonical(unbroken, make_run, train):
    run = make_run("fast", reduction="fast")
    train(run)
    pairs = zip(history(run, "step"), history(unbroken, "step"), strict=True)
    for fast, canonical in pairs:
        assert float.fromhex(fast["loss"]) == pytest.approx(
            float.fromhex(canonical["loss"]), abs=1e-6
        )


def test_bf16_autocast_stays_close_and_keeps_fp32_weights(unbroken, make_run, train):
    run = make_run("bf16", precision="bf16_amp")
    train(run)
    for half, full in zip(history(run, "step"), history(unbroken, "step"), strict=True):
        assert float.fromhex(half["loss"]) == pytest.approx(float.fromhex(full["loss"]), rel=0.03)
        assert half["loss"] != full["loss"]
    parts = load_pipeline_parts(run_folder.checkpoint_folder(run.folder, 52), "cpu")
    assert {parameter.dtype for parameter in parts.unet.parameters()} == {torch.float32}


def test_a_micro_batch_size_changes_only_rounding(unbroken, make_run, train):
    # One bucket at a time means other micro-batches make other steps, so all images go into one
    # step.
    losses = []
    for size in (1, 22):
        run = make_run(
            f"micro{size}", **{"batch.micro_batch_size": size, "batch.global_batch_size": 22}
        )
        train(run)
        losses.append([float.fromhex(event["loss"]) for event in history(run, "step")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def poison(trainer, bad_steps):
    """Make the loss of the named steps (counted from 1) not a number."""
    plain = trainer._losses

    def losses(*draw):
        value = plain(*draw)
        return value * math.nan if trainer.state.clock.step + 1 in bad_steps else value

    trainer._losses = losses


def test_a_step_that_is_not_finite_is_left_out_and_counted(make_run, train):
    run = make_run(**{"optimizer.schedule": "linear", "optimizer.warmup_samples": 0})
    weights, averaged = [], []

    def prepare(trainer):
        poison(trainer, {3, 4})
        skip, average = trainer._skip, trainer.state.ema.update

        def counted(shares, size, steps_before):
            averaged.append(steps_before)
            average(shares, size, steps_before)

        trainer.state.ema.update = counted

        def watched(*arguments):
            weights.append(trainer.state.parts.unet.conv_in.weight.detach().clone())
            skip(*arguments)

        trainer._skip = watched

    assert train(run, prepare=prepare) == "finished"
    assert torch.equal(*weights)
    assert averaged == [0, 1, 2, 3, 4], "the warm-up of the average counts steps that trained"
    steps = history(run, "step")
    assert [event["step"] for event in steps] == [1, 2, 5, 6, 7]
    assert steps[-1]["num_skipped"] == 2
    # The rate's clock leaves the 14 skipped samples out: step 5 is trained from sample 16 to 24.
    assert float.fromhex(steps[2]["learning_rate"]) == pytest.approx(1e-3 * (1 - 20 / 48))
    warnings = history(run, "warning")
    assert [warning["kind"] for warning in warnings] == ["not_finite", "not_finite"]
    assert [(warning["epoch"], warning["step_in_epoch"]) for warning in warnings] == [
        (0, 2),
        (1, 0),
    ]
    assert [len(warning["image_ids"]) for warning in warnings] == [6, 8]
    # Due at 24 samples: saved after the first finite step, since a resume does a row of skipped
    # ones again.
    assert [event["samples_seen"] for event in history(run, "checkpoint")] == [38, 52]


def test_a_gradient_that_is_not_finite_names_the_whole_batch(make_run, train):
    run = make_run(num_samples=16)

    def prepare(trainer):
        forward_and_backward = trainer._pass

        def overflow(*draw):
            losses = forward_and_backward(*draw)
            if trainer.state.clock.step == 1:
                trainer.state.arithmetic.gradients.flat[7] = math.inf
            return losses

        trainer._pass = overflow

    assert train(run, prepare=prepare) == "finished"
    (warning,) = history(run, "warning")
    assert "step 2 skipped: gradient not finite" in warning["message"]
    manifest = json.loads((run.folder / "epochs" / f"{warning['epoch']}.json").read_text())
    order = read_order(
        run.folder / "epochs" / manifest["order"]["file"], manifest["order"]["sha256"]
    )
    batch = np.concatenate(order.micro_batches(warning["step_in_epoch"]))
    assert warning["image_ids"] == run.rows["image_id"].gather(batch).to_list()
    assert warning["num_images"] == len(batch) == 8


def test_a_validation_that_is_not_finite_names_its_images_and_the_run_goes_on(make_run, train):
    run = make_run(num_samples=8)
    bad = []

    def prepare(trainer):
        plain = trainer._plain_losses
        bad.append(trainer.dataset.image_ids[trainer.dataset.validation_rows[2]])

        def losses(draw):
            values = plain(draw)
            if trainer.state.clock.validation_owed and trainer.state.clock.step:
                values[[image_id in bad for image_id in draw.batch.image_ids]] = math.nan
            return values

        trainer._plain_losses = losses

    assert train(run, prepare=prepare) == "finished"
    before, after = (
        event
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] == "validation"
    )
    for name in ("", "ema_"):
        assert before[f"{name}loss"] > 0
        assert after[f"{name}loss"] is None
        assert after[f"{name}stable_loss"] > 0
        assert after[f"{name}stable_weighted_loss"] > 0
        for view in ("t", "bucket"):
            values, good = after[f"{name}{view}"].values(), before[f"{name}{view}"].values()
            assert [value is None for value in values].count(True) == 1 < len(values)
            assert all(
                value > 0 for value in (*good, *(value for value in values if value is not None))
            )
    warnings = history(run, "warning")
    assert [(warning["kind"], warning["image_ids"]) for warning in warnings] == [
        ("not_finite", bad)
    ] * 2
    assert "loss of 1 of 5 held-out images not finite" in warnings[0]["message"]
    assert (
        run_folder.read_ready(run_folder.checkpoint_folder(run.folder, 8)).validation_loss is None
    )
    assert train(run) == "finished"


@pytest.mark.parametrize("precision", ["fp32", "fp16_amp"])
def test_eight_such_steps_in_a_row_end_the_run_with_the_last_good_state(make_run, train, precision):
    run = make_run(num_samples=200, precision=precision)
    with pytest.raises(TrainingError, match="saved at 16 samples"):
        train(run, prepare=lambda trainer: poison(trainer, range(3, 100)))
    good = make_run("good", num_samples=200, precision=precision)

    def prepare(trainer):
        trainer.stop_requested = lambda: trainer.state.clock.step == 2

    assert train(good, prepare=prepare) == "stopped"
    assert contents(run, 16) == contents(good, 16)


def test_a_stop_in_a_row_of_skipped_steps_does_not_break_the_guard(make_run, train, monkeypatch):
    monkeypatch.setattr("training.loop.trainer.MAX_SKIPPED_IN_ROW", 4)
    run = make_run(num_samples=200, **{"validation.every_samples": 1000})

    def stop_in_row(trainer):
        poison(trainer, range(3, 100))
        trainer.stop_requested = lambda: trainer.state.clock.step == 5

    assert train(run, prepare=stop_in_row) == "stopped"
    assert last(run)["samples_seen"] == 16
    for _ in range(2):
        with pytest.raises(
            TrainingError,
            match=r"saved at 16 samples\. Begin another run .*samples_000000016\" in foundry",
        ):
            train(run, prepare=lambda trainer: poison(trainer, range(3, 100)))
        assert len(history(run, "warning")) == 4
    assert [folder.name for folder in run_folder.checkpoints(run.folder)] == ["samples_000000016"]


def test_a_run_without_a_good_step_says_so(make_run, train, monkeypatch):
    monkeypatch.setattr("training.loop.trainer.MAX_SKIPPED_IN_ROW", 2)
    run = make_run(num_samples=200)
    with pytest.raises(TrainingError, match="none was good, so begin another run"):
        train(run, prepare=lambda trainer: poison(trainer, range(100)))
    assert run_folder.checkpoints(run.folder) == []


def test_a_tiny_model_overfits_one_batch(make_run):
    run = make_run(
        **{
            "batch.global_batch_size": 4, "batch.micro_batch_size": 4, "optimizer.learning_rate": 1e-2,
            "optimizer.schedule": "constant", "loss.weighting": "plain", "loss.watermark_weight": 1.0,
            "optimizer.weight_decay": 0, "optimizer.ema_half_life_samples": 0,
        }
    )  # fmt: skip
    trainer = Trainer(
        folder=run.folder,
        config=run.config,
        inputs=run.inputs,
        ranks=Ranks(),
        log=None,
        stop_requested=lambda: False,
    )
    rows = trainer.order.micro_batches(0)
    assert len(rows) >= 1
    fixed = {tuple(own.tolist()): trainer._draw(own) for own in rows}
    losses = []
    trainer.log.step = lambda *_, loss, **__: losses.append(loss)
    for _ in range(70):
        trainer.state.clock.step_in_epoch = 0
        with Prefetch(lambda own: fixed[tuple(own.tolist())], rows, trainer.worker, 2) as draws:
            trainer._step(draws)
    print([round(x, 3) for x in losses[::10]])
    assert losses[0] > 0.8
    assert np.mean(losses[-5:]) < 0.01


def test_an_epoch_is_not_finished_by_a_version_that_makes_other_prompts(
    make_run, train, monkeypatch
):
    run = make_run()
    assert train(run, stop_at=4) == "stopped"
    monkeypatch.setattr("training.loop.epochs.PROMPTS_VERSION", 999)
    with pytest.raises(DamageError, match="by a version that makes other prompts"):
        train(run)
