"""`foundry latents`: encode latents anew, and move them in and out."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.shared import Home, open_store

app = typer.Typer(no_args_is_help=True, help="Encode latents anew, and move them in and out.")


@app.command("reencode")
def latents_reencode(
    home: Home = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="Only this one.")] = None,
    shards: Annotated[
        int, typer.Option("--shards", help="At most so many, the oldest first; 0 for all.", min=0)
    ] = 0,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Begin no shard after this.")
    ] = None,
) -> None:
    """Write the next generation of the oldest latents; a running trainer takes it up itself."""
    from jobs import encode
    from jobs.cli import console

    store = open_store(home)
    with console.progress() as announce:
        announce("latents", shards or len(store.tables.parts("latents")), ["encoded anew"])
        done, left = encode.reencode(
            store.home, encoding=encoding, num_shards=shards, max_minutes=max_minutes
        )
    print(f"encoded anew: {', '.join(done) or 'nothing'}")
    if left:
        print(f"no time for {len(left)} shards, the first is {left[0]}")
        raise typer.Exit(1)


@app.command("import")
def latents_import(
    folder: Annotated[Path, typer.Argument(help="Folder of the files.")],
    encoding: Annotated[str, typer.Option("--encoding", help="Encoding that they become.")],
    kind: Annotated[
        Literal["kohya", "bigasp"], typer.Option("--format", help="Whose files they are.")
    ] = "kohya",
    index: Annotated[
        Path | None, typer.Option("--index", help="CSV file,source_id: whose each file is.")
    ] = None,
    home: Home = None,
) -> None:
    """Take over latents that another trainer has cached; the next run encodes what is missing."""
    from jobs import exchange
    from jobs.cli import console

    store = open_store(home)
    with console.progress():
        done = exchange.import_latents(store, encoding, folder.expanduser().resolve(), kind, index)
    print(f"imported {done.num_images} images into {len(done.shards)} shards")
    print(f"reconstruction error of a sample: {done.error:.1f} of 255")
    for reason, count in done.refused:
        print(f"not imported: {count} {reason}")
    print(
        f"encode the others with: foundry run --home {shlex.quote(str(store.home))} --select latents"
    )


@app.command("export")
def latents_export(
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    encoding: Annotated[str, typer.Option("--encoding", help="Encoding to write.")],
    home: Home = None,
) -> None:
    """Write the current latents as kohya's trainers cache them, one .npz an image."""
    from jobs import exchange
    from jobs.cli import console

    store = open_store(home)
    with console.progress():
        written = exchange.export_latents(store, encoding, folder.expanduser().resolve())
    print(f"wrote {written} files to {folder}")
