"""Commands in processes of their own, and the small workspace that the graph's tests work on."""

import atexit
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "photos"
UNSET = ("FOUNDRY_HOME", "DAGSTER_HOME")
SMALL_RUN = """
encoding = "sdxl"
num_samples = 96
[prompts]
mean_tags = 5.0
std_tags = 2.0
max_chunks = 1
[batch]
global_batch_size = 16
micro_batch_size = 16
[optimizer]
learning_rate = 3e-4
warmup_samples = 16
[validation]
every_samples = 48
[checkpoints]
every_samples = 48
"""


WARM = multiprocessing.get_context("forkserver")
"""Starts processes that have imported what commands need."""
WARM.set_forkserver_preload(
    [
        "jobs.cli.app", "jobs.definitions", "jobs.pipeline", "jobs.cli.console",
        "training.models.unet", "training.loop.trainer",
        "diffusers", "transformers", "scipy.stats", "mlflow", "mlflow.store.tracking.sqlalchemy_store",
        "dagster._core.storage.sqlite_storage", "dagster._core.storage.event_log",
        "dagster._core.storage.runs", "dagster._core.storage.schedules",
        "dagster._core.storage.local_compute_log_manager",
    ]
)  # fmt: skip


def _command(arguments, folder, environment, output, errors):
    """The body of a command's process, as the installed script has it."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["foundry", *arguments]
    from jobs.cli.app import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which processes of this kind leave out


def foundry(*arguments, check=True, folder=ROOT):
    """Run a command of `foundry` in a process of its own, forked from one that has imported the
    heavy libraries.

    A fresh process would import them for some seconds each time; the trainer and whatever else a
    command starts is one.
    """
    words = [str(argument) for argument in arguments]
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        process = WARM.Process(target=_command, args=(words, folder, environment, output, errors))
        process.start()
        process.join()
        done = subprocess.CompletedProcess(
            words, process.exitcode, output.read_text(), errors.read_text()
        )
    if check:
        assert done.returncode == 0, f"foundry {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def shorten(path, **values):
    """Give settings of a TOML file other values, wherever they stand in it."""
    text = path.read_text()
    for name, value in values.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert found, f"{path} has no {name}"
    path.write_text(text)


def make_short(home):
    """Give a new workspace a short run, few prompts and few sampling steps."""
    prompts = ROOT / "demo" / "prompts.csv"
    (home / "prompts.csv").write_text("".join(prompts.read_text().splitlines(keepends=True)[:7]))
    shorten(home / "foundry.toml", file='"prompts.csv"', num_steps="4")
    (home / "runs" / "demo" / "config.toml").write_text(SMALL_RUN)


def make_small(home, source):
    """A workspace on the small folder, with a short run and few prompts."""
    foundry("init", home, "--preset", "demo", "--source", source)
    shorten(home / "foundry.toml", min_score="1")
    make_short(home)


def digests(home):
    """Logical digest of every part, as `foundry digest` prints them."""
    lines = foundry("digest", "--home", home).stdout.splitlines()
    return dict(reversed(line.split("  ", 1)) for line in lines)
