"""A kind of source from outside the package, registered by one line, is as good as a folder: what is
listed, decoded, shown and encoded of an archive is what is of a folder of the same files."""

import contextlib
import pickle
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from drawn_images import SAVED, encode, textured

from assets import raw_images as ingest
from assets.declared import assets
from resources.workspace.store import Store
from training import toml
from training.buckets.geometry import Size
from training.config.workspace import SOURCE_KINDS, DecodeConfig, EncodingConfig, WorkspaceConfig
from training.errors import ConfigError, DataError
from training.images.decoding import Unusable
from training.latents.encoder import EncodeJob, Encoder, KeptImage, VaeSpec
from training.latents.encoding import encode_shard
from training.sources.kinds import make_source

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugins"
CONFIG = """
format = 1
[decode]
num_workers = 1
max_bytes = 70000
[[sources]]
name = "loose"
path = "pictures"
tags = ["Drawn"]
[[sources]]
name = "packed"
kind = "zip"
path = "pictures.zip"
tags = ["Drawn"]
"""


@pytest.fixture
def registered(monkeypatch):
    """The one line."""
    monkeypatch.syspath_prepend(PLUGINS)
    monkeypatch.setitem(SOURCE_KINDS, "zip", "zip_source:ZipSource")


def contents():
    """Images of every format by name, and files that are rejected each in a way of its own."""
    for number, (form, options) in enumerate(SAVED.items()):
        yield f"{number % 2}/{form}.png", encode(textured(seed=number), form, **options)
    yield "0/cut.png", encode(textured(), "PNG")[:999]
    yield "0/page.jpg", b"<html></html>"
    yield "empty.webp", b""
    yield "large.bmp", b"BM" + bytes(80_000)
    yield "notes.md", b"no image by its name"


@pytest.fixture
def store(registered, tmp_path):
    (tmp_path / "foundry.toml").write_text(CONFIG)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents():
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            archive.writestr(name, content)
    return Store(tmp_path)


def of_source(frame, source):
    return frame.filter(pl.col("source") == source).drop("source").sort("source_id")


def test_an_archive_goes_the_way_of_a_folder(store, tiny_sdxl, tmp_path):
    instance = dg.DagsterInstance.ephemeral(str(tmp_path / "cache"))
    options = {"instance": instance, "resources": {"store": store}}
    assert dg.materialize(assets([ingest.source_listing]), **options).success
    listed = store.read("source_listing")
    loose, packed = (of_source(listed, name) for name in ("loose", "packed"))
    same = ["source_id", "locator", "bytes", "tags", "caption", "gone_at"]
    assert packed.select(same).equals(loose.select(same))
    assert packed["shard"].unique().to_list() == ["s000001"]

    for shard in ("s000000", "s000001"):
        assert dg.materialize(assets([ingest.raw_images]), partition_key=shard, **options).success
    raw = store.read("raw_images")
    loose, packed = (of_source(raw, name) for name in ("loose", "packed"))
    assert packed.equals(loose)
    assert sorted(packed["format"]) == sorted(SAVED)
    rejected = store.read("rejected_images").filter(pl.col("stage") == "raw_images")
    loose, packed = (of_source(rejected, name) for name in ("loose", "packed"))
    assert packed.equals(loose)
    assert dict(packed.select("source_id", "reason").iter_rows()) == {
        "0/cut.png": "truncated", "0/page.jpg": "not_an_image", "empty.webp": "empty_file",
        "large.bmp": "too_many_bytes",
    }  # fmt: skip
    assert ingest.thumbnails(store, raw.filter(pl.col("source") == "packed")) == ingest.thumbnails(
        store, raw.filter(pl.col("source") == "loose")
    )

    spec = VaeSpec(folder=tiny_sdxl / "vae", precision="fp32", tile_above_px=1 << 22)
    encoded = {}
    for source in ("loose", "packed"):
        rows = raw.filter(pl.col("source") == source)
        pictures = [
            KeptImage(
                image_id=row["image_id"], file=file, original=Size(row["height"], row["width"]),
                bucket=Size(32, 48), flip=False, crop_box=None,
            )
            for row, file in zip(
                rows.iter_rows(named=True), ingest.image_files(store, rows), strict=True
            )
        ]  # fmt: skip
        (tmp_path / source).mkdir()
        job = EncodeJob(
            folder=tmp_path / source, generation=1, encoding=EncodingConfig(), vae_digest="v", vae=spec,
        )  # fmt: skip
        with contextlib.closing(Encoder(store.config.decode, "cpu")) as encoder:
            shard = encode_shard(pictures, job, partial(map, encoder))
        assert not shard.rejected
        encoded[source] = [(entry.name, entry.sha256) for entry in shard.files]
    assert encoded["packed"] == encoded["loose"]


def test_a_change_of_an_archive_is_seen_and_a_missing_one_is_named(store):
    before = store.paths.source("packed").fingerprint()
    assert store.paths.source("packed").fingerprint() == before
    path = store.home / "pictures.zip"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("new.png", b"new")
    assert store.paths.source("packed").fingerprint() != before
    path.unlink()
    with pytest.raises(
        DataError, match=r"source 'packed': .*pictures\.zip is not a .zip archive; mend"
    ):
        store.paths.source("packed")


def test_a_member_that_cannot_be_had_is_a_reason_and_never_an_end(store):
    source = pickle.loads(
        pickle.dumps(store.paths.source("packed"))
    )  # As it goes to other processes.
    assert source.open("0/JPEG.png") == (store.home / "pictures" / "0/JPEG.png").read_bytes()
    with pytest.raises(Unusable, match="gone"):
        source.open("none.png")
    with pytest.raises(Unusable, match=r"too_many_bytes: 80002 \(limit 70000"):
        source.open("large.bmp")
    path = store.home / "pictures.zip"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"idat").replace(b"PK\3\4", b"PK\0\4"))
    with pytest.raises(Unusable, match="unreadable"):
        source.open("0/JPEG.png")


def test_kinds_are_those_that_are_registered(tmp_path):
    path = tmp_path / "foundry.toml"
    path.write_text(CONFIG)
    with pytest.raises(
        ConfigError,
        match=rf"{path}.*kind='zip' of 'packed' is no kind of source; there are: folder$",
    ):
        toml.build(WorkspaceConfig, tomllib.loads(CONFIG), origin=path)


def test_every_kind_of_the_table_can_be_made(tmp_path):
    values = tomllib.loads(CONFIG)["sources"][0]
    for kind in SOURCE_KINDS:
        (config,) = toml.build(WorkspaceConfig, {"sources": [{**values, "kind": kind}]}).sources
        with pytest.raises(DataError, match="source 'loose'"):
            make_source(config, tmp_path / "missing", DecodeConfig())


def test_the_page_shows_the_plug_in_as_it_is():
    page = (ROOT / "docs" / "extending.md").read_text()
    assert f"```python\n{(PLUGINS / 'zip_source.py').read_text()}```" in page
