"""Commands on a workspace: make one, bring it up to date, ask, check, clean and serve it."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.shared import Home, if_interrupted, open_store
from resources.workspace.store import Store
from training.errors import ConfigError

app = typer.Typer()


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Folder of the new workspace.")],
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Folder of images; may repeat.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Recipe whose [workspace] half to copy.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use the demo's tiny models and sizes.")
    ] = False,
) -> None:
    """Make a workspace."""
    from resources.workspace.setup import create

    create(path.expanduser().resolve(), sources=source or [], preset=preset, tiny=tiny)
    print(f"made {path.expanduser().resolve()}; next: foundry run --home {shlex.quote(str(path))}")


@app.command()
def run(
    home: Home = None,
    select: Annotated[
        str | None, typer.Option("--select", help="Assets, in Dagster's selection syntax.")
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Leave stale stages upstream of the selection alone.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Start no partition after this.")
    ] = None,
    accept_missing: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-missing",
            help="Source that has lost files as it should; may repeat.",
            metavar="SOURCE",
        ),
    ] = None,
) -> None:
    """Bring the graph up to date: does what is missing or stale, and only that."""
    from jobs import pipeline
    from jobs.cli import console

    store = open_store(home)
    if_interrupted(lambda: _run_interrupted(store))
    started = time.monotonic()
    with console.progress() as announce:
        outcomes = pipeline.bring_up_to_date(
            store.home,
            select=select,
            only=only,
            max_minutes=max_minutes,
            accept_missing=accept_missing or (),
            started=announce,
        )
    console.summary(Store(store.home), outcomes, time.monotonic() - started)
    if any(outcome.unfinished for outcome in outcomes):
        raise typer.Exit(1)


def _run_interrupted(store: Store) -> str:
    """What is kept, how to go on, and which trainers go on by themselves."""
    from resources import torchrun
    from resources.graph import Scope

    home = shlex.quote(str(store.home))
    said = f"what is committed stays; go on with `foundry run --home {home}`"
    for run in store.currency.keys(Scope.RUN):
        if torchrun.is_running(store.paths.run_folder(run)):
            command = f"`foundry train --home {home} --run {run} --stop`"
            said += f"; the trainer of {run} goes on by itself, stop it with {command}"
    return said


@app.command()
def status(
    home: Home = None,
    select: Annotated[
        str | None, typer.Option("--select", help="Assets, in Dagster's selection syntax.")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="List every stale partition with its reasons.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a stage, in a list.")
    ] = False,
) -> None:
    """Say what is stale, why, and how long `foundry run` will take; does nothing."""
    from dataclasses import asdict

    from jobs import pipeline
    from jobs.cli import console

    found = pipeline.status(open_store(home).home, select)
    if as_json:
        print(
            json.dumps(
                [asdict(item) | {"sentence": item.sentence} for item in found], ensure_ascii=False
            )
        )
    else:
        console.status(found, why=why)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One DuckDB statement over the tables.")],
    home: Home = None,
    format: Annotated[
        Literal["table", "jsonl", "csv"], typer.Option("--format", help="How to print.")
    ] = "table",
) -> None:
    """Query every table."""
    from jobs.cli import console
    from resources.warehouse import query as ask

    console.rows(ask(open_store(home), query), format)


@app.command()
def verify(
    home: Home = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move damage to quarantine/ for the next run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare every committed file with its manifest."""
    from dataclasses import asdict

    from jobs.cli import console
    from resources.operations import maintenance

    store = open_store(home)
    if as_json and repair:
        raise ConfigError("--json only reports: run --repair without it")
    with console.progress():
        problems = maintenance.verify(store)
    if as_json:
        num_parts = len(maintenance.digests(store))
        print(
            json.dumps(
                {"parts": num_parts, "problems": [asdict(problem) for problem in problems]},
                default=str,
            )
        )
        raise typer.Exit(1 if any(problem.kind == "damage" for problem in problems) else 0)
    for problem in problems:
        print(f"{problem.kind}: {problem.detail}")
    damage = [problem for problem in problems if problem.kind == "damage"]
    print(
        f"{len(damage)} damaged, {len(problems) - len(damage)} orphans, {len(maintenance.digests(store))} parts checked"
    )
    if damage and repair:
        for path in maintenance.repair(store, problems):
            print(f"moved to {path}")
        print(f"rebuild with: foundry run --home {shlex.quote(str(store.home))}")
    elif damage:
        print("repair with: foundry verify --repair", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def digest(
    home: Home = None,
    table: Annotated[str | None, typer.Option("--table", help="Only this table.")] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Digests of a training run's checkpoints.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another workspace to compare with.")
    ] = None,
) -> None:
    """Print logical digests, or compare two workspaces within the tolerance of each column."""
    from jobs.cli import console
    from resources.operations import maintenance

    store = open_store(home)
    if against is not None and run is None:
        with console.progress():
            lines = maintenance.differences(store, Store(against.expanduser().resolve()), table)
        print("\n".join(lines) or "equal")
        raise typer.Exit(1 if lines else 0)
    with console.progress():
        found = (
            maintenance.digests(store, table)
            if run is None
            else maintenance.run_digests(store, run)
        )
    for name, value in found.items():
        print(f"{value}  {name}")


@app.command()
def gc(home: Home = None) -> None:
    """Delete what no manifest names after a day, and latents that no run reads any more."""
    from jobs.cli import console
    from resources.operations import maintenance
    from resources.workspace import generations

    store = open_store(home)
    with console.progress():
        replaced, latent_bytes = generations.collect(store)
        removed, num_bytes = maintenance.collect_garbage(store)
    print(f"removed {len(removed)} files, {num_bytes / 1e6:.1f} MB")
    print(f"removed {len(replaced)} generations of latents, {latent_bytes / 1e6:.1f} MB")


@app.command()
def forget(
    image_id: Annotated[list[str], typer.Argument(help="SHA-256 of the file.")], home: Home = None
) -> None:
    """Remove every row and latent derived from images, permanently."""
    from jobs.cli import console
    from resources.operations import forget as forgetting

    store = open_store(home)
    with console.progress():
        done = forgetting.forget(store, image_id)
    print(
        f"rewrote {len(done['parts'])} parts and {len(done['generations'])} generations of latents"
    )
    for name in done["sources"]:
        print(f"the file itself lies in your folder, delete it there: {name}")
    print(f"runs that saw one of them: {', '.join(done['runs']) or 'none'}")
    if done["unfinished"]:
        print(f"go on only with `--without-forgotten`: {', '.join(done['unfinished'])}")


@app.command()
def up(
    home: Home = None,
    port: Annotated[int, typer.Option("--port", help="Dagster's port.")] = 3000,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", help="MLflow's port.")] = 5000,
) -> None:
    """Serve Dagster and MLflow for one workspace on 127.0.0.1."""
    from jobs.serve import serve

    raise typer.Exit(serve(open_store(home).home, dagster_port=port, mlflow_port=mlflow_port))
