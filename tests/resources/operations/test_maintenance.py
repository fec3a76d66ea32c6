"""What `verify` sees of a workspace, and that `gc` removes what killed writers left: on parts
committed by hand."""

import contextlib
import itertools
import shutil

import polars as pl
import pytest
from typer.testing import CliRunner

from jobs.cli import console
from jobs.cli.app import app
from resources.graph import Per, Reads, Scope, Stage
from resources.operations import maintenance
from resources.warehouse import query
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import commit, manifests, progress
from training.errors import DamageError
from training.tables.schemas import TABLES, rejections

CONFIG = """
format = 1
[[sources]]
name = "a"
path = "pictures"
"""
LISTING = Stage(name="source_listing", version=1, scope=Scope.ALL)
IMAGES = Stage(
    name="raw_images",
    version=1,
    scope=Scope.SHARD,
    reads=(Reads("source_listing", ("source_id", "bytes"), Per.ROWS),),
    config=lambda config, key: config.decode,
)
SHARD = "s000000"
# Of these, DuckDB and Polars take the first three for patterns; the neighbours are what those would
# match.
ODD = {
    "[v1] set": "v set",
    "x*": "xyz",
    "a**b": "axb",
    "{a,b}": "a",
    'Bob\'s "q"': "Bob",
    "key=3": "key",
    "#1 $x;": "#",
}


