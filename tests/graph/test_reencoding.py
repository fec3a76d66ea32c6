"""Latents are encoded anew while nothing else is, and what is there already is not encoded
twice."""

import shutil
from datetime import UTC, datetime

import dagster as dg
import polars as pl
import pytest
from graph_tools import foundry

from jobs import encode, schedules
from resources.instance import instance as open_instance
from resources.workspace.store import Store
from training.latents.generations import read_generation

PLACEMENT = ["image_id", "crop_top", "crop_left"]


def generation(home, number):
    return read_generation(home / "latents" / "sdxl" / "s000000", number)


def test_the_next_generation_crops_anew_and_makes_nothing_stale(small_copy):
    done = foundry("latents", "reencode", "--home", small_copy, "--shards", "1")
    assert "encoded anew: sdxl|s000000" in done.stdout
    first, second = (generation(small_copy, number).table().sort("image_id") for number in (1, 2))
    assert first["image_id"].to_list() == second["image_id"].to_list()
    assert second["encoded_in"].unique().to_list() == [2]
    assert first.select(PLACEMENT).rows() != second.select(PLACEMENT).rows()
    assert "nothing was done" in foundry("run", "--home", small_copy).stdout
    shown = foundry(
        "sql",
        "--home",
        small_copy,
        "--format",
        "csv",
        "select generation, current from latent_generations",
    )
    assert shown.stdout.split() == ["generation,current", "1,false", "2,true"]
    assert "0 damaged, 0 orphans" in foundry("verify", "--home", small_copy).stdout
    # The same pass again would be the same: crops are keyed by generation.
    other = small_copy.parent / "other"
    shutil.copytree(small_copy, other, symlinks=True)
    (other / "latents" / "sdxl" / "s000000" / "g0002.json").unlink()
    foundry("latents", "reencode", "--home", other)
    assert (
        generation(other, 2)
        .table()
        .select(PLACEMENT)
        .equals(generation(small_copy, 2).table().select(PLACEMENT))
    )
    refused = foundry("latents", "reencode", "--home", small_copy, "--encoding", "sd1", check=False)
    assert refused.returncode == 2
    assert "foundry.toml has no [encodings.sd1]; there are: sdxl" in refused.stderr


def test_a_changed_selection_copies_what_is_encoded_already(small_copy):
    before = generation(small_copy, 1)
    dropped = before.table()["image_id"].sort()[0]
    foundry("forget", "--home", small_copy, "0" * 64)  # an id that is not there changes nothing
    config = small_copy / "foundry.toml"
    tall = (
        before.table()
        .select((before.table()["original_height"] / before.table()["original_width"]).max())
        .item()
    )
    config.write_text(config.read_text().replace("max_aspect = 4.0", f"max_aspect = {tall - 0.01}"))
    foundry("run", "--home", small_copy, "--select", "latents")
    after = generation(small_copy, 2)
    numbers = after.manifest.report["numbers"]
    assert 0 < after.manifest.rows < before.manifest.rows
    assert numbers["copied from the generation before"] == after.manifest.rows
    assert "precision" not in numbers, "no VAE was loaded"
    assert after.table()["encoded_in"].unique().to_list() == [1]
    assert dropped  # rows are compared bit for bit below
    old, new = before.open_files(), after.open_files()
    was = {row["image_id"]: row for row in before.table().iter_rows(named=True)}
    for row in after.table().iter_rows(named=True):
        mean, spread = new[row["file"]].gather([row["row"]])
        old_mean, old_spread = old[was[row["image_id"]]["file"]].gather(
            [was[row["image_id"]]["row"]]
        )
        assert (mean == old_mean).all()
        assert (spread == old_spread).all()
        assert {key: row[key] for key in row if key not in ("file", "row")} == {
            key: was[row["image_id"]][key] for key in row if key not in ("file", "row")
        }
    config.write_text(config.read_text().replace('crop = "random"', 'crop = "centre"'))
    foundry("run", "--home", small_copy, "--select", "latents")
    assert (
        generation(small_copy, 3).manifest.report["numbers"]["copied from the generation before"]
        == 0
    )


def test_images_that_keep_their_size_are_encoded_as_they_were_assigned(small_copy):
    config = small_copy / "foundry.toml"
    own = 'plan = "kohya"\narea = 4_194_304\nno_upscale = true'
    config.write_text(config.read_text().replace('plan = "bigasp_v1"', own))
    foundry("run", "--home", small_copy, "--select", "latents")
    store, sides = (
        Store(small_copy),
        ["image_id", "resized_height", "resized_width", "bucket_height", "bucket_width"],
    )
    assigned = store.read("bucket_assignments", sides, ["sdxl"]).sort("image_id")
    encoded = store.read("latents", sides, ["sdxl|s000000"]).sort("image_id")
    assert encoded.rows() == assigned.rows()
    both = (pl.col("resized_height") > pl.col("bucket_height")) & (
        pl.col("resized_width") > pl.col("bucket_width")
    )
    assert encoded.filter(both).height > 0, "some are cut along both sides"


@pytest.mark.parametrize(("age", "asked"), [(0.0, 1), (24.0, 0)])
def test_the_schedule_asks_for_the_oldest_shards_within_its_time(small_copy, age, asked):
    config = small_copy / "foundry.toml"
    config.write_text(
        config.read_text() + f"\n[reencoding]\nmin_age_hours = {age}\nmax_minutes = 30\n"
    )
    store = Store(small_copy)
    requests = encode.reencode_requests(store, tick_s=1000.0)
    assert [request.partition_key for request in requests] == ["sdxl|s000000"][:asked]
    for request in requests:
        assert request.tags == {"foundry/reencode": "true", "foundry/reencode_until": "2800"}
    with (
        open_instance(small_copy) as instance,
        dg.build_schedule_context(
            instance,
            scheduled_execution_time=datetime(2026, 1, 1, tzinfo=UTC),
            resources={"store": store},
        ) as context,
    ):
        outcome = schedules.reencode_latents(context)
        assert isinstance(outcome, list) == bool(asked)


def test_a_run_whose_time_is_over_leaves_its_shard(small_copy):
    from assets.partitions import mirror
    from assets.registry import STAGES
    from jobs.pipeline import execute

    store = Store(small_copy)
    with open_instance(small_copy) as instance:
        mirror(instance, store)
        execute(
            instance, [STAGES["latents"]], ["sdxl|s000000"],
            tags={"foundry/reencode": "true", "foundry/reencode_until": "1000"},
        )  # fmt: skip
    assert not (small_copy / "latents" / "sdxl" / "s000000" / "g0002.json").exists()
