"""Which latents are encoded anew first, and which are removed: never what a run may still read."""

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from jobs import bundles
from resources.warehouse import query
from resources.workspace import generations
from resources.workspace.store import Store
from training.runs import run_folder
from training.runs.event_log import read_events


@pytest.fixture
def store(make_run, tmp_path):
    """A workspace whose only latents are the tiny run's: encoding `tiny`, two shards, generation
    1."""
    run = make_run()
    toml = tmp_path / "foundry.toml"
    toml.write_text('format = 1\n[encodings.tiny]\ncrop = "random"\n')
    store = Store(tmp_path)
    assert store.tables.parts("latents") == ["tiny|s000000", "tiny|s000001"]
    return run, store


def add(run, write_generation, shard, number, start=0):
    rows = run.rows.filter(pl.col("shard") == shard)[start:]
    return write_generation(run.inputs.latents / shard, number, rows)


def numbers(store):
    return sorted((item.shard, item.generation) for item in generations.listed(store))


def test_the_oldest_come_first_and_the_young_stay(store, write_generation):
    run, store = store
    add(run, write_generation, "s000000", 5)  # 5 January; s000001 has that of the 1st
    assert [item.part for item in generations.oldest(store)] == ["tiny|s000001", "tiny|s000000"]
    assert [item.generation for item in generations.oldest(store)] == [1, 5]
    assert [item.part for item in generations.oldest(store, num_shards=1)] == ["tiny|s000001"]
    age = (datetime.now(UTC) - datetime(2026, 1, 3, tzinfo=UTC)) / timedelta(seconds=1)
    assert [item.part for item in generations.oldest(store, min_age_s=age)] == ["tiny|s000001"]
    assert generations.oldest(store, "other") == []
    shown = generations.table(store).select("shard", "generation", "current").rows()
    assert shown == [("s000000", 1, False), ("s000000", 5, True), ("s000001", 1, True)]


def test_only_what_was_replaced_some_time_ago_is_removed(store, write_generation):
    run, store = store
    run.folder.joinpath(run_folder.INPUTS).unlink()
    add(run, write_generation, "s000000", 2)
    folder = run.inputs.latents / "s000000"
    assert generations.collect(store) == ([], 0), "a trainer may be choosing just now"
    past = time.time() - generations.GRACE_S - 1
    os.utime(folder / "g0002.json", (past, past))
    before = {path.name for path in folder.iterdir()}
    removed, num_bytes = generations.collect(store)
    assert [path.name for path in removed] == ["g0001.json"]
    assert num_bytes > 0
    gone = before - {path.name for path in folder.iterdir()}
    assert all(name.startswith("g0001") for name in gone)
    assert len(gone) > 2
    assert numbers(store) == [("s000000", 2), ("s000001", 1)]


def test_a_file_that_two_generations_name_stays(store, write_generation):
    run, store = store
    run.folder.joinpath(run_folder.INPUTS).unlink()
    folder = run.inputs.latents / "s000000"
    manifest = json.loads((folder / "g0001.json").read_text())
    shutil.copy(folder / "g0001.json", folder / "g0002.json")
    removed, _ = generations.collect(store, min_age_s=0)
    assert [path.name for path in removed] == ["g0001.json"]
    assert all((folder / entry["name"]).is_file() for entry in manifest["files"])


def test_what_an_unfinished_run_may_read_again_stays_until_it_has_finished(
    store, write_generation, train
):
    run, store = store

    # 22 training samples an epoch, 48 in all: stopped in the second epoch, after the checkpoint at
    # 24.
    def renew(trainer):
        for number in (2, 3):
            add(run, write_generation, "s000000", number)

    assert train(run, stop_at=11, prepare=renew) == "stopped"
    generations_seen = [
        event["generations"]
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] == "epoch"
    ]
    assert generations_seen == [{"s000000": 1, "s000001": 1}, {"s000000": 3, "s000001": 1}]
    add(run, write_generation, "s000000", 4)
    assert {pin["s000000"]["generation"] for pin in run_folder.pinned_latents(run.folder)} == {3}
    generations.collect(store, min_age_s=0)
    # 3 is pinned by the epoch of the last checkpoint; 1 and 2 belong to no epoch that can come
    # back.
    assert numbers(store) == [("s000000", 3), ("s000000", 4), ("s000001", 1)]
    assert train(run) == "finished"
    generations.collect(store, min_age_s=0)
    assert numbers(store) == [("s000000", 4), ("s000001", 1)]


def test_an_older_generation_stays_for_a_set_that_the_newer_ones_do_not_cover(
    store, write_generation
):
    run, store = store
    add(run, write_generation, "s000000", 2, start=2)
    generations.collect(store, min_age_s=0)
    assert numbers(store) == [("s000000", 1), ("s000000", 2), ("s000001", 1)]


def test_what_a_bundle_took_along_stays_until_the_run_has_finished(
    store, write_generation, train, monkeypatch, tmp_path
):
    """The run pins generation 1 on the other machine; here it becomes the last but one
    meanwhile."""
    run, store = store
    monkeypatch.setattr(bundles.pipeline, "bring_up_to_date", lambda *_, **__: [])
    bundles.write(store.home, run.folder.name, tmp_path / "bundle", started=lambda *_: None)
    add(run, write_generation, "s000000", 2)
    generations.collect(store, min_age_s=0)
    assert numbers(store) == [("s000000", 1), ("s000000", 2), ("s000001", 1)]

    home, run.folder = run.folder, tmp_path / "bundle" / "runs" / run.folder.name
    assert train(run, stop_at=5) == "stopped"
    shutil.copytree(run.folder, home, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "bundle")
    run.folder = home
    run_folder.write_inputs(home, run.inputs)
    generations.collect(store, min_age_s=0)
    assert train(run) == "finished"
    generations.collect(store, min_age_s=0)
    assert numbers(store) == [("s000000", 2), ("s000001", 1)]


def test_sql_tells_the_shards_of_latents_apart(store):
    run, workspace = store
    found = query(workspace, "select encoding, shard, image_id from latents order by all")
    expected = run.rows.select(encoding=pl.lit("tiny"), shard="shard", image_id="image_id").sort(
        pl.all()
    )
    assert found.rows() == expected.rows()
