"""`foundry graph`: every stage on one page, with what it reads and from which part of the
configuration."""

import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from resources.graph import Per, Reads, Scope, Stage, no_others, nothing
from training.config.evaluation import PromptSetConfig
from training.config.workspace import EncodingConfig, WorkspaceConfig
from training.names import ShardKey

app = typer.Typer()

WIDTH = 80
INDENT = 12
NAME = "name"
"""Stands for the name of any encoding or prompt set."""
_SCOPES = {
    Scope.ALL: "one whole table",
    Scope.SHARD: "per shard",
    Scope.ENCODING: "per encoding",
    Scope.ENCODING_SHARD: "per encoding and shard",
    Scope.MODEL: "per base model",
    Scope.PROMPT_SET: "per prompt set",
    Scope.RUN: "per training run",
    Scope.CHECKPOINT: "per checkpoint",
}
_PARTS = {
    Per.ALL: "",
    Per.SHARD: " of its shard",
    Per.ROWS: " rows of its shard",
    Per.ENCODING: " of its encoding",
    Per.ENCODING_ROWS: " rows of its encoding and shard",
    Per.ENCODING_ALL: " of its encoding, all shards",
    Per.KEY: " of its own key",
}


@app.command()
def graph(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a stage, in a list.")
    ] = False,
) -> None:
    """Print the stages in order: what each reads, and from which part of foundry.toml."""
    from assets.registry import STAGES

    if as_json:
        print(json.dumps([declaration(stage) for stage in STAGES.values()], ensure_ascii=False))
    else:
        print(page(STAGES.values()), end="")


def declaration(stage: Stage) -> dict[str, Any]:
    """What a stage declares, as plain values."""
    return {
        "stage": stage.name,
        "description": " ".join(stage.description.split()),
        "group": stage.group,
        "scope": stage.scope.value,
        "version": stage.version,
        "table": stage.table,
        "reads": [_reads(item) for item in stage.reads],
        "follows": [_reads(item) for item in stage.follows],
        "also": [_reads(item) for item in stage.also],
        "config": settings(stage),
        "models": list(stage.models),
        "others": _others(stage),
    }


def _reads(item: Reads) -> dict[str, Any]:
    return {"table": item.table, "columns": list(item.columns), "per": item.per.value}


def _others(stage: Stage) -> str:
    """What else a stage digests, in the words of the function that does it."""
    if stage.others is no_others:
        return ""
    return " ".join(
        (inspect.getdoc(stage.others) or stage.others.__name__).split("\n\n")[0].split()
    )


def settings(stage: Stage) -> dict[str, list[str]]:
    """The sections of foundry.toml that a stage reads, with the keys of each; no keys where it
    reads the whole section."""
    if stage.config is nothing:
        return {}
    config = WorkspaceConfig(
        encodings={NAME: EncodingConfig()}, prompt_sets={NAME: PromptSetConfig(file=NAME)}
    )
    key = str(ShardKey(NAME, "s000000")) if stage.scope is Scope.ENCODING_SHARD else NAME
    section = stage.config(config, key)
    names = list(section) if isinstance(section, Mapping) else []
    if stage.settings:
        return {stage.settings.format(key=NAME.upper(), encoding=NAME.upper()): names}
    plain = [name for name in names if isinstance(getattr(config, name), int)]
    found: dict[str, list[str]] = {name: [] for name in names if name not in plain}
    return found | ({"": plain} if plain else {})


def page(stages: Iterable[Stage]) -> str:
    """All stages in order, on lines of at most 80 characters."""
    return "\n\n".join("\n".join(_lines(stage)) for stage in stages) + "\n"


def _lines(stage: Stage) -> Iterator[str]:
    """A stage with its declaration."""
    table = f", table {stage.table}" if stage.table != stage.name else ""
    yield f"{stage.name}: {_SCOPES[stage.scope]}, group {stage.group}, version {stage.version}{table}"
    for label, slices in (
        ("reads", stage.reads),
        ("follows", stage.follows),
        ("looks at", stage.also),
    ):
        for item in slices:
            columns = f": {', '.join(item.columns)}" if item.columns else ""
            yield from _entry(label, f"{item.table}{_PARTS[item.per]}{columns}")
    for section, names in settings(stage).items():
        title = f"[{section}] " if section else ""
        yield from _entry("settings", f"{title}{', '.join(names)}")
    if stage.models:
        yield from _entry("models", ", ".join(stage.models))
    if others := _others(stage):
        yield from _entry("others", others)


def _entry(label: str, text: str) -> list[str]:
    """One entry, its further lines under its first."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label}".ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown() -> str:
    """`docs/graph.md`: the page, with what its words mean."""
    from assets.registry import STAGES

    return f"""# The graph

Made from the declarations of the stages by `python -m jobs.cli.graph`; `foundry graph` prints the
same. In order, of each stage:

- *reads*: slices of tables. A change of one makes the stage stale.
- *follows*: tables that it depends on in another way: its *others* digest them, or a run freezes
  them once.
- *looks at*: tables that it only shows in its report, or that it wrote before. No order follows
  from them, and unless its *others* digest them they make nothing stale.
- *settings*: the section of foundry.toml, with the keys that it reads where it does not read all.
- *models*: keys under [models] whose weights it runs.
- *others*: what else it digests.

While a stage works, reading any other table or column fails.

```
{page(STAGES.values())}```
"""


if __name__ == "__main__":
    print(markdown(), end="")
