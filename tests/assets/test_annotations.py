"""The annotators' pass: what is loaded, where it runs, what remains."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs import pipeline
from resources import devices
from resources.workspace.setup import create
from resources.workspace.store import Store

NUM_IMAGES, NUM_SHARDS = 14, 7
ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
format = 1
shard_size = 2
[[sources]]
name = "a"
path = "images"
[models]
clip = "demo:models/clip"
tagger = "demo:models/tagger"
detector = "demo:models/owlv2"
[decode]
num_workers = 1
[annotate]
batch_size = 2
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A workspace with seven shards of two images each, read but not annotated."""
    home = tmp_path_factory.mktemp("annotated") / "workspace"
    (home / "images").mkdir(parents=True)
    create(home, sources=[str(home / "images")], preset="demo", tiny=False)
    (home / "foundry.toml").write_text(CONFIG)
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "images" / f"{number:02}.png")
    pipeline.bring_up_to_date(home, select="raw_images")
    return home


@pytest.fixture
def home(listed, tmp_path):
    return shutil.copytree(listed, tmp_path / "workspace", symlinks=True)


@pytest.fixture
def loads(monkeypatch):
    """Devices on which the tagger was loaded in this process, one entry each time."""
    from training.annotators.tagger import Tagger

    found = []
    load = Tagger.load.__func__

    def counted(cls, folder, device):
        found.append(device)
        return load(cls, folder, device)

    monkeypatch.setattr(Tagger, "load", classmethod(counted))
    return found


def test_networks_are_loaded_once_for_all_shards_of_a_run(home, loads):
    pipeline.bring_up_to_date(home, select="tags")
    assert len(Store(home).tables.parts("tags")) == NUM_SHARDS
    assert loads == ["cpu"]


def test_no_process_remains_after_a_run(home):
    before = set(psutil.Process().children(recursive=True))
    pipeline.bring_up_to_date(home, select="tags")
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.fixture
def on(monkeypatch):
    """`on(2)`: the machine has as many devices that `[devices]` allows."""

    def have(number):
        @contextlib.contextmanager
        def hold_all(*arguments, **options):
            yield ("cpu",) * number

        monkeypatch.setattr(devices, "hold_all", hold_all)

    return have


def test_all_devices_work_and_rows_do_not_depend_on_their_number(listed, tmp_path, on, loads):
    digests = set()
    for number in (1, 2):
        home = shutil.copytree(listed, tmp_path / str(number), symlinks=True)
        (home / "foundry.toml").write_text(CONFIG.replace("batch_size = 2", "batch_size = 1"))
        on(number)
        pipeline.bring_up_to_date(home, select="tags")
        store = Store(home)
        digests.add(
            tuple(store.manifest("tags", part).digest for part in store.tables.parts("tags"))
        )
    assert len(digests) == 1
    assert loads == ["cpu"], "two devices have processes of their own"


WITH_PLUGIN = """
import sys
from pathlib import Path
from jobs import pipeline
from training.images.decode_pool import DecodePool

decoded = []
pixels = DecodePool.pixels
DecodePool.pixels = lambda pool, paths, ids: decoded.extend(paths) or pixels(pool, paths, ids)
home = Path(sys.argv[1])
if sys.argv[2] == "job":
    import dagster as dg
    from assets.annotations import annotations
    from assets.partitions import mirror
    from resources.instance import instance
    from resources.workspace.store import Store
    from jobs.definitions import defs
    with instance(home) as opened:
        mirror(opened, Store(home))
        done = defs.resolve_job_def("annotate").execute_in_process(instance=opened, partition_key="s000000")
        print(sorted({event.asset_key.to_user_string() for event in done.get_asset_materialization_events()}))
    sys.exit()
print([(one.stage, one.num_partitions, one.sentence) for one in pipeline.status(home, "brightness_tags")])
print([(one.stage, one.num_made) for one in pipeline.bring_up_to_date(home, select=sys.argv[2], only=True)])
print(len(decoded), 'torch' in sys.modules)
"""


@pytest.fixture
def with_plugin(tmp_path):
    """`with_plugin(home, select)`: bring stages up to date where a package with the annotator of
    `tests/plugins/brightness.py` is installed."""
    site = tmp_path / "site"
    about = site / "brightness-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "plugins" / "brightness.py", site)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[diffusion_foundry.annotators]\nbrightness = brightness:Brightness\n"
    )

    def run(home, select):
        command = [sys.executable, "-c", WITH_PLUGIN, str(home), select]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_an_annotator_from_outside_becomes_a_stage(home, with_plugin):
    assert with_plugin(home, "brightness_tags") == [
        "[('brightness_tags', 0, 'no partition yet')]", "[('brightness_tags', 0)]", "0 False",
    ], "a workspace that names no weights for it does not want it"  # fmt: skip
    assert with_plugin(home, "job") == [
        "['captions', 'embeddings', 'raw_images', 'tags', 'watermark_boxes']"
    ], "nor does it stand in the way of the others"
    weights = home / "models" / "brightness"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text('{"scale": 0.00392}')
    text = CONFIG.replace(
        "[decode]", '[models.further]\nbrightness = "models/brightness"\n[decode]'
    )
    (home / "foundry.toml").write_text(text)

    status, made, decoded = with_plugin(home, "tags,brightness_tags")
    assert status == "[('brightness_tags', 7, '7 of 7 partitions stale: not made yet')]"
    assert made == "[('tags', 6), ('brightness_tags', 7)]", "the job made the first shard's tags"
    assert decoded == f"{NUM_IMAGES} True", "one decode feeds both"
    store = Store(home)
    for model in ("tagger", "brightness"):
        parts = [part for part in store.tables.parts("tags") if part.endswith(f".{model}")]
        assert len(parts) == NUM_SHARDS
        rows = store.read("tags", parts=parts)
        assert rows["image_id"].n_unique() == NUM_IMAGES
        assert set(rows["model"]) == {model}
    assert set(rows["tags"].explode().struct.field("name")) == {"bright"}
    assert rows["tags"].explode().struct.field("probability").is_between(0.4, 0.6).all()

    (weights / "config.json").write_text('{"scale": 0.00393}')
    status, made, _ = with_plugin(home, "tags,brightness_tags")
    assert "7 of 7 partitions stale: model brightness (models/brightness) changed" in status
    assert made == "[('tags', 0), ('brightness_tags', 7)]"
