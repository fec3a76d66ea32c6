"""Seconds from `foundry train` to the first step of the demo, beside a bare process; and those of a
dry run.

Usage: python benchmarks/bench_startup.py [--pairs N] [--home DIR]

The bare process imports the same classes of diffusers and transformers, loads the same model and
does one step of as many samples; `foundry train` also checks, writes the run, hashes what it reads,
validates the base model, and runs in Dagster. Pairs alternate, so that whatever else the machine
does meets both. Processor seconds of the trainer and of all processes stand beside: they hardly
depend on that. DIR is a demo workspace whose training set is made; without it one is made first, a
minute of work. Its runs `startup-*` are removed.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MAX_RATIO = 1.3
MAX_DRY_RATIO = 2.0
BATCH = 32
"""Samples of the demo's step."""
HEIGHT, WIDTH = 13, 19
"""Latents of its largest bucket."""
BARE = """
import sys
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

base, batch, height, width = sys.argv[1], *map(int, sys.argv[2:])
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
encoders = [CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")]
tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=name) for name in ("tokenizer", "tokenizer_2")]
scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
encoders[1].requires_grad_(False)
unet.train()
optimizer = torch.optim.AdamW([*unet.parameters(), *encoders[0].parameters()], lr=1e-4, fused=True)
ids = [tokenizer(["a red star"] * batch, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
       .input_ids for tokenizer in tokenizers]
outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(encoders, ids)]
text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
latents, noise = torch.randn(2, batch, 4, height, width)
steps = torch.randint(0, 1000, (batch,))
added = {"text_embeds": outputs[1].text_embeds, "time_ids": torch.zeros(batch, 6)}
prediction = unet(scheduler.add_noise(latents, noise, steps), steps, encoder_hidden_states=text,
                  added_cond_kwargs=added).sample
torch.nn.functional.mse_loss(prediction, noise).backward()
optimizer.step()
print("step", flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """From the launch to the first step."""

    wall_s: float
    """As a user waits."""
    own_s: float
    """Processor seconds of the process that trains."""
    all_s: float
    """Of all processes."""


def bare(base: Path) -> Start:
    """The least that training the model by the libraries' own classes takes."""
    began = time.monotonic()
    arguments = [sys.executable, "-c", BARE, base, *map(str, (BATCH, HEIGHT, WIDTH))]
    threads = str(len(os.sched_getaffinity(0)))
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"step\n", "the bare process failed"
        wall = time.monotonic() - began
        spent = _spent(psutil.Process(process.pid))
        process.kill()
    return Start(wall_s=wall, own_s=spent, all_s=spent)


def foundry_train(home: Path, run: str) -> Start:
    """`foundry train` to the first `step` line of events.jsonl."""
    began, events = time.monotonic(), home / "runs" / run / "events.jsonl"
    command = [
        Path(sys.executable).with_name("foundry"),
        "train",
        "--home",
        home,
        "--run",
        run,
        "--recipe",
        "demo",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        while not (events.is_file() and b'"event": "step"' in events.read_bytes()):
            assert launcher.poll() is None, "foundry train ended before its first step"
            time.sleep(0.01)
        wall = time.monotonic() - began
        opening = json.loads(events.read_text().splitlines()[0])
        trainer = psutil.Process(opening["pid"])
        parent = psutil.Process(launcher.pid)
        members = {
            member.pid: member for member in [parent, *parent.children(recursive=True), trainer]
        }
        found = Start(wall_s=wall, own_s=_spent(trainer), all_s=sum(map(_spent, members.values())))
        trainer.kill()
        launcher.wait()
    shutil.rmtree(home / "runs" / run)
    return found


def command_seconds(arguments: list[str | Path]) -> Start:
    """A command that ends by itself."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(wall_s=wall, own_s=spent, all_s=spent)


def _spent(process: psutil.Process) -> float:
    """Processor seconds of a process, and of its children that have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def compare(
    first: tuple[str, Callable[[], Start]],
    second: tuple[str, Callable[[], Start]],
    pairs: int,
    limit: float,
) -> None:
    """Measure two things by turns, and print medians and the median of the pairs' ratios."""
    measured: list[tuple[Start, Start]] = []
    for _ in range(pairs):
        one = first[1]()
        measured.append((one, second[1]()))
    for (name, _), runs in zip((first, second), zip(*measured, strict=True), strict=True):
        values = (
            statistics.median(getattr(run, field) for run in runs)
            for field in ("wall_s", "own_s", "all_s")
        )
        print("{:<34}{:8.2f} s{:12.2f} s{:12.2f} s".format(name, *values))
    ratios = [
        statistics.median(getattr(b, field) / getattr(a, field) for a, b in measured)
        for field in ("wall_s", "own_s", "all_s")
    ]
    print(
        "{:<34}{:8.2f}  {:12.2f}  {:12.2f}".format(f"ratio (limit {limit}, of the wall)", *ratios)
    )


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--home", type=Path)
    arguments = parser.parse_args()
    os.environ["GOMP_SPINCOUNT"] = "20000"  # as `foundry` sets it, for both sides
    foundry = Path(sys.executable).with_name("foundry")
    with contextlib.ExitStack() as stack:
        home = arguments.home
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "workspace"
            made = ("training_set", "base_model", "tag_vocabulary")
            subprocess.run(
                [foundry, "init", home, "--preset", "demo"], check=True, stdout=subprocess.DEVNULL
            )
            subprocess.run(
                [foundry, "run", "--home", home, "--select", ",".join(made)],
                check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        numbers = iter(range(arguments.pairs))
        print(
            f"{'medians of ' + str(arguments.pairs) + ' pairs':<34}{'wall':>8}  {'trainer CPU':>12}  {'all CPU':>12}"
        )
        compare(
            ("bare process to its step", lambda: bare(ROOT / "demo" / "models" / "base")),
            ("foundry train to its first step", lambda: foundry_train(home, f"startup-{next(numbers)}")),
            arguments.pairs, MAX_RATIO,
        )  # fmt: skip
        dry = [foundry, "train", "--home", home, "--run", "demo", "--dry-run"]
        compare(
            ("python -c 'import torch'", lambda: command_seconds([sys.executable, "-c", "import torch"])),
            ("foundry train --dry-run", lambda: command_seconds(dry)),
            arguments.pairs, MAX_DRY_RATIO,
        )  # fmt: skip


if __name__ == "__main__":
    main()
