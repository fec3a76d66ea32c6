"""The annotators' pass: what is loaded, where it runs, what remains."""

import contextlib
import shutil

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs import pipeline
from resources import devices
from resources.workspace.setup import create
from resources.workspace.store import Store

NUM_IMAGES, NUM_SHARDS = 14, 7
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
    assert len(Store(home).parts("tags")) == NUM_SHARDS
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
        digests.add(tuple(store.manifest("tags", part).digest for part in store.parts("tags")))
    assert len(digests) == 1
    assert loads == ["cpu"], "two devices have processes of their own"
