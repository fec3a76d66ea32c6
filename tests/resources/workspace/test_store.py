"""What is current: decided by the slices that a stage declares to read, and by nothing else."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

import polars as pl
import pytest

from resources.graph import Per, Reads, Scope, Stage
from resources.warehouse import query
from resources.workspace.paths import find_home
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.errors import (
    ConfigError,
    DamageError,
    DataError,
    DeclarationError,
    LockedError,
    ModelError,
    WorkspaceError,
)
from training.manifests import commit_manifest, write_parquet
from training.tables.schemas import TABLES

CONFIG = """
format = 1
[[sources]]
name = "a"
path = "pictures"
[tags]
threshold = 0.4
[selection]
min_score = 1
"""

LISTING = Stage(name="source_listing", version=1, scope=Scope.ALL)
BY_SHARD = Stage(
    name="raw_images",
    version=1,
    scope=Scope.SHARD,
    reads=(Reads("source_listing", ("source_id", "bytes"), Per.ROWS),),
    config=lambda config, key: config.decode,
)
WHOLE = Stage(
    name="duplicate_groups",
    version=1,
    scope=Scope.ALL,
    reads=(Reads("raw_images", ("image_id",)),),
    config=lambda config, key: {"threshold": config.tags.threshold},
)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "foundry.toml").write_text(CONFIG)
    return Store(tmp_path)


def fresh(store):
    """The store as another process sees it."""
    return Store(store.home)


def commit(store, stage, key, frame, **made):
    basis = store.currency.basis(stage, key)
    assert basis is not None
    return store.writer.commit(stage, key, Made(frame=frame, **made), basis, seconds=0)


def test_a_part_that_an_older_version_wrote_has_nulls_in_younger_columns(store):
    manifest = commit(store, LISTING, "all", listing(split=["train"] * 4))
    older = listing(source_id=["e", "f", "g", "h"], split=["train"] * 4).drop("split", "caption")
    folder = store.tables.folder("source_listing", "old")
    entry = write_parquet(folder, "old", older)
    commit_manifest(folder / "old.json", replace(manifest, part="old", files=(entry,)))
    frame = fresh(store).read("source_listing")
    assert frame.schema == TABLES["source_listing"].schema
    assert (frame.height, frame["split"].null_count()) == (8, 4)
    assert query(fresh(store), "select count(*), count(split) from source_listing").row(0) == (8, 4)


def listing(**changes):
    """Four candidates in two shards; `changes` are columns by name."""
    rows = [
        {
            "source": "a",
            "source_id": f"{i}.jpg",
            "locator": f"{i}.jpg",
            "shard": f"s00000{i // 2}",
            "bytes": 10 + i,
        }
        for i in range(4)
    ]
    frame = pl.DataFrame(rows, schema=TABLES["source_listing"].schema)
    return frame.with_columns(
        **{
            name: pl.Series(name, values, dtype=frame.schema[name])
            for name, values in changes.items()
        }
    )


def images(shard, *, dpi=None):
    number = int(shard[-1])
    rows = [
        {"source": "a", "source_id": f"{i}.jpg", "image_id": f"{i}" * 64, "dpi": dpi}
        for i in (2 * number, 2 * number + 1)
    ]
    return pl.DataFrame(rows, schema=TABLES["raw_images"].schema)


def build(store):
    commit(store, LISTING, "all", listing())
    for shard in ("s000000", "s000001"):
        commit(store, BY_SHARD, shard, images(shard))
    commit(store, WHOLE, "all", TABLES["duplicate_groups"].empty())
    assert not any(fresh(store).currency.stale(stage) for stage in (LISTING, BY_SHARD, WHOLE))


def stale(store):
    return {
        stage.name: keys
        for stage in (BY_SHARD, WHOLE)
        if (keys := fresh(store).currency.stale(stage))
    }


def test_a_change_makes_stale_exactly_the_shard_that_reads_it(store):
    build(store)
    commit(store, LISTING, "all", listing(bytes=[10, 11, 12, 99]))
    assert stale(store) == {"raw_images": ["s000001"]}


def test_a_column_that_nobody_reads_makes_nothing_stale(store):
    build(store)
    commit(store, LISTING, "all", listing(favourites=[1, 2, 3, 4]))
    commit(store, BY_SHARD, "s000000", images("s000000", dpi=72.0))
    assert stale(store) == {}


def test_a_new_shard_is_the_only_new_work(store):
    build(store)
    more = pl.concat([listing(), listing(source_id=["4", "5", "6", "7"], shard=["s000002"] * 4)])
    commit(store, LISTING, "all", more)
    assert stale(store) == {"raw_images": ["s000002"]}
    commit(fresh(store), BY_SHARD, "s000002", TABLES["raw_images"].empty())
    assert stale(store) == {"duplicate_groups": ["all"]}


def test_a_section_of_the_configuration_reaches_only_its_readers(store):
    build(store)
    (store.home / "foundry.toml").write_text(CONFIG.replace("0.4", "0.5"))
    assert stale(store) == {"duplicate_groups": ["all"]}
    (store.home / "foundry.toml").write_text(CONFIG.replace("min_score = 1", "min_score = 3"))
    assert stale(store) == {}


def test_a_raised_version_reaches_every_partition(store):
    build(store)
    assert store.currency.stale(replace(BY_SHARD, version=2)) == ["s000000", "s000001"]


def test_a_stage_cannot_read_what_it_does_not_declare(store):
    build(store)
    assert store.slices.read(BY_SHARD, "source_listing", "s000001").to_dict(as_series=False) == {
        "source_id": ["2.jpg", "3.jpg"],
        "bytes": [12, 13],
    }
    with pytest.raises(DeclarationError, match="raw_images declares no slice of table raw_images"):
        store.slices.read(BY_SHARD, "raw_images", "s000001")


def test_rows_must_add_up(store):
    commit(store, LISTING, "all", listing())
    with pytest.raises(DataError, match=r"raw_images s000000: 3 rows in, but 2 out and 0 rejected"):
        commit(store, BY_SHARD, "s000000", images("s000000"), rows_in=3)
    assert store.tables.parts("raw_images") == []


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (images("s000000").drop("dpi"), "missing"),
        (images("s000000").with_columns(extra=1), "extra"),
        (
            images("s000000").with_columns(pl.col("dpi").cast(pl.String)),
            "dpi is String, must be Float64",
        ),
        (pl.concat([images("s000000")] * 2), "appears more than once"),
    ],
)
def test_a_frame_that_does_not_fit_its_table_is_refused(store, frame, words):
    commit(store, LISTING, "all", listing())
    with pytest.raises(DataError, match=words):
        commit(store, BY_SHARD, "s000000", frame)


def test_row_order_does_not_matter(store):
    commit(store, LISTING, "all", listing())
    first = commit(store, BY_SHARD, "s000000", images("s000000"))
    assert commit(store, BY_SHARD, "s000000", images("s000000").reverse()).digest == first.digest


def test_damage_is_found_on_the_first_open(store):
    commit(store, LISTING, "all", listing())
    path = store.tables.file("source_listing", "all")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=path.name):
        fresh(store).read("source_listing")


def test_a_second_writer_waits_and_then_names_the_first(store, monkeypatch):
    monkeypatch.setattr("training.commit.time.monotonic", iter(range(0, 10**6, 6)).__next__)
    with (
        store.writer.holding("raw_images", "s000000"),
        pytest.raises(LockedError, match=r"raw_images s000000 in .* is held by pid \d+"),
        fresh(store).writer.holding("raw_images", "s000000"),
    ):
        pass


def test_batches_of_a_killed_attempt_are_read_back(store):
    made = []

    def run(batches):
        for batch in batches:
            made.append(batch)
            yield pl.DataFrame({"x": [batch]})

    def attempt(identity, stop_after=99):
        frames = store.writer.resume_batches("tags", "s000000", identity, [1, 2, 3, 4], run)
        return [frame["x"][0] for frame in islice(frames, stop_after)]

    assert attempt("one", stop_after=2) == [1, 2]
    assert attempt("one") == [1, 2, 3, 4]
    assert made == [1, 2, 3, 4], "a finished batch must not be made again"
    made.clear()
    assert attempt("two") == [1, 2, 3, 4]
    assert made == [1, 2, 3, 4], "batches of another identity must not be read back"


@pytest.mark.parametrize("found", ["2", "'one'"])
def test_a_workspace_of_another_format_is_refused(tmp_path, found):
    (tmp_path / "foundry.toml").write_text(f"format = {found}")
    with pytest.raises(WorkspaceError, match=r"format=.*, this version reads format 1"):
        _ = Store(tmp_path).config


def test_no_workspace_says_how_to_make_one(tmp_path):
    with pytest.raises(WorkspaceError, match="foundry init"):
        _ = Store(tmp_path).config


def test_a_source_that_is_no_folder_is_named(store):
    with pytest.raises(DataError, match=r"source 'a': .*pictures is not a folder"):
        store.paths.source("a")
    with pytest.raises(ConfigError, match="no source is named 'b'"):
        store.paths.source("b")


def test_which_workspace_a_command_works_on(tmp_path, monkeypatch):
    inner = tmp_path / "ws" / "deep"
    inner.mkdir(parents=True)
    monkeypatch.delenv("FOUNDRY_HOME", raising=False)
    assert find_home(start=inner) == inner / "workspace"
    (tmp_path / "ws" / "foundry.toml").touch()
    assert find_home(start=inner) == tmp_path / "ws"
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "other"))
    assert find_home(start=inner) == tmp_path / "other"
    assert find_home(tmp_path / "named", start=inner) == tmp_path / "named"


def test_manifests_say_when_and_by_whom_but_never_decide_by_it(store):
    build(store)
    manifest = store.manifest("source_listing", "all")
    assert datetime.fromisoformat(manifest.provenance["time"]).tzinfo == UTC
    assert "provenance" not in manifest.basis


def test_the_base_model_may_be_a_single_file_with_its_configurations_beside_it(tmp_path):
    (tmp_path / "foundry.toml").write_text(CONFIG + '[models]\nbase = "models/photo.safetensors"\n')
    store, path = Store(tmp_path), tmp_path / "models" / "photo.safetensors"
    path.parent.mkdir()
    with pytest.raises(ModelError, match=r"photo.safetensors does not exist"):
        store.models.path("base")
    path.write_bytes(b"weights")
    with pytest.raises(
        ModelError, match=r"models/photo with its configurations and tokenizers is missing"
    ):
        store.models.path("base")
    (tmp_path / "models" / "photo").mkdir()
    index = tmp_path / "models" / "photo" / "model_index.json"
    index.write_text("{}")
    assert store.models.path("base") == path
    first = store.models.digest("base")
    assert fresh(store).models.digest("base") == first
    index.write_text('{"changed": 1}')
    second = fresh(store).models.digest("base")
    path.write_bytes(b"other weights")
    assert len({first, second, fresh(store).models.digest("base")}) == 3


def test_a_run_brings_its_encodings_vae_where_the_base_model_has_another(store):
    (store.home / "foundry.toml").write_text(
        CONFIG
        + """
