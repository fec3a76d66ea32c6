"""A workspace whose MLflow has something to show, and that MLflow as a process to stop, hang and
kill."""

import contextlib
import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import psutil
from PIL import Image, ImageDraw, ImageFilter

from resources.mlflow.tracking import Tracking, workspace_tracking
from training.runs import run_folder
from training.runs.event_log import EventLog
from training.tables.schemas import TABLES

ROOT = Path(__file__).parents[2]
EVERY, STEPS, BATCH = 20_000, 60, 1_000
THINGS = ("moon", "star", "house", "tree")
PROMPTS = [
    (f"{group}-{number}", group, text)
    for group, texts in {
        "caption": (
            "a full moon over a calm sea",
            "a yellow star at dusk",
            "a red house on a hill",
        ),
        "hands": (
            "two hands that hold a star",
            "a hand that points at the moon",
            "hands that build a house",
        ),
        "two_colours": (
            "a blue house beside a green tree",
            "a red star above a blue hill",
            "a white moon, black sea",
        ),
        "written_text": (
            "a sign that says STAR",
            "a sign that says HOUSE",
            "a sign that says TREE",
        ),
    }.items()
    for number, text in enumerate(texts)
]
RUNS = {"first": (1e-5, 0.62), "slow-rate": (4e-6, 0.45), "two-colours": (2e-5, 0.85)}
"""Run -> learning rate, and how sharp its last images are, 0 to 1."""


