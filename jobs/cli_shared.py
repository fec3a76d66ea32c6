"""What all commands share: which workspace they work on."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from resources.store import Store, find_home

Home = Annotated[
    Path | None,
    typer.Option("--home", help="The workspace; default: FOUNDRY_HOME, the nearest one above, ./workspace."),
]


def open_store(home: Path | None, *, quiet: bool = False) -> Store:
    """The workspace of a command; says which."""
    store = Store(find_home(home))
    _ = store.config
    if not quiet:
        print(f"workspace {store.home}", file=sys.stderr)
    return store
