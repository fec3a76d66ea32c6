"""Which generation is read, and latent files that arrive while training goes on."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import polars as pl
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from training import commit, manifests
from training.errors import DamageError, DataError
from training.latents.source import LatentSource
from training.loop.order import assign_windows, make_order
from training.runs import run_folder
from training.runs.event_log import read_events


class SlowFileSystem(LocalFileSystem):
    """A disk far away: `slow:///path`. Latent files wait for `gate`; `asked` lists them in
    order."""

    protocol = "slow"
    cachable = False
    gate = threading.Event()
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).replace("slow://", ""))

    def get_file(self, path, local, **kwargs):
        if str(path).endswith(".safetensors"):
            self.asked.append(str(path).rpartition("/")[2])
            self.gate.wait()
        shutil.copyfile(path, local)


@pytest.fixture(autouse=True)
def slow():
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    SlowFileSystem.gate.set()
    SlowFileSystem.asked.clear()


def rows_of(run, shard, start=0):
    return run.rows.filter(pl.col("shard") == shard)[start:]


def test_latents_of_another_vae_are_passed_over(make_run, write_generation, other_vae):
    run = make_run()
    other_vae(run)
    rows = rows_of(run, "s000000")
    write_generation(run.inputs.latents / "s000000", 2, rows)
    path = run.inputs.latents / "s000000" / "g0002.json"
    manifests.commit_manifest(
        path, dataclasses.replace(manifests.read_manifest(path), models={"vae": "e" * 64})
    )
    ids, digest = rows["image_id"].to_list(), run.inputs.vae_digest
    assert LatentSource(run.inputs.latents).choose("s000000", ids)[0].number == 2
    chosen, _, notes = LatentSource(run.inputs.latents, vae_digest=digest).choose("s000000", ids)
    assert chosen.number == 1
    assert notes == [f"s000000 g0002 was encoded with VAE {'e' * 16}, the run's is {digest[:16]}"]


def test_the_highest_generation_that_holds_all_images_is_chosen(make_run, write_generation):
    run = make_run()
    folder = run.inputs.latents / "s000000"
    write_generation(folder, 2, rows_of(run, "s000000", 3))
    (folder / "g0011-abcdefgh.parquet").write_bytes(b"no manifest names me")
    ids = rows_of(run, "s000000")["image_id"].to_list()
    source = LatentSource(run.inputs.latents)
    assert [source.choose("s000000", wanted)[0].number for wanted in (ids, ids[3:])] == [1, 2]
    assert source.choose("s000000", [*ids, "x", "y"])[:2] == (None, 2)
    assert source.choose("nowhere", ["a", "b"]) == (None, 2, [])


def test_a_generation_whose_files_are_not_all_there_is_passed_over_and_named(
    make_run, write_generation
):
    """As while a plain copy is under way in whatever order: the one before it is read until the
    last byte is there."""
    run = make_run()
    manifest = write_generation(run.inputs.latents / "s000000", 2, rows_of(run, "s000000"))
    ids = rows_of(run, "s000000")["image_id"].to_list()
    source = LatentSource(run.inputs.latents)
    for entry in manifest.files:
        path = run.inputs.latents / "s000000" / entry.name
        whole = path.read_bytes()
        for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(b"")):
            damage(path)
            chosen, missing, notes = source.choose("s000000", ids)
            assert (chosen.number, missing) == (1, 0)
            assert len(notes) == 1
            assert entry.name in notes[0]
        path.write_bytes(whole)
    assert source.choose("s000000", ids)[0].number == 2


def test_a_changed_table_is_damage(make_run):
    run = make_run()
    folder = run.inputs.latents / "s000000"
    manifest = json.loads((folder / "g0001.json").read_text())
    name = next(entry["name"] for entry in manifest["files"] if entry["name"].endswith(".parquet"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DamageError, match=name):
        LatentSource(run.inputs.latents).choose("s000000", ["a"])


def test_a_run_on_fetched_latents_equals_one_on_its_own(make_run, train):
    here = make_run("here")
    assert train(here) == "finished"
    away = make_run("away", latents_url=f"slow://{here.inputs.latents}")
    shutil.rmtree(away.folder / run_folder.FETCHED, ignore_errors=True)
    assert train(away) == "finished"

    def digests(run):
        return [
            event["digest"]
            for event in read_events(run.folder / run_folder.EVENTS)
            if event["event"] == "checkpoint"
        ]

    assert digests(here) == digests(away)
    fetched = sorted(
        path.name for path in (away.folder / run_folder.FETCHED).glob("*/*.safetensors")
    )
    assert (
        fetched
        == sorted(set(SlowFileSystem.asked))
        == sorted(p.name for p in here.inputs.latents.glob("*/*.safetensors"))
    )
    assert len(SlowFileSystem.asked) == len(fetched), "no file was fetched twice"


def test_files_arrive_in_the_order_of_training_while_it_goes_on(make_run):
    from training.curation.vocabulary import Vocabulary
    from training.loop.dataset import Dataset
    from training.loop.epochs import open_epoch, prepare_epoch

    run = make_run(latents_url="slow://somewhere", **{"batch.shards_at_a_time": 1})
    source = LatentSource(run.folder / run_folder.FETCHED, f"slow://{run.inputs.latents}")
    dataset = Dataset(run.rows, Vocabulary(), source, run.config, (), 0.13025)
    dataset.count_chunks = lambda rows, epoch: np.ones(len(rows), dtype=np.int64)
    SlowFileSystem.gate.clear()
    prepare_epoch(run.folder, 0, dataset, run.config, "f")
    order = open_epoch(run.folder, 0, 0, dataset)
    arrived = list((run.folder / run_folder.FETCHED).glob("*/*.safetensors"))
    assert arrived == [], "an epoch opens when all manifests are there, and none of the files"
    waiting = threading.Thread(
        target=dataset._gather, args=(order.samples[-1:], [dataset.image_ids[order.samples[-1]]], 0)
    )
    waiting.start()
    SlowFileSystem.gate.set()
    waiting.join()
    source._thread.join()
    numbers = dataset._places[
        np.concatenate([dataset.validation_rows, dataset.stable_rows, order.samples]), 0
    ]
    wanted = [dataset._files[number][1].name for number in dict.fromkeys(numbers.tolist())]
    urgent = dataset._files[dataset._places[order.samples[-1], 0]][1].name
    assert [name for name in SlowFileSystem.asked if name != urgent] == [
        name for name in wanted if name != urgent
    ]
    assert sorted(SlowFileSystem.asked) == sorted(wanted)
    source.close()


def test_a_fetched_file_has_been_checked_on_its_way(make_run, monkeypatch):
    run, whole, hashed = make_run(), commit.sha256_file, []

    def watched(path):
        if path.is_relative_to(run.folder):  # an earlier test's thread may still be at its own
            hashed.append(path)
        return whole(path)

    monkeypatch.setattr(commit, "sha256_file", watched)
    for attempt in range(2):  # what an earlier process has fetched is checked again
        source = LatentSource(run.folder / run_folder.FETCHED, f"slow://{run.inputs.latents}")
        chosen, _, _ = source.choose("s000000", rows_of(run, "s000000")["image_id"].to_list())
        entries = [entry for entry in chosen.manifest.files if entry.name.endswith(".safetensors")]
        hashed.clear()
        source.prefetch([("s000000", entry) for entry in entries])
        source._thread.join()
        for entry in entries:
            source.open("s000000", entry).gather([0])
        assert len(hashed) == len(entries)
        assert {path.name in {entry.name for entry in entries} for path in hashed} == {attempt == 1}


def test_a_damaged_or_unknown_source_is_named(make_run, train):
    run = make_run()
    victim = next((run.inputs.latents / "s000001").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    source = LatentSource(run.folder / run_folder.FETCHED, f"slow://{run.inputs.latents}")
    chosen, _, _ = source.choose("s000001", rows_of(run, "s000001")["image_id"].to_list())
    entry = next(entry for entry in chosen.manifest.files if entry.name == victim.name)
    with pytest.raises(DamageError, match=rf"{victim.name} has SHA-256 .* its manifest says"):
        source.fetch("s000001", entry)
    assert len(SlowFileSystem.asked) == 3
    assert not list((run.folder / run_folder.FETCHED / "s000001").glob("*.safetensors"))
    for url in ("slow:///no/such/folder", "nonsense://x"):
        with pytest.raises(DataError, match=url):
            LatentSource(run.folder, url)


@given(
    shards=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60),
    at_a_time=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_in_windows_touches_few_shards_at_a_time(shards, at_a_time, epoch):
    windows = assign_windows(shards, seed=1, epoch=epoch, shards_at_a_time=at_a_time)
    order = make_order(
        np.zeros((len(shards), 2), dtype=np.int64), np.ones(len(shards), dtype=np.int64), seed=1, epoch=epoch,
        micro_batch_size=3, global_batch_size=5, windows=windows,
    )  # fmt: skip
    assert sorted(order.samples.tolist()) == list(range(len(shards)))
    seen = windows[order.samples]
    assert (np.diff(seen) >= 0).all()
    for window in np.unique(windows):
        assert len({shards[row] for row in np.flatnonzero(windows == window)}) <= at_a_time
    assert assign_windows(shards, seed=1, epoch=epoch, shards_at_a_time=0) is None


COPIER = """
# Another machine: encodes two generations in a folder of its own and copies each as it is done, manifest last.
import json, shutil, sys, time
from pathlib import Path
import polars as pl
sys.path.insert(0, sys.argv[1])
from tiny_runs import commit_generation
away, here, rows, events = (Path(name) for name in sys.argv[2:])
table = pl.read_parquet(rows)
shard = "s000000"
for number in (2, 3):
    manifest = commit_generation(away / shard, number, table.filter(pl.col("shard") == shard))
    for entry in manifest.files:
        shutil.copy(away / shard / entry.name, here / shard / entry.name)
    shutil.copy(away / shard / f"g{number:04d}.json", here / shard / f"g{number:04d}.json")
    while not any(json.loads(line).get("generations", {}).get(shard) == number
                  for line in events.read_text().splitlines() if line.endswith("}")):
        time.sleep(0.05)
