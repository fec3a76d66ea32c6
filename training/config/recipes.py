"""Recipe files: a `[workspace]` half for `foundry init` and a `[run]` half for `foundry train`."""

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tomlkit

from training import toml
from training.config import older_runs
from training.config.evaluation import PROMPT_GROUPS, HeldOutPromptsConfig
from training.config.run import PromptConfig, RunConfig
from training.config.workspace import WorkspaceConfig
from training.errors import ConfigError


def recipe_path(folder: Path, name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: there is no such recipe; the message lists those that are there.
    """
    known = recipe_names(folder)
    if name not in known:
        raise ConfigError(f"no recipe is named {name!r}; {toml.nearest(name, known)}")
    return folder / f"{name}.toml"


def recipe_names(folder: Path) -> list[str]:
    """Names of the recipes in a folder, sorted."""
    return sorted(
        item.stem for item in folder.iterdir() if item.suffix == ".toml" and item.stem != "tiny"
    )


def workspace_toml(
    path: Path, sources: list[str], *, tiny: Path | None, home: Path | None = None
) -> str:
    """The `[workspace]` half as the text of a new foundry.toml, comments kept.

    Args:
        path: Recipe file.
        sources: Folders that replace the recipe's sources; empty keeps them.
        tiny: `tiny.toml` when the workspace is for the demo's models.
        home: The workspace: sources inside it are named from there, so that they move with it.

    Raises:
        ConfigError: the half has an unknown key or an impossible value.
    """
    text = path.read_text("utf-8-sig")
    start = re.search(r"^\[workspace\]$", text, re.MULTILINE)
    end = re.search(r"^\[+run\b", text, re.MULTILINE)
    if start is None:
        raise ConfigError(f"{path} has no [workspace] half")
    body = text[start.end() : end.start() if end else len(text)]
    document = tomlkit.parse(
        re.sub(r"^(\s*\[+)workspace\.", r"\1", body.strip() + "\n", flags=re.MULTILINE)
    )
    if sources:
        document["sources"] = _source_tables(sources, home)
    if tiny is not None:
        _shrink(document, "workspace", toml.load(tiny))
    config = toml.build(WorkspaceConfig, document.unwrap(), origin=path)
    prompts = toml.load(path).get("run", {}).get("prompts", {})
    style = held_out_prompts(toml.build(PromptConfig, prompts, origin=path, prefix="run.prompts."))
    said = {
        name: value
        for name, value in toml.dump(style).items()
        if value != toml.dump(HeldOutPromptsConfig())[name]
    }
    for name, made in config.prompt_sets.items():
        if said and made.held_out and made.prompts == HeldOutPromptsConfig():
            document["prompt_sets"][name]["prompts"] = said
    return tomlkit.dumps(document)


def held_out_prompts(prompts: PromptConfig) -> HeldOutPromptsConfig:
    """How a workspace's held-out images become prompts for models that a recipe trains."""
    return HeldOutPromptsConfig(
        prefix="score_7_up" if prompts.score_tags else "",
        num_tags=max(round(prompts.mean_tags), prompts.min_tags) if prompts.mean_tags else 0,
        order=prompts.order,
        first_tags=prompts.first_tags,
        spaces=prompts.spaces_prob > 0.5,
        caption_prob=prompts.caption_prob,
        caption_and_tags_prob=prompts.caption_and_tags_prob,
    )


def plain_workspace_toml(sources: list[str], *, tiny: Path | None, home: Path | None = None) -> str:
    """A foundry.toml without a recipe: SDXL's defaults."""
    document = tomlkit.document()
    document["format"] = 1
    document["sources"] = _source_tables(sources, home)
    document["encodings"] = {"sdxl": {"buckets": {"plan": "bigasp_v1"}}}
    document["prompt_sets"] = {
        "standard": {"held_out": 256, "groups": list(PROMPT_GROUPS)},
        "smoke": {"held_out": 30},
    }
    document["evaluation"] = {"sampling": {"precision": "bf16"}}
    if tiny is not None:
        _shrink(document, "workspace", toml.load(tiny))
    toml.build(WorkspaceConfig, document.unwrap())
    return tomlkit.dumps(document)


def run_config(path: Path, assignments: list[str], *, tiny: Path | None) -> RunConfig:
    """The `[run]` half, with `key=value` assignments applied.

    Raises:
        ConfigError: there is no such half, or a key or value is wrong.
    """
    values = toml.load(path).get("run")
    if values is None:
        raise ConfigError(f"{path} has no [run] half")
    values = copy.deepcopy(values)
    if tiny is not None:
        _shrink(values, "run", toml.load(tiny))
    return toml.build_with(RunConfig, values, assignments, origin=path, prefix="run.")


def run_toml(config: RunConfig, unsaid: Collection[str] = ()) -> str:
    """A resolved run as the text of its config.toml, without absent options and the dotted keys in
    `unsaid`."""
    values = toml.dump(config)
    absent = {key for key, value in toml.flatten(values).items() if value is None}
    return tomlkit.dumps(older_runs.without(values, absent.union(unsaid)))


def _source_tables(folders: list[str], home: Path | None) -> Any:
    tables = tomlkit.aot()
    names: set[str] = set()
    for folder in folders:
        stem = re.sub(r"[^a-z0-9_.-]+", "-", Path(folder).name.lower()).strip("-._") or "source"
        name, number = stem[:40], 2
        while name in names:
            name, number = f"{stem[:40]}-{number}", number + 1
        names.add(name)
        table = tomlkit.table()
        path = Path(folder).expanduser().resolve()
        if home is not None and path.is_relative_to(home):
            path = path.relative_to(home)
        table.update({"name": name, "kind": "folder", "path": str(path)})
        tables.append(table)
    return tables


def _shrink(values: Any, half: str, rules: dict[str, Any]) -> None:
    """Apply `tiny.toml` to one half in place."""
    for path, value in rules["replace"].items():
        for table, key in _places(values, half, path, create=True):
            table[key] = value
    for path, divisor in rules["divide"].items():
        for table, key in _places(values, half, path, create=False):
            if key in table:
                table[key] = max(1, -(-table[key] // divisor)) if table[key] else 0


def _places(values: Any, half: str, path: str, *, create: bool) -> list[tuple[Any, str]]:
    """The tables and keys that a dotted path with `*` names inside a half."""
    first, *parents, last = path.split(".")
    if first != half:
        return []
    tables = [values]
    for parent in parents:
        if parent == "*":
            tables = [table[key] for table in tables for key in table]
        else:
            tables = [
                table.setdefault(parent, {}) if create else table.get(parent, {})
                for table in tables
            ]
    return [(table, last) for table in tables]
