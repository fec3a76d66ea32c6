"""A source that has lost most of its files changes nothing until people accept exactly that."""

import shutil

import pytest
from graph_tools import foundry
from PIL import Image

from resources.operations.forget import forget
from resources.workspace import missing
from resources.workspace.store import Store
from training.errors import ConfigError, DataError
from training.sources.absence import Loss


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A workspace that has listed twelve images of one source and one of another."""
    home, many, one = tmp_path / "workspace", tmp_path / "many", tmp_path / "one"
    for folder, count in ((many, 12), (one, 1)):
        folder.mkdir()
        for number in range(count):
            Image.effect_noise((64 + number, 64), 50).convert("RGB").save(
                folder / f"{number:02}.png"
            )
    foundry("init", home, "--preset", "demo", "--source", many, "--source", one)
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    run(home)
    return home, many, one


def run(home, **options):
    from jobs import pipeline

    (outcome,) = pipeline.bring_up_to_date(home, select="source_listing", **options)
    return outcome.num_made


def committed(home):
    return {path: path.read_bytes() for path in sorted((home / "tables").rglob("*.json"))}


def test_a_share_that_is_not_mounted_changes_nothing_until_it_is_accepted(listed, tmp_path):
    home, many, _ = listed
    before = committed(home)
    many.rename(tmp_path / "away")
    many.mkdir()
    done = foundry("run", "--home", home, check=False)
    assert done.returncode == 2
    assert "source 'many': 12 of 12 image files are missing" in done.stderr
    assert "--accept-missing many" in done.stderr
    with pytest.raises(DataError, match="12 of 12"):
        run(home)
    assert committed(home) == before

    # Mounted again: as if nothing had been.
    many.rmdir()
    (tmp_path / "away").rename(many)
    assert run(home) == 0
    assert committed(home) == before

    # Accepted, but it is not what was refused: refused again, with the new counts.
    for number in range(10):
        (many / f"{number:02}.png").unlink()
    with pytest.raises(DataError, match="10 of 12"):
        run(home)
    (many / "10.png").unlink()
    with pytest.raises(DataError, match="11 of 12"):
        run(home, accept_missing=["many"])
    assert committed(home) == before

    done = foundry("run", "--home", home, "--select", "source_listing", "--accept-missing", "many")
    assert "accepted as missing: source 'many': 11 of 12 image files are missing" in done.stdout
    assert Store(home).read("source_listing", ["gone_at"])["gone_at"].count() == 11
    assert not (home / missing.FILE).exists()

    # What was accepted once is not accepted permanently.
    (many / "11.png").unlink()
    with pytest.raises(DataError, match="1 of 1"):
        run(home)


NETWORKS = "embeddings,tags"


def test_images_that_come_back_unchanged_are_not_annotated_again(listed, tmp_path, monkeypatch):
    from jobs import pipeline
    from training.annotators.annotations import AnnotatorPass

    home, many, _ = listed
    annotated = []

    class Counted(AnnotatorPass):
        def __call__(self, batch):
            annotated.extend(file().name for _, file in batch.images)
            return super().__call__(batch)

    def annotate():
        pipeline.bring_up_to_date(home, select=NETWORKS)

    monkeypatch.setattr("assets.annotations.AnnotatorPass", Counted)
    annotate()
    assert len(annotated) == 13
    tables = NETWORKS.split(",")
    before = {table: Store(home).read(table) for table in tables}
    annotated.clear()

    names = ["03.png", "04.png", "05.png"]
    for name in names:
        (many / name).rename(tmp_path / name)
    annotate()
    assert all(Store(home).read(table).height == 10 for table in tables)
    assert all(Store(home).read(f"kept_{table}").height == 3 for table in tables)
    for name in names:
        (tmp_path / name).rename(many / name)
    annotate()
    assert annotated == []
    assert all(Store(home).read(table).equals(before[table]) for table in tables)

    # One new image costs one annotation, and one that people forbid is kept nowhere.
    Image.effect_noise((90, 90), 50).convert("RGB").save(many / "new.png")
    annotate()
    assert annotated == ["new.png"]
    image_id = Store(home).read("raw_images").filter(source_id="04.png")["image_id"][0]
    forget(Store(home), [image_id])
    for table in (*tables, *(f"kept_{table}" for table in tables)):
        assert image_id not in Store(home).read(table)["image_id"].to_list()


def test_an_acceptance_is_of_one_source_as_it_is_now(listed):
    home, many, one = listed
    store = Store(home)
    shutil.rmtree(many)
    many.mkdir()
    (one / "00.png").unlink()
    losses = [Loss("many", 12, 12, 0), Loss("one", 1, 1, 0)]
    with pytest.raises(
        DataError,
        match=r"'many': 12 of 12 .*'one': 1 of 1 .*--accept-missing many --accept-missing one",
    ):
        missing.require_accepted(store, losses)
    missing.accept(store, ["many"])
    with pytest.raises(DataError, match=r"^source 'one'"):
        missing.require_accepted(store, losses)
    missing.accept(store, ["one"])
    missing.require_accepted(store, losses)
    (one / "01.png").write_bytes(b"new")
    with pytest.raises(DataError, match=r"^source 'one'"):
        missing.require_accepted(store, losses)
    missing.settle(store)
    with pytest.raises(DataError, match=r"'many'.*'one'"):
        missing.require_accepted(store, losses)
    with pytest.raises(ConfigError, match=r"'nobody'.*there are: many, one"):
        missing.accept(store, ["nobody"])
