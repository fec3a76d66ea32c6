"""The one Definitions: complete, described, ordered, light to import."""

import importlib
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.registry import STAGES
from jobs.cli.graph import settings
from resources.graph import Scope

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def definitions():
    from jobs import definitions

    dg.Definitions.validate_loadable(definitions.defs)
    return definitions


def test_dagster_shows_what_the_stages_declare(definitions):
    """That the declarations change only on purpose is tested with their page, docs/graph.md."""
    graph = definitions.defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.materializable_asset_keys} == set(STAGES)
    for stage in STAGES.values():
        node = graph.get(dg.AssetKey(stage.name))
        assert (node.group_name, node.code_version) == (stage.group, str(stage.version))
        assert (node.kinds, node.description) == ({"parquet", *stage.kinds}, stage.description)
        assert node.is_partitioned == (stage.scope is not Scope.ALL)
        parents = {key.to_user_string() for key in node.parent_keys}
        tables = {item.table for item in (*stage.reads, *stage.follows)}
        assert {name for name in parents if "/" not in name} == {
            other.name for other in STAGES.values() if other.table in tables and other is not stage
        }
        sections = {name.partition(".")[0] for name in settings(stage) if name}
        assert {name for name in parents if "/" in name} == {
            *(f"settings/{name}" for name in sections), *(f"models/{name}" for name in stage.models)
        }  # fmt: skip


def test_every_asset_says_what_it_is_and_can_fail_a_check(definitions):
    graph = definitions.defs.resolve_asset_graph()
    checked = {check.asset_key for check in graph.asset_check_keys}
    assert {check.asset_key for check in graph.asset_check_keys if check.name == "current"} == {
        dg.AssetKey(name) for name in STAGES
    }
    for key in graph.materializable_asset_keys:
        node = graph.get(key)
        assert node.description, key
        assert len(node.description) > 40, key
        assert node.kinds, key
        assert node.owners == ["team:foundry"], key
        assert "dagster/column_schema" in node.metadata, key
        assert key in checked, f"{key} has no check"


def test_stages_come_after_what_they_read(definitions):
    graph = definitions.defs.resolve_asset_graph()
    order = list(STAGES)
    for place, name in enumerate(order):
        parents = {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}
        assert {parent for parent in parents if "/" not in parent} <= set(order[:place]), name
        read = {reads.table for reads in STAGES[name].reads}
        assert read <= parents, f"{name} reads {read - parents}, which Dagster does not know of"


def test_every_setting_is_named_as_it_stands_in_foundry_toml(definitions):
    """What a stage says it reads is where a person finds it: else the reasons for staleness send
    people astray."""
    from resources.workspace.staleness import setting_name
    from training import toml
    from training.config.workspace import EncodingConfig, PromptSetConfig, WorkspaceConfig

    config = WorkspaceConfig(
        encodings={"sdxl": EncodingConfig()},
        prompt_sets={"standard": PromptSetConfig(file="p.csv")},
    )
    keys = {"encoding": "sdxl", "encoding_shard": "sdxl|s000000", "prompt_set": "standard"}
    written = toml.flatten(toml.dump(config))
    for stage in STAGES.values():
        key = keys.get(stage.scope.value, "all")
        section = stage.config(config, key)
        for name, value in toml.flatten(
            section if isinstance(section, dict) else toml.dump(section)
        ).items():
            if name == "sources":
                continue  # their names alone
            table, _, last = setting_name(stage.settings_of(key), name).rpartition("] ")
            assert written[".".join(filter(None, (table.removeprefix("["), last)))] == value, (
                stage.name,
                name,
            )


def test_importing_the_graph_leaves_the_heavy_libraries_out():
    heavy = "{'torch', 'diffusers', 'transformers', 'mlflow'}"
    code = f"import sys, jobs.definitions, jobs.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["assets", "demo", "jobs", "resources", "training"])
def test_top_level_names_are_ours(name):
    assert Path(importlib.import_module(name).__file__).is_relative_to(ROOT)


def test_a_command_that_loads_the_graph_torch_and_duckdb_ends_in_silence():
    run = "import jobs.definitions, torch\nfrom resources import warehouse\nwarehouse._check_reads([])\n"
    ended = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_the_module_that_dagster_loads_holds_one_definitions_object(definitions):
    found = [value for value in vars(definitions).values() if isinstance(value, dg.Definitions)]
    assert found == [definitions.defs]
