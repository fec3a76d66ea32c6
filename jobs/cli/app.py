"""`foundry`: the command line. Thin: each command checks its arguments, calls one function and
prints."""

import os
import sys

import typer

from jobs.cli import evaluation, graph, latents, training, workspace
from jobs.cli.shared import interrupted, opened
from training.commit import disk_trouble
from training.errors import PipelineError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a folder of images to a fine-tuned, evaluated Stable Diffusion model.",
)
for group in (workspace, graph, training, evaluation):
    app.add_typer(group.app)
app.add_typer(latents.app, name="latents")

INTERRUPTED = 130
"""Typer's status after Ctrl-C."""


def main() -> None:
    """Run a command; what the user can mend is one line on stderr and status 2."""
    # OpenMP's threads spin long while they wait, which on a shared machine is fifty times slower
    # than sleeping at once; sleeping at once makes the small layers of the tiny models twice as
    # slow. This spins for some microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # oneDNN compiles a kernel for each shape and keeps 1,024 of them: buckets times batch sizes are
    # many more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
    try:
        app(prog_name="foundry")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(f"foundry: interrupted; {interrupted()}", file=sys.stderr)
        raise
    except PipelineError as error:
        print(f"foundry: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        message = disk_trouble(
            error, getattr(error, "filename", None) or opened() or "the workspace"
        )
        if message is None:
            raise
        print(f"foundry: {message}", file=sys.stderr)
        sys.exit(2)
