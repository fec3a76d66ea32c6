"""`foundry`: the command line. Thin: each command checks its arguments, calls one function and
prints."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli import evaluation
from jobs.cli.shared import Home, if_interrupted, interrupted, open_store, opened
from resources.workspace.store import Store
from training.commit import disk_trouble
from training.config.run import BatchConfig
from training.errors import ConfigError, PipelineError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a folder of pictures to a fine-tuned, evaluated Stable Diffusion model.",
)

app.add_typer(evaluation.app)

Gpu = Annotated[str, typer.Option("--gpu", help="Kind of card, for estimates.")]
Price = Annotated[float, typer.Option("--price", help="Dollars per card and hour.")]
INTERRUPTED = 130
"""Typer's status after Ctrl-C."""
RatesFile = Annotated[
    Path | None, typer.Option("--rates", help="JSON that benchmarks/train_throughput.py wrote.")
]


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


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Folder of the new workspace.")],
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Folder of pictures; may repeat.")
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
    from resources.operations import maintenance as upkeep

    store = open_store(home)
    if against is not None and run is None:
        with console.progress():
            lines = upkeep.differences(store, Store(against.expanduser().resolve()), table)
        print("\n".join(lines) or "equal")
        raise typer.Exit(1 if lines else 0)
    with console.progress():
        found = upkeep.digests(store, table) if run is None else upkeep.run_digests(store, run)
    for name, value in found.items():
        print(f"{value}  {name}")


@app.command()
def gc(home: Home = None) -> None:
    """Delete what no manifest names and is older than a day, and generations of latents that nobody reads any more."""
    from jobs.cli import console
    from resources.operations import maintenance as upkeep
    from resources.workspace import generations

    store = open_store(home)
    with console.progress():
        replaced, latent_bytes = generations.collect(store)
        removed, num_bytes = upkeep.collect_garbage(store)
    print(f"removed {len(removed)} files, {num_bytes / 1e6:.1f} MB")
    print(f"removed {len(replaced)} generations of latents, {latent_bytes / 1e6:.1f} MB")


@app.command()
def forget(
    image_id: Annotated[list[str], typer.Argument(help="SHA-256 of the file.")], home: Home = None
) -> None:
    """Remove every row and latent derived from images, for ever."""
    from jobs.cli import console
    from resources.operations import maintenance as upkeep

    store = open_store(home)
    with console.progress():
        done = upkeep.forget(store, image_id)
    print(
        f"rewrote {len(done['parts'])} parts and {len(done['generations'])} generations of latents"
    )
    for name in done["sources"]:
        print(f"the file itself lies in your folder, delete it there: {name}")
    print(f"runs that saw one of them: {', '.join(done['runs']) or 'none'}")
    if done["unfinished"]:
        print(f"go on only with `--without-forgotten`: {', '.join(done['unfinished'])}")


