"""Commands on training runs, and what they would take: time, memory, money, prompts and buckets."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.shared import Home, if_interrupted, open_store
from resources.workspace.store import Store
from training.config.run import BatchConfig, RunConfig
from training.errors import ConfigError

app = typer.Typer()

Gpu = Annotated[str, typer.Option("--gpu", help="Kind of card, for estimates.")]
Price = Annotated[float, typer.Option("--price", help="Dollars per card and hour.")]
RatesFile = Annotated[
    Path | None, typer.Option("--rates", help="JSON that benchmarks/train_throughput.py wrote.")
]


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
    from resources.workspace import setup

    num_modes = dry_run + stop + (bundle is not None)
    _check_options(recipe, bool(set_ or tiny), world_size, dry_run, num_modes)
    store = open_store(home)
    if stop:
        _stop(store, run)
        return
    if dry_run:
        config = setup.resolve_run(store, run, recipe, set_ or [], tiny=tiny)
        _print_estimates(store, run, config, world_size, gpu, price, rates)
        return
    if recipe is not None:
        setup.configure_run(store.home, run, recipe, set_ or [], tiny=tiny)
    setup.require_run(store, run)
    if without_forgotten:
        print(f"run {run} goes on without {setup.leave_out_forgotten(store, run)} forgotten images")
    if bundle is not None:
        _bundle(store, run, bundle)
    else:
        _train(store, run)


def _check_options(
    recipe: str | None, changes: bool, world_size: int | None, dry_run: bool, num_modes: int
) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names them.
    """
    if num_modes > 1:
        raise ConfigError("--dry-run, --stop and --bundle do different things: give one of them")
    if recipe is None and changes:
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


def _stop(store: Store, run: str) -> None:
    """Ask the running trainer to save and stop, and wait for it."""
    from resources import torchrun

    folder = store.paths.run_folder(run)
    if not torchrun.is_running(folder):
        print(f"run {run}: no trainer is running")
        return
    ending = torchrun.start_or_attach(folder, 1).stop()
    print(f"run {run}: {ending['event']} at {ending['samples_seen']} samples")


def _print_estimates(
    store: Store,
    run: str,
    config: RunConfig,
    world_size: int | None,
    gpu: str,
    price: float,
    rates: Path | None,
) -> None:
    """Print the recipe and what the run would take."""
    from jobs import estimates
    from training.config import recipes

    num_ranks = world_size or config.num_processes
    hardware = estimates.Hardware(num_gpus=num_ranks, gpu=gpu, dollars_per_hour=price, rates=rates)
    print(recipes.run_toml(config))
    print("\n".join(estimates.dry_run(store, run, config, hardware)))


def _bundle(store: Store, run: str, bundle: Path) -> None:
    """Write all that the run needs into a new folder."""
    from jobs import bundles
    from jobs.cli import console

    with console.progress() as announce:
        num_bytes = bundles.write(store.home, run, bundle.expanduser().resolve(), started=announce)
    print(
        f"wrote {bundle}, {num_bytes / 1e6:.1f} MB; its README.md says how to train it and bring it back"
    )


def _train(store: Store, run: str) -> None:
    """Start, resume, follow or adopt the run."""
    from resources import torchrun
    from training.runs.run_folder import read_config

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
        int | None, typer.Option("--generated", help="Images drawn by evaluations.", min=0)
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
    if plans.follows_image(config):
        print(
            "no list: each image keeps its own size, cut to multiples of the step",
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
    """Print prompts as a run will see them, or measure the length of prompts by people."""
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
