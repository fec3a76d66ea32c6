"""How the parts of a table lie in a workspace."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.workspace.layouts import GENERATIONS, PARTS, all_manifests, committed, layout_of
from resources.workspace.store import Store
from training.names import GenerationName, ShardKey
from training.tables.schemas import TABLES

ROOT = Path(__file__).parents[3]
stems = st.from_regex(r"[a-z0-9_]+", fullmatch=True)
numbers = st.sets(st.integers(1, 20_000), min_size=1, max_size=6)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_only_latents_have_generations():
    assert {name for name in TABLES if layout_of(name) is GENERATIONS} == {"latents"}
    assert layout_of("a table of a newer version") is PARTS


@given(table=st.sampled_from(sorted(TABLES)), encoding=stems, shard=stems, number=numbers)
def test_a_manifest_lies_where_its_part_is_found_again(table, encoding, shard, number):
    layout, home = layout_of(table), Path("/w")
    part = str(ShardKey(encoding, shard)) if layout is GENERATIONS else shard
    path = layout.manifest(layout.folder(home, table, part), part)
    assert layout.part_at(path) == (table, part)


@given(numbers)
def test_the_highest_generation_is_current(tmp_path_factory, numbers):
    home = tmp_path_factory.mktemp("home")
    store, folder = Store(home), home / "latents" / "sdxl" / "s000000"
    first = folder / "g0001.json"
    assert store.tables.manifest_path("latents", "sdxl|s000000") == first
    for number in numbers:
        touch(folder / GenerationName(number).manifest)
    touch(folder / "g0099-64x64-0a1b2c3d.json.tmp")
    assert [name.number for name in committed(folder)] == sorted(numbers)
    highest = folder / GenerationName(max(numbers)).manifest
    assert store.tables.manifest_path("latents", "sdxl|s000000") == highest
    assert store.tables.parts("latents") == ["sdxl|s000000"]
    assert len(all_manifests(home)) == len(numbers)


def test_all_manifests_are_those_of_every_table_and_generation(tmp_path):
    kept = [
        tmp_path / "tables" / "raw_images" / "s000000.json",
        tmp_path / "tables" / "tags" / "s000000.joytag.json",
        tmp_path / "latents" / "sdxl" / "s000000" / "g0001.json",
        tmp_path / "latents" / "sdxl" / "s000000" / "g0002.json",
    ]
    for path in (*kept, tmp_path / "tables" / "tags" / ".tmp-1-x.json"):
        touch(path)
    assert all_manifests(tmp_path) == kept


@pytest.fixture(scope="module")
def imports():
    """What each module of resources imports of resources by name, wherever in its text."""
    paths = [path for path in (ROOT / "resources").rglob("*.py") if path.name != "__init__.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}

    def named(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    return {name: names.keys() & set(named(path)) for name, path in names.items()}


def test_no_module_of_resources_comes_back_to_itself(imports):
    assert len(list(TopologicalSorter(imports).static_order())) == len(imports)


def test_no_part_of_the_store_knows_the_store(imports):
    parts = {name for name in imports["resources.workspace.store"] if "workspace" in name}
    assert parts
    seen, waiting = set(), set(parts)
    while waiting:
        seen |= waiting
        waiting = set().union(*(imports[name] for name in waiting)) - seen
    assert "resources.workspace.store" not in seen


@pytest.mark.parametrize("asked", ["tables.read", "tables.manifest", "paths.home", "paths.config"])
def test_what_the_store_answers_itself_is_asked_of_it_alone(asked):
    folders = ("assets", "resources", "jobs", "tests", "benchmarks")
    found = [
        str(path)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if f"store.{asked}(" in (text := path.read_text())
        or (asked.startswith("paths") and f"store.{asked}." in text)
    ]
    assert found == []