@app.command()
def train(
    run: Annotated[str, typer.Option("--run", help="Name of the training run.")],
    home: Home = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe whose [run] half to train.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; may repeat.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Divide sizes by recipes/tiny.toml.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe and estimates; write nothing.")
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size",
            "--gpus",
            help="With --dry-run: ranks; the run's num_processes by default.",
        ),
    ] = None,
    gpu: Gpu = "H200",
    price: Price = 3.0,
    rates: RatesFile = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="Ask the running trainer to save and stop.")
    ] = False,
    without_forgotten: Annotated[
        bool,
        typer.Option(
            "--without-forgotten", help="Go on without images of the set that were forgotten."
        ),
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Write all that the run needs into this new folder instead."),
    ] = None,
) -> None:
    """Start, resume or follow a training run, or adopt one that was trained elsewhere."""
    from resources import torchrun
    from resources.workspace import setup
    from training.runs.run_folder import read_config

    if dry_run + stop + (bundle is not None) > 1:
        raise ConfigError("--dry-run, --stop and --bundle do different things: give one of them")
    if recipe is None and (set_ or tiny):
        raise ConfigError(
            "--set and --tiny change a recipe: name it with --recipe, or edit the run's config.toml"
        )
    if world_size is not None and not dry_run:
        raise ConfigError(
            f"--world-size {world_size} is for --dry-run; a run trains on its num_processes: "
            f"--set num_processes={world_size}"
        )
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size {world_size} must be at least 1: one rank for each card")
    store = open_store(home)
    if stop:
        folder = store.paths.run_folder(run)
        if not torchrun.is_running(folder):
            print(f"run {run}: no trainer is running")
            return
        ending = torchrun.start_or_attach(folder, 1).stop()
        print(f"run {run}: {ending['event']} at {ending['samples_seen']} samples")
        return
    if dry_run:
        from jobs import estimates
        from training.config import recipes

        config = setup.resolve_run(store, run, recipe, set_ or [], tiny=tiny)
        num_ranks = world_size or config.num_processes
        hardware = estimates.Hardware(
            num_gpus=num_ranks, gpu=gpu, dollars_per_hour=price, rates=rates
        )
        print(recipes.run_toml(config))
        print("\n".join(estimates.dry_run(store, run, config, hardware)))
        return
    if recipe is not None:
        setup.configure_run(store.home, run, recipe, set_ or [], tiny=tiny)
    setup.require_run(store, run)
    if without_forgotten:
        print(f"run {run} goes on without {setup.leave_out_forgotten(store, run)} forgotten images")
    if bundle is not None:
        from jobs import bundles
        from jobs.cli import console

        with console.progress() as announce:
            num_bytes = bundles.write(
                store.home, run, bundle.expanduser().resolve(), started=announce
            )
        print(
            f"wrote {bundle}, {num_bytes / 1e6:.1f} MB; its README.md says how to train it and bring it back"
        )
        return
    started, folder = time.monotonic(), store.paths.run_folder(run)
    if_interrupted(lambda: _train_interrupted(store, run))
    with torchrun.standing_by(folder, read_config(folder).num_processes):
        from jobs import pipeline
        from jobs.cli import console  # Dagster, while the trainer imports its own

        with console.progress() as announce:
            outcomes = pipeline.bring_up_to_date(
                store.home, select="checkpoints", run=run, started=announce
            )
    console.summary(Store(store.home), outcomes, time.monotonic() - started)


def _train_interrupted(store: Store, run: str) -> str:
    """What is kept of a run that is no longer followed, and how to go on."""
    from resources import torchrun
    from training.runs.run_folder import checkpoints

    folder, command = (
        store.paths.run_folder(run),
        f"`foundry train --home {shlex.quote(str(store.home))} --run {run}",
    )
    if torchrun.is_running(folder):
        return f"the trainer goes on by itself; follow it again with {command}`, stop it with {command} --stop`"
    saved = [path.name for path in checkpoints(folder)]
    kept = f"checkpoint {saved[-1]} stays" if saved else "the run has no checkpoint yet"
    return f"{kept}; go on with {command}`"


