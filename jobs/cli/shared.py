"""What all commands share: which workspace they work on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from resources.workspace.paths import find_home
from resources.workspace.store import Store

Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="The workspace; default: FOUNDRY_HOME, the nearest one above, ./workspace."
    ),
]


_kept: list[Callable[[], str]] = []
_opened: list[Path] = []


def if_interrupted(say: Callable[[], str]) -> None:
    """Let Ctrl-C say this: what is kept, and how to go on."""
    _kept.append(say)


def interrupted() -> str:
    """What Ctrl-C says now."""
    return _kept[-1]() if _kept else "what is committed stays; run the same command again"


def opened() -> Path | None:
    """The workspace that this process's command works on, as soon as it is known."""
    return _opened[-1] if _opened else None


def open_store(home: Path | None, *, quiet: bool = False) -> Store:
    """The workspace of a command; says which."""
    store = Store(find_home(home))
    _opened.append(store.home)
    _ = store.config
    if not quiet:
        print(f"workspace {store.home}", file=sys.stderr)
    return store
