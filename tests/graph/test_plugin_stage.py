"""A stage that a module outside of the package declares: nothing but that module is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from assets import raw_images, selection
from resources.workspace.setup import create
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.tables.schemas import TABLES

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
PLUG_IN = """
import image_shapes
from assets import stages
stages.MODULES += (image_shapes,)
"""
STAGES = ["name_captions", "image_shapes", "careless_shapes"]


def with_plugin(code, *arguments):
    """Code in a process that has added the plug-in to the tuple of modules."""
    path = os.pathsep.join([str(PLUGINS), str(PLUGINS.parents[1])])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLUG_IN + code, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def foundry(*arguments):
    return with_plugin("from jobs.cli.app import main\nmain()", *arguments)


def rows(table, *values):
    """Rows of a table, null where nothing is given."""
    schema = TABLES[table].schema
    return pl.DataFrame([dict.fromkeys(schema) | value for value in values], schema=schema)


@pytest.fixture
def home(tmp_path):
    """A workspace that holds three selected images of one shard."""
    (tmp_path / "pictures").mkdir()
    home = tmp_path / "home"
    create(home, sources=[str(tmp_path / "pictures")], preset=None, tiny=True)
    store, sizes = Store(home), {"i1": (2, 1), "i2": (1, 2), "i3": (1, 1)}
    source = store.config.sources[0].name
    images = [
        {"source": source, "source_id": f"{name}.png", "image_id": name, "height": height, "width": width}
        for name, (height, width) in sizes.items()
    ]  # fmt: skip
    listed = [
        {"source": source, "source_id": image["source_id"], "shard": "s000000", "modified_ns": 1}
        for image in images
    ]
    kept = [image | {"shard": "s000000", "kept": image["image_id"] != "i3"} for image in images]
    for stage, key, found in (
        (raw_images.source_listing, "all", listed),
        (raw_images.raw_images, "s000000", images),
        (selection.selected_images, "all", kept),
    ):
        made = Made(frame=rows(stage.table, *found))
        store.writer.commit(stage, key, made, {"inputs": {}, "models": {}}, seconds=0)
    return home


def test_a_stage_from_outside_is_a_stage_like_any_other(home):
    listed = json.loads(foundry("graph", "--json").stdout)
    names = [stage["stage"] for stage in listed]
    assert set(STAGES) <= set(names)
    # Captions of file names come before the selection, which reads them: the order follows.
    chain = ("raw_images", "name_captions", "selected_images", "image_shapes")
    places = [names.index(name) for name in chain]
    assert places == sorted(places)
    shapes = listed[names.index("image_shapes")]
    assert shapes["reads"] == [
        {"table": "selected_images", "columns": ["image_id", "height", "width", "kept"], "per": "all"}
    ]  # fmt: skip
    assert shapes["config"] == {"selection": ["min_score"]}
    assert "image_shapes: one whole table, group curate, version 1" in foundry("graph").stdout

    def stale():
        found = json.loads(foundry("status", "--home", home, "--json").stdout)
        return {item["stage"]: len(item["stale"]) for item in found if item["stage"] in STAGES}

    assert stale() == dict.fromkeys(STAGES, 1)
    done = foundry("run", "--home", home, "--only", "--select", "image_shapes,name_captions")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stale() == dict.fromkeys(STAGES, 0) | {"careless_shapes": 1}
    asked = foundry("sql", "from image_shapes order by image_id", "--home", home, "--format", "csv")
    assert asked.stdout.split() == ["image_id,shape", "i1,portrait", "i2,landscape"]
    assert Store(home).tables.parts("captions") == ["s000000.file_name"]


def test_a_stage_that_reads_what_it_does_not_declare_fails_at_once(home):
    done = foundry("run", "--home", home, "--only", "--select", "careless_shapes")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "foundry: careless_shapes: stage careless_shapes reads table raw_images, which its declaration does not "
        "name: add Reads('raw_images', ...) to its `reads` where a change makes it stale, to `follows` where "
        "`others` digests it, or to `also` where it is only looked at"
    )  # fmt: skip
    assert Store(home).tables.parts("image_shapes") == []


def test_its_check_and_its_place_in_a_job_follow():
    code = """
import dagster as dg
from jobs.definitions import defs
graph = defs.resolve_asset_graph()
print(sorted(key.name for key in graph.asset_check_keys if key.asset_key.path == ["image_shapes"]))
print("image_shapes" in str(defs.resolve_job_def("curate").asset_layer.selected_asset_keys))
print(sorted(key.path[0] for key in graph.get(dg.AssetKey("image_shapes")).parent_keys))
"""
    done = with_plugin(code)
    checks, is_in_job, parents = done.stdout.splitlines()
    assert (checks, is_in_job) == ("['current', 'not_all_square']", "True")
    assert parents == "['selected_images', 'settings']"