[models]
base = "models/base"
[encodings.own]
[encodings.better]
vae = "models/better"
"""
    )
    folder = store.home / "models"
    assert store.models.vae_of_run("own", "base") is None
    assert store.models.vae_of_run("better", "base") == folder / "better"
    with pytest.raises(ModelError, match=r"folder .*models/base is missing"):
        store.models.vae_digest("own")
    # A single file holds a VAE of its own, but latents were encoded with the one in the folder
    # beside it.
    (store.home / "foundry.toml").write_text(
        CONFIG + '[models]\nbase = "models/base.safetensors"\n[encodings.own]\n'
    )
    assert fresh(store).models.vae_of_run("own", "base") == folder / "base" / "vae"


@pytest.mark.parametrize("value", ["demo@8", "rival.other@0", "base.12345678@0"])
def test_sql_tells_checkpoints_runs_encodings_and_shards_apart(store, value):
    names = ["demo@4", value]
    for number, name in enumerate(names):
        for table, columns in (
            ("eval_metrics", {"metric": "clip_score"}),
            ("sample_images", {"text": "a cat"}),
        ):
            row = {"prompt_id": "p", **columns} | (
                {"value": float(number)} if table == "eval_metrics" else {}
            )
            frame = pl.DataFrame([row], schema=TABLES[table].schema)
            commit(store, Stage(name=table, version=1, scope=Scope.CHECKPOINT), name, frame)
    run = "demo" if value.startswith("demo") else None
    found = query(fresh(store), "select checkpoint, run, value from eval_metrics order by value")
    assert found.rows() == [("demo@4", "demo", 0.0), (value, run, 1.0)]
    pairs = "select s.checkpoint from sample_images s join eval_metrics using (checkpoint, prompt_id) order by value"
    assert query(fresh(store), pairs)["checkpoint"].to_list() == names


def test_sql_tells_the_placements_of_encodings_apart(store):
    row = dict.fromkeys(TABLES["bucket_assignments"].schema) | {"image_id": "a" * 64}
    for encoding in ("sdxl", "sdxl.2"):
        frame = pl.DataFrame([row], schema=TABLES["bucket_assignments"].schema)
        commit(
            store,
            Stage(name="bucket_assignments", version=1, scope=Scope.ENCODING),
            encoding,
            frame,
        )
    found = query(
        fresh(store), "select encoding, count(*) from bucket_assignments group by 1 order by 1"
    )
    assert found.rows() == [("sdxl", 1), ("sdxl.2", 1)]
    columns = query(fresh(store), "select * from latents").columns
    assert columns[:2] == ["encoding", "shard"], "also while there are none"


def test_an_encoding_that_was_renamed_in_foundry_toml_is_named(store):
    known = ", ".join(sorted(store.config.encodings)) or "none"
    with pytest.raises(ConfigError) as refused:
        store.models.vae_folder("renamed")
    assert str(refused.value) == f"foundry.toml has no [encodings.renamed]; there are: {known}"
