"""What is forgotten leaves sets, latents and epochs; runs that saw it stay readable and go on only
when told to."""

import fcntl
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import build_run

from resources.operations.forget import forget
from resources.workspace.setup import leave_out_forgotten
from resources.workspace.store import Store
from training.commit import lock
from training.errors import ConfigError, DataError, LockedError
from training.latents.generations import read_generation
from training.loop.order import EpochOrder, leave_out, read_order
from training.manifests import read_manifest
from training.prompts.samples import Samples
from training.runs import bundle, run_folder
from training.runs.event_log import read_events
from training.runs.training_set import blank, count_forgotten


def resumed(run, train):
    run.inputs = run_folder.read_inputs(run.folder)
    return train(run)


def losses(run):
    return [
        event["loss"]
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] == "step"
    ]


def victim(run, split="train", shard="s000000"):
    return run.rows.filter((pl.col("split") == split) & (pl.col("shard") == shard))["image_id"][0]


def vectors(run):
    """Latents of every image of the run's shards by id, as they lie on disk."""
    found = {}
    for folder in sorted(run.inputs.latents.iterdir()):
        generation = read_generation(folder, 1)
        files = generation.open_files()
        for row in generation.table().iter_rows(named=True):
            mean, spread = files[row["file"]].gather([row["row"]])
            found[row["image_id"]] = (mean.tobytes(), spread.tobytes())
    return found


def test_latents_of_other_images_stay_what_they_are(make_run):
    run = make_run()
    before, gone = vectors(run), victim(run)
    store = Store(run.folder.parents[1])
    old = {path.name for path in run.inputs.latents.rglob("g0001*")}
    done = forget(store, [gone])
    assert done["generations"] == ["s000000 g0001"]
    assert vectors(run) == {
        image_id: found for image_id, found in before.items() if image_id != gone
    }
    named = {
        entry.name
        for path in run.inputs.latents.rglob("*.json")
        for entry in read_manifest(path).files
    }
    kept = {path.name for path in run.inputs.latents.rglob("g0001*")} - {"g0001.json"}
    assert kept == named
    assert old - kept, "the files that held it are deleted"
    assert forget(store, [gone])["generations"] == [], "the same call again has nothing to do"


def test_a_frozen_set_keeps_the_id_alone(make_run):
    run = make_run()
    gone = victim(run)
    forget(Store(run.folder.parents[1]), [gone])
    inputs = run_folder.read_inputs(run.folder)
    frame = pl.read_parquet(run_folder.checked_training_set(inputs))
    (row,) = frame.filter(pl.col("image_id") == gone).iter_rows(named=True)
    kept = {
        "image_id": gone,
        "shard": "s000000",
        "split": "forgotten",
        "stable": False,
        "tags": [],
        "words": [],
        "boxes": [],
    }
    assert row == dict.fromkeys(frame.columns) | kept
    assert frame.filter(pl.col("image_id") != gone).equals(
        run.rows.filter(pl.col("image_id") != gone)
    )
    assert not run.inputs.training_set.exists()
    assert inputs.fingerprint == run.inputs.fingerprint, "the name of what it was trained on"
    samples = Samples(inputs.training_set)
    number = list(samples.image_ids).index(gone)
    assert samples.forgotten.nonzero()[0].tolist() == [number]
    assert number not in samples.train_rows


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_resume_refuses_and_goes_on_without_it_when_told_to(make_run, train, split):
    run = make_run(num_samples=60)
    assert train(run, stop_at=5) == "stopped"
    store, gone = Store(run.folder.parents[1]), victim(run, split)
    done = forget(store, [gone])
    assert (done["runs"], done["unfinished"]) == (["demo"], ["demo"])
    with pytest.raises(
        DataError,
        match=r"run demo: 1 images of its training set were forgotten .*--without-forgotten",
    ):
        resumed(run, train)
    assert leave_out_forgotten(store, "demo") == 1
    seen = []

    def watch(trainer):
        make = trainer.dataset.batch
        trainer.dataset.batch = lambda rows, epoch: (
            made := make(rows, epoch),
            seen.extend(made.image_ids),
        )[0]

    run.inputs = run_folder.read_inputs(run.folder)
    assert train(run, prepare=watch) == "finished"
    assert gone not in seen
    assert set(run.rows["image_id"]) - {gone} == set(seen), "its second epoch sees all others"
    assert read_events(run.folder / run_folder.EVENTS)[-1]["samples_seen"] >= 60
    other = victim(run, shard="s000001")
    forget(store, [other])
    with pytest.raises(DataError, match="2 images of its training set"):
        resumed(run, train)


def test_a_step_all_of_whose_images_were_forgotten_is_passed(make_run, train):
    run = make_run(**{"num_samples": 24, "batch.global_batch_size": 1, "batch.micro_batch_size": 1})
    assert train(run, stop_at=5) == "stopped"
    epoch = run.folder / run_folder.EPOCHS
    order = read_order(
        epoch / "0.npz", json.loads((epoch / "0.json").read_text())["order"]["sha256"]
    )
    store, row = Store(run.folder.parents[1]), int(order.samples[10])
    forget(store, [run.rows["image_id"][row]])
    leave_out_forgotten(store, "demo")
    assert resumed(run, train) == "finished"
    assert len(losses(run)) == 24