def scene(number: int, sharpness: float) -> Image.Image:
    """Image of one prompt, 256 px: a drawn scene under a veil of blur and grain that goes as a
    model learns."""
    rng = np.random.default_rng(number)
    top, bottom, thing = (
        tuple(int(c) for c in rng.integers(low, low + 90, 3)) for low in (70, 150, 165)
    )
    image = Image.new("RGB", (256, 256))
    canvas = ImageDraw.Draw(image)
    for y in range(256):
        canvas.line(
            (0, y, 256, y),
            tuple(int(a + (b - a) * y / 256) for a, b in zip(top, bottom, strict=True)),
        )
    canvas.ellipse((-120, 170, 376, 420), fill=tuple(c // 3 + 20 for c in thing))
    x, y = (int(v) for v in rng.integers(80, 150, 2))
    match THINGS[number % 4]:
        case "moon":
            canvas.ellipse((x - 40, y - 40, x + 40, y + 40), fill=thing)
        case "star":
            angles = [math.pi * (n / 5 - 0.5) for n in range(10)]
            radii = [55 if n % 2 == 0 else 22 for n in range(10)]
            canvas.polygon(
                [
                    (x + r * math.cos(a), y + r * math.sin(a))
                    for a, r in zip(angles, radii, strict=True)
                ],
                fill=thing,
            )
        case "house":
            canvas.rectangle((x - 45, y, x + 45, y + 80), fill=thing)
            canvas.polygon(
                [(x - 60, y), (x, y - 60), (x + 60, y)], fill=tuple(c // 2 for c in thing)
            )
        case "tree":
            canvas.rectangle((x - 9, y + 20, x + 9, y + 100), fill=(90, 60, 40))
            canvas.ellipse((x - 50, y - 60, x + 50, y + 40), fill=thing)
    blurred = image.filter(ImageFilter.GaussianBlur(11 * (1 - sharpness)))
    grain = rng.normal(0, 45 * (1 - sharpness), (256, 256, 3))
    return Image.fromarray((np.asarray(blurred) + grain).clip(0, 255).astype(np.uint8))


def evaluate(tracking: Tracking, home: Path, checkpoint: str, sharpness: float) -> pl.DataFrame:
    """Draw and score a checkpoint's images, and send them."""
    folder = home / "sample_images" / checkpoint
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(checkpoint))
    samples, metrics = [], []
    for number, (prompt_id, group, text) in enumerate(PROMPTS):
        scene(number, sharpness).save(folder / f"{number}.png")
        key = {"prompt_id": prompt_id, "group": group}
        samples.append({**key, "text": text, "negative": "", "seed": number, "height": 256, "width": 256,
                        "file": f"{number}.png", "sha256": ""})  # fmt: skip
        for metric, value in {
            "clip_score": 0.2 + sharpness / 12,
            "aesthetic": 4.6 + 1.6 * sharpness,
        }.items():
            metrics.append({**key, "metric": metric, "value": value + rng.normal(0, 0.01)})
    scores = (
        pl.DataFrame(metrics)
        .group_by("metric")
        .agg(pl.col("value").mean())
        .sort("metric")["value"]
        .to_list()
    )
    summary = {
        "mean_LAIONScore": scores[0],
        "Clipscore_mean": scores[1],
        "std_LAIONScore": 0.3,
        "num_failed": 0.0,
    }
    metrics += [
        {"prompt_id": None, "group": None, "metric": name, "value": value}
        for name, value in summary.items()
    ]
    tracking.log_evaluation(
        checkpoint,
        metrics=pl.DataFrame(metrics, schema=TABLES["eval_metrics"].schema),
        samples=pl.DataFrame(samples, schema=TABLES["sample_images"].schema),
        folder=folder,
    )


def prepare_run(home: Path, name: str, settings: str = "", seed: int = 7) -> Path:
    """The folder of a run that has not written an event yet."""
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / run_folder.CONFIG).write_text(f'encoding = "sdxl"\nseed = {seed}\n{settings}')
    fingerprint = hashlib.sha256(b"set").hexdigest()
    inputs = run_folder.RunInputs(
        run=name, training_set=home / "set.parquet", training_set_sha256="0" * 64, fingerprint=fingerprint,
        vocabulary=folder / "vocabulary.parquet", vocabulary_sha256="0" * 64, latents=home / "latents",
        base_model=home / "base", base_digest="b" * 64,
    )  # fmt: skip
    run_folder.write_inputs(folder, inputs)
    return folder


def train(
    tracking: Tracking, home: Path, name: str, learning_rate: float, sharpness: float, seed: int
) -> None:
    """Write a run as the trainer would, and send it with three evaluated checkpoints."""
    settings = f"num_samples = {STEPS * BATCH}\n[optimizer]\nlearning_rate = {learning_rate}\n"
    folder = prepare_run(home, name, settings, seed)
    rng = np.random.default_rng(seed)
    with EventLog(folder / run_folder.EVENTS) as log:
        log.write("started", samples_seen=0, run=name)
        for step in range(1, STEPS + 1):
            seen = step * BATCH
            loss = 0.09 + 0.05 * math.exp(-step * sharpness / 20)
            log.write(
                "step", samples_seen=seen, step=step, epoch=seen // EVERY, loss=loss + rng.normal(0, 0.004),
                learning_rate=learning_rate * min(1, step / 6), grad_norm=abs(rng.normal(0.4, 0.08)),
                images_per_s=11 + rng.normal(0, 0.3), data_wait=0.01, eta_s=(STEPS - step) * 90.0,
            )  # fmt: skip
            if seen % (EVERY // 4) == 0:
                bins = {str(n): loss * (1.6 - n / 10) for n in range(10)}
                log.write(
                    "validation",
                    samples_seen=seen,
                    loss=loss + 0.004,
                    stable_loss=loss,
                    t=bins,
                    seconds=8.0,
                )
            if seen % EVERY == 0:
                log.write(
                    "checkpoint", samples_seen=seen, checkpoint=f"{name}@{seen}", seconds=3.0, validation_loss=loss,
                    folder=f"checkpoints/samples_{seen:09d}", digest="d" * 64,
                )  # fmt: skip
        log.write("finished", samples_seen=seen)
    tracking.forward(folder)
    for number in (1, 2, 3):
        evaluate(tracking, home, f"{name}@{number * EVERY}", 0.2 + (sharpness - 0.2) * number / 3)


def judge(tracking: Tracking, base: str, checkpoint: str, word: str, difference: float) -> str:
    """Send a verdict; returns it in words."""
    from training.evaluation import verdict

    row = {
        "metric": "aesthetic", "group": "all", "a": base, "b": checkpoint, "num_prompts": 256, "mean_a": 5.0,
        "mean_b": 5.0 + difference, "difference": difference, "low": difference - 0.04, "high": difference + 0.04,
        "p_value": 0.001, "p_holm": 0.002, "margin": 0.05, "win_rate": 0.7, "verdict": word, "num_needed": None,
    }  # fmt: skip
    gain = difference / 20
    clip = {**row, "metric": "clip_score", "difference": gain, "low": gain - 0.001, "high": gain + 0.001,
            "margin": 0.003, "mean_a": 0.25, "mean_b": 0.25 + gain}  # fmt: skip
    tracking.log_verdict(
        checkpoint, pl.DataFrame([row, clip], schema=TABLES["verdicts"].schema), ""
    )
    return verdict.sentence(row)


def fill(home: Path) -> Tracking:
    """Three runs and their base, with checkpoints, images, verdicts and a champion."""
    tracking = workspace_tracking(home)
    evaluate(tracking, home, "base.sdxl@0", 0.25)
    for number, (name, (learning_rate, sharpness)) in enumerate(RUNS.items()):
        train(tracking, home, name, learning_rate, sharpness, number)
    judge(tracking, "base.sdxl@0", "slow-rate@60000", "unclear", 0.03)
    for name, difference in {"first": 0.41, "two-colours": 0.55}.items():
        said = judge(tracking, "base.sdxl@0", f"{name}@60000", "better", difference)
        tracking.set_champion(f"{name}@60000", said)
    tracking.log_file("two-colours@60000", "report.html", b"<!doctype html><h1>A report</h1>")
    tracking.log_dagster_run("two-colours", "12345678-abcd")
    tracking.views()
    return tracking


class Server:
    """A workspace's MLflow, started as `foundry up` starts it, always on the same port."""

    def __init__(self, home: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._home = home
        self._process: subprocess.Popen | None = None

    def start(self, timeout_s: float = 120) -> None:
        """Start it and wait until it takes connections."""
        sockets = self._home / "sockets"
        sockets.mkdir(exist_ok=True)
        arguments = ["MLflow", self._home, 0, self.port, sockets / "code.sock", os.getpid()]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jobs.serve", *map(str, arguments)],
            cwd=self._home, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + timeout_s
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, "MLflow ended"
            assert time.monotonic() < deadline, "MLflow did not start"
            time.sleep(0.2)

    def processor_s(self) -> float:
        """Processor seconds that it has used."""
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def send(self, number: int) -> None:
        """Send it a signal: SIGSTOP hangs it, SIGCONT lets it go on."""
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it and wait for its end."""
        assert self._process is not None
        self.send(number)
        self._process.wait(60)


@contextlib.contextmanager
def served(home: Path) -> Iterator[str]:
    """Address of a workspace's MLflow while it is up."""
    server = Server(home)
    server.start()
    try:
        yield server.url
    finally:
        server.end()