"""


def test_a_trainer_takes_up_what_another_machine_copies_beside_it(make_run, tmp_path):
    """Two processes and a plain copy between their folders; the run spans three generations and its
    log names them."""
    run = make_run("long", num_samples=1_000_000, **{"validation.every_samples": 1_000_000})
    events = run.folder / run_folder.EVENTS
    trainer, copier = (
        subprocess.Popen([sys.executable, "-m", "training.loop.run", run.folder]),
        None,
    )
    try:
        wait_for(lambda: any(event["event"] == "epoch" for event in read_events(events)), trainer)
        arguments = [
            Path(__file__).parents[1] / "tools",
            tmp_path / "away",
            run.inputs.latents,
            run.inputs.training_set,
            events,
        ]
        copier = subprocess.Popen([sys.executable, "-c", COPIER, *map(str, arguments)])
        wait_for(lambda: copier.poll() is not None, trainer)
        assert copier.returncode == 0
    finally:
        trainer.terminate()
        trainer.wait()
        if copier is not None:
            copier.kill()
            copier.wait()
    log = read_events(events)
    taken = [event["generations"]["s000000"] for event in log if event["event"] == "epoch"]
    assert sorted(set(taken)) == [1, 2, 3]
    assert taken == sorted(taken)
    assert {event["generations"]["s000001"] for event in log if event["event"] == "epoch"} == {1}
    assert log[-1]["event"] == "stopped"
    # The epoch's own file says the same, with the digest of what was read.
    for event in log:
        if event["event"] == "epoch":
            written = json.loads(
                (run.folder / run_folder.EPOCHS / f"{event['epoch']}.json").read_text()
            )
            assert {shard: pin["generation"] for shard, pin in written["latents"].items()} == event[
                "generations"
            ]


def wait_for(condition, trainer):
    """Wait for as long as the trainer lives: a loaded machine has no deadline but pytest's own."""
    while not condition():
        assert trainer.poll() is None, "the trainer has ended"
        time.sleep(0.05)