def test_a_run_that_never_saw_it_goes_on_to_the_same_bits(
    make_run, train, tiny_sdxl, tmp_path, unbroken
):
    seen = make_run("seen")  # writes latents of all images
    rows = seen.rows.filter(pl.col("image_id") != victim(seen))
    run = build_run(tmp_path, tiny_sdxl, "unseen", {}, rows=rows)
    control = build_run(tmp_path / "control", tiny_sdxl, "unseen", {}, rows=rows)
    assert train(control) == "finished"
    assert train(run, stop_at=5) == "stopped"
    assert forget(Store(tmp_path), [victim(seen)])["runs"] == ["seen"]
    assert resumed(run, train) == "finished"
    assert losses(run) == losses(control)


def test_a_run_in_training_keeps_its_images(make_run):
    run = make_run()
    with (run.folder / run_folder.LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            ConfigError, match="run demo is being trained on one of these images: stop it"
        ):
            forget(Store(run.folder.parents[1]), [victim(run)])
    assert vectors(run).keys() == set(run.rows["image_id"])


def test_a_run_that_was_away_meanwhile_is_adopted_with_the_set_that_forgot(make_run, tmp_path):
    run = make_run()
    bundle.write_bundle(run.folder, tmp_path / "bundle")
    forget(Store(run.folder.parents[1]), [victim(run)])
    now = run_folder.read_inputs(run.folder)
    back = tmp_path / "bundle" / "runs" / "demo" / run_folder.INPUTS
    values = json.loads(back.read_text())
    (run.folder / run_folder.INPUTS).write_text(json.dumps(values))
    places = {
        "training_sets": now.training_set.parent,
        "latents": now.latents,
        "base_model": now.base_model,
    }
    assert run_folder.adopt(run.folder, vae=None, **places)
    assert run_folder.read_inputs(run.folder).training_set == now.training_set
    run_folder.checked_training_set(run_folder.read_inputs(run.folder))
    assert count_forgotten(now.training_set) == 1


@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_order_without_some_rows_keeps_all_others_in_their_steps(sizes, seed):
    micros = [size for step in sizes for size in step]
    order = EpochOrder(
        samples=np.random.default_rng(seed).permutation(sum(micros)).astype(np.int32),
        micro_starts=np.concatenate([[0], np.cumsum(micros)]),
        step_starts=np.concatenate([[0], np.cumsum([len(step) for step in sizes])]),
    )
    out = np.random.default_rng(seed).random(sum(micros)) < 0.4
    shorter = leave_out(order, out)
    assert shorter.num_steps == order.num_steps
    for step in range(order.num_steps):
        expected = [
            [row for row in micro if not out[row]]
            for micro in map(np.ndarray.tolist, order.micro_batches(step))
        ]
        assert [micro.tolist() for micro in shorter.micro_batches(step)] == [
            micro for micro in expected if micro
        ]


def test_what_no_manifest_names_goes_too(make_run):
    """Sets of earlier selections, unfinished batches, and what `verify --repair` put aside,
    readable or not."""
    run = make_run()
    home, gone = run.folder.parents[1], victim(run)
    others = run.rows.filter(pl.col("image_id") != gone)
    stale = [
        home / "tables" / "tags" / "old.parquet",
        home / "tables" / "tags" / "s.partial" / "x" / "0.parquet",
    ]
    folder = home / "quarantine" / "now" / "latents" / "tiny" / "s000000"
    stale += [
        folder / "g0001-aaaa.parquet",
        folder / "g0001-8x8-bbbb.safetensors",
        folder / "g0001.json",
    ]
    kept = [home / "tables" / "tags" / "other.parquet", folder / "g0002-8x8-bbbb.safetensors"]
    for path in (*stale, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            (others if path in kept else run.rows).select("image_id").write_parquet(path)
        else:
            path.write_bytes(b"bytes")
    torn = home / "quarantine" / "now" / "torn.parquet"
    torn.write_bytes(b"PAR1")
    forget(Store(home), [gone])
    assert [path for path in (*stale, torn) if path.exists()] == []
    assert all(path.exists() for path in kept)


def test_forgetting_waits_for_no_foundry_run(make_run):
    run = make_run()
    home = run.folder.parents[1]
    with (
        lock(home / "locks" / "foundry-run.lock", "x"),
        pytest.raises(LockedError, match="`foundry run` in"),
    ):
        forget(Store(home), [victim(run)])
    assert not (home / "forget.txt").exists()


def test_blanking_a_set_without_the_image_changes_nothing(make_run):
    rows = make_run().rows
    assert blank(rows, ["0" * 64]).equals(rows)