@app.command()
def cost(
    home: Home = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Configured run of the workspace.")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", help="Without --run: images of the data set.")
    ] = 0,
    samples: Annotated[
        int, typer.Option("--samples", help="Without --run: samples to train on.")
    ] = 0,
    generated: Annotated[
        int | None, typer.Option("--generated", help="Pictures drawn by evaluations.", min=0)
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Cards.", min=1)] = 1,
    gpu: Gpu = "H200",
    price: Price = 3.0,
    rates: RatesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate storage, GPU-hours, days and money of a fine-tune."""
    from dataclasses import replace

    from jobs import estimates
    from training.estimates import cost as model

    stored = None
    if run is not None:
        work, stored, advice = estimates.workspace_work(open_store(home), run)
    elif images and samples:
        work = model.Workload(num_images=images, num_samples=samples)
        advice = model.length_lines(images, samples, BatchConfig().global_batch_size)
    else:
        raise ConfigError("cost needs --run NAME, or --images N and --samples M")
    if generated is not None:
        work = replace(work, num_generated=generated)
    hardware = estimates.Hardware(num_gpus=gpus, gpu=gpu, dollars_per_hour=price, rates=rates)
    bill = model.estimate_cost(
        work, hardware.resolve(), num_gpus=gpus, dollars_per_hour=price, stored_bytes=stored
    )
    print(
        json.dumps(model.as_json(bill))
        if as_json
        else "\n".join([*estimates.cost_lines(bill), *advice])
    )


@app.command()
def buckets(
    plan: Annotated[str, typer.Argument(help="Name of a bucket plan.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, as in [encodings.*.buckets].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Print the sizes of a bucket plan, height before width."""
    from training import toml
    from training.buckets import plans
    from training.buckets.plans import BucketConfig

    config = toml.build(BucketConfig, toml.override({"plan": plan}, set_ or []))
    if plans.follows_picture(config):
        print(
            "no list: each picture keeps its own size, cut to multiples of the step",
            file=sys.stderr,
        )
    listed = [[size.height, size.width] for size in plans.plan(config)]
    print(json.dumps(listed) if as_json else "\n".join(map(json.dumps, listed)))


@app.command()
def prompts(
    run: Annotated[
        str | None, typer.Option("--run", help="Training run whose prompts to make.")
    ] = None,
    home: Home = None,
    n: Annotated[int, typer.Option("--n", help="How many.")] = 20,
    trace: Annotated[bool, typer.Option("--trace", help="Say how each came about.")] = False,
    fit: Annotated[
        Path | None, typer.Option("--fit", help="People's prompts, one a line: measure them.")
    ] = None,
) -> None:
    """Print prompts as a run will see them, or what people's prompts say of mean_tags and
    std_tags."""
    from training.prompts import prompt_statistics

    if (run is None) == (fit is None):
        raise ConfigError("prompts needs either --run NAME or --fit FILE")
    if fit is not None:
        mean, std = prompt_statistics.fit_lengths(fit)
        print(f"mean_tags = {mean:.1f}\nstd_tags = {std:.1f}")
    else:
        from resources.operations.run_prompts import example_prompts

        made, told, read = example_prompts(open_store(home), run or "", n, tell_sizes=trace)
        print(read, file=sys.stderr)
        for number, prompt in enumerate(made):
            print(prompt.text or "(empty)")
            if trace:
                print(f"    {prompt_statistics.trace_line(prompt)}")
                print(f"    {told[number]}")


latents_app = typer.Typer(
    no_args_is_help=True, help="Encode latents anew, and move them in and out."
)
app.add_typer(latents_app, name="latents")


@latents_app.command("reencode")
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
    """Write the next generation of the oldest latents now; a running trainer takes it up at its
    next epoch."""
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


@latents_app.command("import")
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
    """Take over latents that another trainer has cached; what is missing is encoded by the next
    run."""
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


@latents_app.command("export")
def latents_export(
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    encoding: Annotated[str, typer.Option("--encoding", help="Encoding to write.")],
    home: Home = None,
) -> None:
    """Write the current latents as kohya's trainers cache them, one .npz a picture."""
    from jobs import exchange
    from jobs.cli import console

    store = open_store(home)
    with console.progress():
        written = exchange.export_latents(store, encoding, folder.expanduser().resolve())
    print(f"wrote {written} files to {folder}")


@app.command()
def up(
    home: Home = None,
    port: Annotated[int, typer.Option("--port", help="Dagster's port.")] = 3000,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", help="MLflow's port.")] = 5000,
) -> None:
    """Serve Dagster and MLflow for one workspace on 127.0.0.1."""
    from jobs.serve import serve

    raise typer.Exit(serve(open_store(home).home, dagster_port=port, mlflow_port=mlflow_port))
