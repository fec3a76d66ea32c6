"""The whole graph on real photographs: up to 24 megapixels, nine EXIF orientations, no sidecar."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from graph_tools import PHOTOS, foundry, make_small

from resources.workspace.store import Store

pytestmark = [
    pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here"),
    pytest.mark.timeout(900),
]
MAX_BYTES = 2_000_000_000


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    home = tmp_path_factory.mktemp("photos") / "workspace"
    make_small(home, PHOTOS)
    code = (
        "import resource, subprocess, sys\n"
        "status = subprocess.call(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
        "sys.exit(status)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        Path(sys.executable).with_name("foundry"),
        "run",
        "--home",
        home,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, int(done.stdout.splitlines()[-1])


def test_every_file_is_accounted_for(photos):
    home, _ = photos
    store = Store(home)
    listed = store.read("source_listing", ["source_id"])["source_id"].to_list()
    assert len(listed) == 43
    assert not any(name.endswith(".md") for name in listed)
    accepted = store.read("raw_images")
    assert accepted.height == 43


def test_rotated_ones_are_upright_and_two_scenes(photos):
    home, _ = photos
    store = Store(home)
    rotated = store.read("raw_images").filter(pl.col("source_id").str.starts_with("rotated/"))
    assert rotated.height == 18
    for name, upright in (
        ("Landscape", pl.col("width") > pl.col("height")),
        ("Portrait", pl.col("height") > pl.col("width")),
    ):
        assert rotated.filter(pl.col("source_id").str.contains(name) & upright).height == 9
    groups = store.read("duplicate_groups").filter(pl.col("source_id").str.starts_with("rotated/"))
    assert groups["group"].n_unique() == 2
    assert groups.height == 18
    kept = store.read("selected_images").filter(
        pl.col("kept") & pl.col("source_id").str.starts_with("rotated/")
    )
    assert kept.height <= 2


def test_large_photographs_fit_into_two_gigabytes(photos):
    home, peak = photos
    pixels = (
        Store(home)
        .read("raw_images")
        .select(pl.col("height").cast(pl.Int64) * pl.col("width"))
        .max()
        .item()
    )
    assert pixels > 20_000_000
    assert peak < MAX_BYTES, f"the largest process took {peak / 1e9:.2f} GB"


def test_all_stages_are_made(photos):
    from assets.registry import STAGES

    home, _ = photos
    store = Store(home)
    for name, stage in STAGES.items():
        assert store.currency.stale(stage) == [], name
    assert store.read("eval_metrics").height
    query = "select count(*) n from sample_images"
    prompts, sampled = store.read("prompt_sets").height, len(store.tables.parts("sample_images"))
    assert sampled == 3
    found = json.loads(foundry("sql", "--home", home, "--format", "jsonl", query).stdout)["n"]
    assert found == prompts * sampled
