"""The one Definitions: complete, described, ordered, light to import."""

import importlib
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.registry import STAGES

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "ingest": {"source_listing", "raw_images"},
    "annotate": {"embeddings", "tags", "captions", "watermark_boxes"},
    "curate": {
        "duplicate_groups", "quality_pairs", "quality_model", "quality_scores", "tag_vocabulary", "selected_images",
    },
    "encode": {"bucket_assignments", "latents", "training_set"},
    "train": {"base_model", "prompt_statistics", "checkpoints"},
    "evaluate": {"prompt_sets", "sample_images", "eval_metrics", "verdicts", "release"},
}  # fmt: skip
FOLLOWED = {
    "settings": {
        f"settings/{name}"
        for name in ("annotate", "decode", "encodings", "evaluation", "models", "prompt_sets", "quality", "selection",
                     "sources", "tags")
    },
    "models": {
        f"models/{name}" for name in ("aesthetic", "base", "clip", "detector", "quality_head", "tagger", "vae")
    },
}  # fmt: skip
"""Assets that people change: Dagster shows them and makes none."""


@pytest.fixture(scope="module")
def definitions():
    from jobs import definitions

    dg.Definitions.validate_loadable(definitions.defs)
    return definitions


def test_the_graph_changes_only_on_purpose(definitions):
    graph = definitions.defs.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        found.setdefault(graph.get(key).group_name, set()).add(key.to_user_string())
    assert found == GROUPS | FOLLOWED
    assert set(STAGES) == set().union(*GROUPS.values())
    assert {key.to_user_string() for key in graph.external_asset_keys} == set().union(
        *FOLLOWED.values()
    )


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