def commit_two_of(home, sizes):
    """Make a workspace with a listing of two candidates, of which one is rejected."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "foundry.toml").write_text(CONFIG)
    rows = [
        {
            "source": "a",
            "source_id": f"{i}.jpg",
            "locator": f"{i}.jpg",
            "shard": SHARD,
            "bytes": size,
        }
        for i, size in enumerate(sizes)
    ]
    store = Store(home)
    listed = Made(frame=pl.DataFrame(rows, schema=TABLES["source_listing"].schema))
    store.writer.commit(LISTING, "all", listed, store.currency.basis(LISTING, "all"), seconds=0)
    store = Store(home)
    row = {"source": "a", "source_id": "0.jpg", "image_id": "0" * 64, "bytes": sizes[0]}
    rejected = rejections(
        "raw_images", [{"source": "a", "source_id": "1.jpg", "reason": "empty_file"}]
    )
    made = Made(
        frame=pl.DataFrame([row], schema=TABLES["raw_images"].schema), rejected=rejected, rows_in=2
    )
    store.writer.commit(IMAGES, SHARD, made, store.currency.basis(IMAGES, SHARD), seconds=0)
    return Store(home)


@pytest.fixture
def store(tmp_path):
    store = commit_two_of(tmp_path / "w", (10, 11))
    assert maintenance.verify(store) == []
    return store


def found(store):
    return {
        (problem.kind, problem.path.relative_to(store.home).as_posix())
        for problem in maintenance.verify(store)
    }


def contents(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "style", [".tmp-1-{}", ".tmp-1-{}.tmp"], ids=["of an older version", "of this one"]
)
def test_what_a_killed_writer_left_is_counted_and_read_by_nobody(store, style):
    before = query(store, "select count(*) from raw_images").item()
    left = set()
    for path in [
        path for path in store.home.rglob("*") if path.is_file() and path.suffix != ".toml"
    ]:
        copy = path.with_name(style.format(path.name))
        shutil.copy(path, copy)
        left.add(("orphan", copy.relative_to(store.home).as_posix()))
    for name in (
        "runs/r/checkpoints",
        "runs/r/epochs",
        "release",
        "mlartifacts",
        "sample_images/r@1",
        "labels",
        ".",
    ):
        for number, suffix in enumerate((".json", ".duckdb.wal", ".db-journal", "")):
            path = store.home / name / style.format(f"{number}{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            left.add(("orphan", path.relative_to(store.home).as_posix()))
    assert found(Store(store.home)) == left
    assert query(Store(store.home), "select count(*) from raw_images").item() == before
    assert Store(store.home).tables.parts("raw_images") == [SHARD]
    removed, _ = maintenance.collect_garbage(store, min_age_s=0)
    assert {("orphan", path.relative_to(store.home).as_posix()) for path in removed} == left
    assert found(store) == set()


def test_files_of_a_source_are_never_taken_for_leftovers(store):
    mine = store.home / "pictures" / ".tmp-1-mine.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert found(store) == set()


def test_rejections_that_a_manifest_names_must_be_there(store):
    manifest = store.tables.manifest_path("rejected_images", f"raw_images.{SHARD}")
    kept = manifest.read_bytes()
    damaged = ("damage", f"tables/raw_images/{SHARD}.json")
    manifest.unlink()
    assert damaged in found(store)
    # Those of another attempt: a kill between the two commits leaves them, and the next run makes
    # both.
    manifest.write_bytes(kept)
    other = Store(store.home)
    config, basis = IMAGES.section(other.config, SHARD), other.currency.basis(IMAGES, SHARD)
    for inputs, expected in (({}, set()), (basis["inputs"], {damaged})):
        empty = TABLES["rejected_images"].empty()
        other.writer.commit_rejected(
            "raw_images", 1, SHARD, empty, config=config, basis={**basis, "inputs": inputs}
        )
        assert {problem for problem in found(other) if problem[0] == "damage"} == expected


def test_lost_rejections_are_made_again_with_their_stage(store):
    manifest = store.tables.manifest_path("rejected_images", f"raw_images.{SHARD}")
    (
        manifest.parent / store.manifest("rejected_images", f"raw_images.{SHARD}").files[0].name
    ).write_bytes(b"")
    maintenance.repair(store, maintenance.verify(store))
    assert Store(store.home).currency.stale(IMAGES) == [SHARD]
    assert found(Store(store.home)) == set()


def test_a_manifest_under_another_name_is_no_other_part(store):
    path = store.tables.manifest_path("raw_images", SHARD)
    shutil.copy(path, path.with_name("s000001.json"))
    assert ("damage", "tables/raw_images/s000001.json") in found(store)


@pytest.mark.parametrize("name", ODD)
def test_a_workspace_below_any_path_reads_its_own_files(tmp_path, name):
    stores = [
        commit_two_of(tmp_path / folder / "w", sizes)
        for folder, sizes in ((name, (1, 2)), (ODD[name], (3, 4)))
    ]
    for store, size in zip(stores, (1, 3), strict=True):
        assert store.read("raw_images", ["bytes"])["bytes"].to_list() == [size]
        assert query(store, "select bytes from raw_images").rows() == [(size,)]
        assert query(store, "select * from source_listing").columns == list(
            TABLES["source_listing"].columns
        )
    shutil.rmtree(tmp_path / name / "w" / "tables")
    # What is not there is not read from next door either, past the check of its digest.
    assert query(Store(tmp_path / name / "w"), "select * from raw_images").is_empty()


def test_a_query_writes_nothing_and_changes_nothing(store):
    before = contents(store.home)
    assert query(store, "select count(*) from raw_images").item() == 1
    for statement in (
        "drop view raw_images",
        "create table x as select 1",
        "delete from latent_generations",
    ):
        with pytest.raises(commit.PipelineError, match=r"^sql: \w+ would change tables"):
            query(store, statement)
    assert contents(store.home) == before


def test_every_flipped_bit_of_a_manifest_is_noticed(store):
    content = store.tables.manifest_path("raw_images", SHARD).read_bytes()
    manifests.parse_manifest(content, "m")
    for place, bit in itertools.product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        with pytest.raises(DamageError):
            manifests.parse_manifest(bytes(flipped), "m")


@pytest.mark.parametrize(
    ("command", "counted"),
    [
        (["verify"], {"parts", "manifests"}),
        (["digest"], {"parts"}),
        (["digest", "--against", "OTHER"], {"parts", "parts compared"}),
        (["gc"], {"manifests", "files"}),
        (["forget", "0" * 64], {"parts", "leftovers"}),
    ],
)
def test_maintenance_reports_its_progress_to_bars_and_logs(
    store, tmp_path, monkeypatch, command, counted
):
    (store.home / "tables" / "raw_images" / "left.parquet").write_bytes(b"no manifest names me")
    other = commit_two_of(tmp_path / "other", (12, 11))
    heard = {}

    @contextlib.contextmanager
    def shown():
        unlisten = progress.listen(
            lambda what, done, total, note: heard.setdefault(what, []).append((done, total))
        )
        yield
        unlisten()

    monkeypatch.setattr(console, "progress", shown)
    words = [str(other.home) if word == "OTHER" else word for word in command]
    done = CliRunner().invoke(app, [*words, "--home", str(store.home)])
    assert done.exit_code in (0, 1), done.output  # 1: two workspaces differ
    assert counted <= heard.keys()
    for reports in (heard[what] for what in counted):
        total = reports[0][1]
        assert total > 0
        assert list(dict.fromkeys(reports)) == [(number, total) for number in range(total + 1)]
