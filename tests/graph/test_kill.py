"""Kill -9 before the changes that a run makes to its workspace, go on: the digests of an
undisturbed run."""

import os
import shutil
import time
from pathlib import Path

import pytest
from graph_tools import digests, foundry, make_small, shorten
from kill_walk import Walk

from jobs.pipeline import selected
from resources.operations import maintenance
from resources.warehouse import query
from resources.workspace.store import Store
from training.tables.schemas import TABLES

STAGES = [*(",".join(stage.name for stage in body) for body in selected(None, only=False)), "all"]
"""In the graph's order, those of one body together; and at last the whole, for what comes after the
stages."""
AFTER_COMMITS = {
    "embeddings,tags,watermark_boxes,captions | os.rmdir | tables/annotations/*.partial"
}
"""Killed before the files of a finished folder of batches went, the stage is current: its folder is
left to `gc`."""
LIMIT_S = 55 * 60
"""For how long the long proof goes on; what it did not get to is counted."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A new workspace on twelve images with one training run of four steps; not to be written
    to."""
    from demo.images import write_world

    folder = tmp_path_factory.mktemp("tiny")
    home = folder / "workspace"
    make_small(home, write_world(folder / "images", num_images=12, seed=5))
    shorten(home / "runs" / "demo" / "config.toml", num_samples="64", every_samples="32")
    shorten(home / "foundry.toml", num_steps="2")
    prompts = home / "prompts.csv"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    return home


def started(folder, tiny, **options):
    """A walk below `folder`, which goes on where there is one."""
    home = folder / "workspace"
    if not home.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny, home, symlinks=True)
    return Walk(home, **options)


def count_rows(home):
    """Rows of each table by SQL, and how many of them have a key of their own."""
    parts = []
    for name, table in TABLES.items():
        key = ", ".join(f'"{column}"' for column in table.key) or "*"
        distinct = f'(select count(*) from (select distinct {key} from "{name}"))'
        parts.append(f"select '{name}', count(*), {distinct} from \"{name}\"")
    return {name: counts for name, *counts in query(Store(home), " union all ".join(parts)).rows()}


def check_rows(found, expected, in_work):
    """Compare row counts with an undisturbed run's: all or none, but in what is in work; and
    nothing twice."""
    for name, (rows, distinct) in found.items():
        assert (
            rows == expected[name][0] or rows == 0 or (name in in_work and rows < expected[name][0])
        ), name
        assert rows == distinct or expected[name][0] != expected[name][1], name


def look_at(killed, expected, stage):
    """What a reader finds of a workspace whose stage was just killed: nothing damaged, nothing
    half, nothing twice."""
    damaged = [
        problem.detail
        for problem in maintenance.verify(Store(killed.home))
        if problem.kind == "damage"
    ]
    assert damaged == [], killed.points()[-1]
    check_rows(count_rows(killed.home), expected, {"rejected_images", *stage.split(",")})


def kill_at(killed, point, before, stage, expected):
    """Kill at a point that only an undisturbed attempt comes by, from the workspace as it was
    before the stage, and go on."""
    shutil.rmtree(killed.home)
    shutil.copytree(before, killed.home, symlinks=True)
    killed.kill = True
    if not killed.attempt(stage, only=point):
        look_at(killed, expected, stage)
        killed.kill = False
        assert killed.attempt(stage)
        killed.kill = True
    assert count_rows(killed.home) == expected, point


def walk_and_compare(folder, tiny, *, every, limit_s=LIMIT_S):
    """Kill at all points until time is up, look at the workspace after each, and compare with an
    undisturbed run."""
    end = time.monotonic() + limit_s
    whole = started(folder / "whole", tiny, every=every, kill=False)
    killed = started(folder / "killed", tiny, every=every)
    for stage in STAGES:
        passed = len(whole.points())
        assert whole.attempt(stage)
        expected = count_rows(whole.home)
        before = killed.home.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(killed.home, before, symlinks=True)
        killed.kill = time.monotonic() < end
        while not killed.attempt(stage):
            look_at(killed, expected, stage)
            killed.kill = time.monotonic() < end
        assert count_rows(killed.home) == expected
        for point in whole.points()[passed:] if every else ():
            if point not in killed.points() and time.monotonic() < end:
                kill_at(killed, point, before, stage, expected)
    assert digests(killed.home) == digests(whole.home)
    maintenance.collect_garbage(Store(killed.home), min_age_s=0)
    assert maintenance.verify(Store(killed.home)) == []
    killed.kill = True
    points, met = set(killed.points()), set(whole.points())
    print(
        f"killed at {len(points)} points, {len(met - points)} of {len(met)} left out: {sorted(met - points)[:9]}"
    )
    return points, met


@pytest.mark.timeout(1800)
def test_a_run_killed_before_every_kind_of_change_ends_as_an_undisturbed_one(tiny, tmp_path):
    points, met = walk_and_compare(tmp_path, tiny, every=False)
    assert met - points <= AFTER_COMMITS
    assert len(points) > 150, "the hook does not see the changes"


@pytest.mark.slow
@pytest.mark.timeout(4200)
def test_a_run_killed_before_every_change_ends_as_an_undisturbed_one(tiny, tmp_path):
    """With $KILL_WALK, a folder, a walk that ended early goes on."""
    folder = Path(os.environ.get("KILL_WALK", tmp_path))
    points, _ = walk_and_compare(folder, tiny, every=True)
    assert len(points) > 400


def test_verify_finds_damage_and_repair_rebuilds_just_that(small_copy, small):
    table = next((small_copy / "tables" / "quality_scores").glob("*.parquet"))
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    latents = next(small_copy.glob("latents/*/*/*.safetensors"))
    latents.write_bytes(latents.read_bytes()[:-7])
    found = foundry("verify", "--home", small_copy, check=False)
    assert found.returncode == 1
    assert table.name in found.stdout
    assert latents.name in found.stdout
    assert "2 damaged" in found.stdout
    foundry("verify", "--home", small_copy, "--repair")
    foundry("run", "--home", small_copy)
    assert foundry("verify", "--home", small_copy).stdout.startswith("0 damaged")
    before, after = digests(small), digests(small_copy)
    assert {name for name in before if before[name] != after.get(name)} == set()
