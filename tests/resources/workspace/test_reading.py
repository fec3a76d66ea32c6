"""While a stage's body works, it reads what its declaration names, and nothing else."""

import polars as pl
import pytest

from resources.graph import Reads, Scope, Stage
from resources.warehouse import query
from resources.workspace import reading
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.errors import DeclarationError
from training.tables.schemas import TABLES

TAGS = Stage(
    name="tags",
    version=1,
    scope=Scope.ALL,
    reads=(Reads("raw_images", ("image_id", "source")),),
    follows=(Reads("captions"),),
    also=(Reads("raw_images", ("height",)),),
)
TABLES_READ = ("raw_images", "captions", "base_model")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "foundry.toml").write_text("format = 1\n")
    store = Store(tmp_path)
    for table in TABLES_READ:
        schema = TABLES[table].schema
        row = {name: f"{name} of it" for name, kind in schema.items() if kind == pl.String}
        stage = Stage(name=table, version=1, scope=Scope.ALL)
        frame = pl.DataFrame([dict.fromkeys(schema) | row], schema=schema)
        store.writer.commit(
            stage, "all", Made(frame=frame), {"inputs": {}, "models": {}}, seconds=0
        )
    return store


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.slices.read(TAGS, "raw_images", "all"),
        lambda store: store.read("raw_images", ["image_id"]),
        lambda store: store.read("raw_images", ["source", "height"]),
        lambda store: store.read("captions"),
        lambda store: store.tables.file("captions", "all"),
    ],
)
def test_what_is_declared_is_read(store, read):
    with reading.at_work(TAGS):
        read(store)


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda store: store.read("base_model", ["name"]), "table base_model"),
        (lambda store: store.tables.file("base_model", "all"), "table base_model"),
        (lambda store: store.read("raw_images", ["image_id", "width"]), "width of table raw_images"),
        (lambda store: store.read("raw_images"), ".* of table raw_images"),
        (lambda store: Store(store.home).read("base_model", ["name"]), "table base_model"),
        (lambda store: query(store, "from base_model"), ".* of table raw_images"),
    ],
)  # fmt: skip
def test_what_is_not_declared_is_refused(store, read, named):
    with reading.at_work(TAGS), pytest.raises(DeclarationError, match=f"stage tags reads {named}"):
        read(store)
    read(store)  # outside of a body everything may be read


def test_a_slice_that_is_not_declared_is_refused(store):
    with pytest.raises(DeclarationError, match="stage tags declares no slice of table captions"):
        store.slices.read(TAGS, "captions", "all")


def test_stages_that_work_together_read_what_any_declares(store):
    other = Stage(name="embeddings", version=1, scope=Scope.ALL, reads=(Reads("base_model"),))
    with reading.at_work(TAGS, other):
        store.read("base_model")
        store.read("captions")
        with pytest.raises(DeclarationError):
            store.read("release")


def test_the_workspace_itself_reads_what_it_needs(store):
    """Which partitions there are, and what is stale, is no reading of the body's."""

    def base(store, key):
        return {"base": store.read("base_model")["name"][0]}

    follower = Stage(name="release", version=1, scope=Scope.ALL, others=base)
    with reading.at_work(TAGS):
        store.checkpoints.base(), store.tables.shards()
        assert store.currency.basis(follower, "all")["inputs"] == {"base": "name of it"}
        with reading.beside():
            store.read("base_model")
        with pytest.raises(DeclarationError):
            store.read("base_model")
