"""Commands that judge: `foundry evaluate`, `compare`, `external`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.shared import Home, open_store
from resources.workspace.store import Store
from training.errors import ConfigError

app = typer.Typer()


@app.command()
def evaluate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoints: RUN@SAMPLES, RUN for its last, base, champion, an external model."
        ),
    ] = None,
    home: Home = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Without a workspace: model folder.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Without a workspace: prompt file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Without a workspace: new folder for images.")
    ] = None,
    adopt: Annotated[
        Path | None, typer.Option("--adopt", help="Take over a folder that --out has filled.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the prompt file for another machine.")
    ] = None,
) -> None:
    """Draw, score and judge checkpoints; or only draw them, on another machine."""
    from jobs import comparison
    from jobs.cli import console

    alone = [value for value in (checkpoint, prompts, out) if value is not None]
    if len(alone) not in (0, 3) or sum(map(bool, (names, alone, adopt, export))) > 1:
        raise ConfigError(
            "evaluate takes names, or --checkpoint, --prompts and --out together, or --adopt, or --export: one of them"
        )
    started = time.monotonic()
    if checkpoint is not None and prompts is not None and out is not None:
        with console.progress():
            drawn = comparison.draw_elsewhere(checkpoint.expanduser().resolve(), prompts, out)
        print(
            f"drew {drawn} images in {time.monotonic() - started:.0f} s; at home: foundry evaluate --adopt {out.name}"
        )
        return
    store = open_store(home)
    if export is not None:
        print(f"wrote {comparison.export(store, export)} prompts to {export}")
    elif adopt is not None:
        name = comparison.adopt(store, adopt)
        print(f"adopted the images of {name}; score them with: foundry evaluate {name}")
    else:
        with console.progress() as announce:
            done = comparison.evaluate(store.home, names or [], started=announce)
        console.evaluated(Store(store.home), done)


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="Compared against: RUN@SAMPLES, RUN, base, champion, an external model."
        ),
    ],
    b: Annotated[str, typer.Argument(help="Judged.")],
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether checkpoint B is better than A: the verdict, the table and a page."""
    from jobs import comparison
    from jobs.cli import console

    store = open_store(home)
    with console.progress() as announce:
        found = comparison.compare(store.home, a, b, started=announce)
    if as_json:
        verdicts = found.verdicts.to_dicts()
        print(
            json.dumps(
                {"a": found.a, "b": found.b, "report": str(found.report), "verdicts": verdicts},
                default=str,
            )
        )
    else:
        console.compared(found)


external_app = typer.Typer(
    no_args_is_help=True, help="Models made by others, sampled and judged beside ours."
)
app.add_typer(external_app, name="external")
app.add_typer(external_app, name="rival", hidden=True, deprecated=True)  # its name until 0.2


@external_app.command("add")
def external_add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[Path, typer.Argument(help="Diffusers folder or .safetensors file.")],
    home: Home = None,
) -> None:
    """Enter a model; the next evaluation draws and judges it with the workspace's prompts."""
    from training.evaluation import candidates
    from training.models.base_model import inspect

    model = path.expanduser().resolve()
    about = inspect(model)
    checkpoint = candidates.add_external_model(open_store(home).home, name, model)
    print(
        f"{checkpoint}: {about['family']}, {about['num_parameters'] / 1e6:,.0f} M parameters; "
        f"next: foundry evaluate {name}"
    )


@external_app.command("remove")
def external_remove(
    name: Annotated[str, typer.Argument(help="Its name.")], home: Home = None
) -> None:
    """Strike a model off the list; its images and scores stay."""
    from training.evaluation import candidates

    candidates.remove_external_model(open_store(home).home, name)


@external_app.command("list")
def external_list(home: Home = None) -> None:
    """Print names and paths."""
    from training.evaluation import candidates

    for name, path in candidates.read_external_models(open_store(home).home).items():
        print(f"{name}  {path}")


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Images made anywhere, a folder per model.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="CSV with a column Prompts, or a prompt file.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where tables go; default: <FOLDER>_scores.")
    ] = None,
    home: Home = None,
) -> None:
    """Score images with the workspace's networks; models that are done already are skipped."""
    from jobs import scoring
    from jobs.cli import console
    from training.evaluation.external_images import SUMMARY

    store, images = open_store(home), folder.expanduser().resolve()
    target = out or images.with_name(f"{images.name}_scores")
    with console.progress():
        outcomes = list(scoring.score_folder(store, images, prompts, target))
    for model in outcomes:
        state = "scored before" if model.skipped else f"{model.num_images} images"
        print(
            f"{model.name}: {state}"
            + (f", {model.num_failed} could not be scored" if model.num_failed else "")
        )
    print(f"summary: {target / SUMMARY}")
