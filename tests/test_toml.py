"""Configuration: strict about keys, types and combinations, and exact about where a mistake
stands."""

import dataclasses
import typing

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from training import toml
from training.config import recipes
from training.config import workspace as configs
from training.config.run import RunConfig
from training.config.workspace import SelectionConfig, WorkspaceConfig
from training.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "foundry.toml"
    path.write_text(text)
    return path


def build(path):
    return toml.build(WorkspaceConfig, toml.load(path), origin=path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("formt = 1", ["foundry.toml:1", "'formt'", "did you mean 'format'"]),
        (
            "format = 1\n[selection]\nmin_scores = 3",
            ["foundry.toml:3", "selection.min_scores", "'min_score'"],
        ),
        ("[selection]\nmin_score = 12", ["selection.min_score=12", "between 0 and 9"]),
        (
            "[selection]\nmin_score = '3'",
            ["foundry.toml:2", "selection.min_score='3'", "whole number"],
        ),
        ("[tags]\nthreshold = nan", ["tags.threshold=nan", "a number"]),
        ("[tags]\nthreshold = 1.5", ["tags.threshold=1.5", "between 0 and 1"]),
        ("[encodings.SDXL]", ["encoding name 'SDXL'", "[a-z0-9]"]),
        ("[encodings.a.buckets]\nplan = 'kohia'", ["'kohia'", "bigasp_v1"]),
        ("[encodings.a]\ncrop = 'smart'", ["encodings.a.crop='smart'", "'random', 'centre'"]),
        ("[[sources]]\nname = 'x'", ["sources[0].'path'", "required"]),
        ("sources = 3", ["sources=3", "a list"]),
        ("[decode]\nmax_pixels = true", ["decode.max_pixels=True", "whole number"]),
        ("x = = 1", ["foundry.toml", "line 1"]),
    ],
)
def test_each_mistake_names_key_value_and_rule(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        build(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_changes_nothing(tmp_path):
    path = tmp_path / "foundry.toml"
    path.write_bytes(BOM + b"format = 1\r\n[selection]\r\nmin_score = 3\r\n")
    assert build(path).selection.min_score == 3
    path.write_bytes(BOM + b"formt = 1")
    with pytest.raises(ConfigError, match=r"foundry\.toml:1: unknown key 'formt'"):
        build(path)
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(
        BOM + b'[workspace]\nformat = 1\n[run]\nencoding = "sdxl"\nnum_samples = 77\n'
    )
    assert recipes.workspace_toml(recipe, [], tiny=None) == "format = 1\n"
    assert recipes.run_config(recipe, [], tiny=None).num_samples == 77


def test_defaults_survive_a_round_trip():
    run = RunConfig(encoding="sdxl")
    again = toml.build(RunConfig, tomlkit.parse(recipes.run_toml(run)).unwrap())
    assert again == run


@given(
    score=st.integers(0, 9),
    aspect=st.floats(0.1, 100, allow_nan=False),
    tags=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00")), max_size=3),
)
def test_values_survive_a_round_trip(score, aspect, tags):
    section = SelectionConfig(min_score=score, max_aspect=aspect, unwanted_tags=tuple(tags))
    text = tomlkit.dumps(toml.dump(section))
    assert toml.build(SelectionConfig, tomlkit.parse(text).unwrap()) == section


def test_override_parses_values_and_keeps_the_original():
    values = {"a": {"b": 1}}
    changed = toml.override(values, ["a.b=2", "a.c='x'", "d=plain words"])
    assert changed == {"a": {"b": 2, "c": "x"}, "d": "plain words"}
    assert values == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match="key=value"):
        toml.override(values, ["a.b"])


def test_every_option_is_documented_and_constructible_from_its_dump():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(configs))
    for node in (item for item in tree.body if isinstance(item, ast.ClassDef)):
        for place, statement in enumerate(node.body):
            if isinstance(statement, ast.AnnAssign):
                after = node.body[place + 1]
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_text, f"{node.name}.{ast.unparse(statement.target)} has no docstring"
    for name, cls in vars(configs).items():
        if (
            dataclasses.is_dataclass(cls)
            and typing.cast("type", cls).__module__ == configs.__name__
        ):
            assert cls.__dataclass_params__.frozen, name
