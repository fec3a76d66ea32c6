"""Walks a workspace through the whole graph and kills it before the changes that it makes to the
file system.

A stage is attempted in a process forked from one that has imported the heavy libraries. An audit
hook sees each change below the workspace before it happens, and kills the process with SIGKILL at
the first point of a kind that no attempt was killed at: temporary files just after they were
opened, all else before the change. An fsync is no change that a kill could show. The next attempt
goes on with what is there, until one comes to its end. The trainer runs in the same process, so
that its changes are points like all others.
"""

import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph_tools import WARM

_CHANGES = {
    "os.rename": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.truncate": 0,
}
"""Audited calls besides `open`, and which argument is the target."""
_SHARED = (
    "dagster/",
    "locks/",
    "mlflow.db",
    "mlartifacts/",
    "cache/",
    "tracking.json",
    "warehouse.duckdb",
)
"""Places that every stage writes alike."""
_DEPTH = {"runs": 3, "mlartifacts": 1, "cache": 1, "dagster": 1, "locks": 1}
"""How many folders of a path tell kinds of changes apart: 2 elsewhere."""
_VOLATILE = (
    (re.compile(r"\.tmp-\d+-"), ".tmp-<pid>-"),
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"(?<![0-9a-z])[0-9a-f]{8,64}(?![0-9a-z])"), "<hex>"),
    (re.compile(r"(?<=compute_logs/)[a-z]{8}"), "<name>"),
    (re.compile(r"[0-9]{10,}"), "<number>"),
)
"""What differs from run to run in equal changes."""


@dataclass
class _Hook:
    """Counts the changes of this process below a folder, and kills it at the first point that was
    not killed at yet."""

    home: Path
    stage: str
    every: bool
    """Whether each change is a point of its own; else those of one kind are one."""
    done: frozenset[str] | None
    """Points at which an attempt was killed; None to kill at none of them."""
    only: str
    """The one point to kill at, whatever was killed before; empty for none."""
    journal: int
    """Descriptor that points are written to: the one that is killed at, or all of them."""
    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_CREAT | os.O_TRUNC):
                self.at("open", path)
        elif event in _CHANGES:
            self.at(event, arguments[_CHANGES[event]])

    def at(self, call: str, path: Any) -> None:
        """One change, before it happens."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        target = os.path.abspath(os.fsdecode(path))
        if call == "os.mkdir" and os.path.isdir(target):
            return
        if not target.startswith(f"{self.home}{os.sep}"):
            return
        point = self.point(call, os.path.relpath(target, self.home))
        killing = point == self.only or (self.done is not None and point not in self.done)
        if killing or (self.done is None and not self.only):
            os.write(self.journal, f"{point}\n".encode())
        if killing:
            if call == "open" and ".tmp-" in target:
                with contextlib.suppress(OSError):
                    os.mknod(target)  # after it was opened, and before anything was written
            os.kill(os.getpid(), signal.SIGKILL)

    def point(self, call: str, relative: str) -> str:
        """The name of a point: stage, call and target."""
        for pattern, word in _VOLATILE:
            relative = pattern.sub(word, relative)
        if not self.every:
            stage = (
                "any stage"
                if relative.replace(".tmp-<pid>-", "").startswith(_SHARED)
                else self.stage
            )
            return f"{stage} | {call} | {_pattern(relative)}"
        point = f"{self.stage} | {call} | {relative}"
        self.counts[point] += 1
        return f"{point} | {self.counts[point]}"


def _pattern(relative: str) -> str:
    """What targets of one kind have in common: their folder, whether they are temporary, and their
    ending."""
    parts = [re.sub(r"[0-9]+", "#", part) for part in Path(relative).parts]
    if any(part.startswith(".tmp-") for part in parts[:-1]):
        return f"{'/'.join(parts[:2])} (temporary)/**"
    depth = _DEPTH.get(parts[0], 2)
    if len(parts) <= depth:
        return "/".join(parts)
    name = ".tmp*" if parts[-1].startswith(".tmp") else "*"
    return f"{'/'.join(parts[:depth])}/{name}{''.join(Path(parts[-1]).suffixes[-2:])}"


def kill_at_new_points(
    home: Path, stage: str, journal: Path, *, every: bool, kill: bool = True, only: str = ""
) -> None:
    """Kill this process at its first point that the journal does not hold, or at the point `only`,
    and write it there; or just write all."""
    done = None
    if kill and not only:
        done = frozenset(journal.read_text().splitlines() if journal.exists() else ())
    handle = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    hook = _Hook(home=home, stage=stage, every=every, done=done, only=only, journal=handle)
    sys.addaudithook(hook)


@contextlib.contextmanager
def _nothing_kept(home: Path) -> Iterator[Any]:
    """An instance of Dagster that keeps nothing, in place of the workspace's own."""
    import dagster as dg

    os.environ["FOUNDRY_HOME"] = str(home)
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def _attempt(home: Path, stage: str, every: bool, kill: bool, only: str, journal: Path) -> None:
    """The body of an attempt's process."""
    from jobs import pipeline
    from resources import torchrun
    from training.loop import run

    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("FOUNDRY_HOME", None)
    os.environ.pop("DAGSTER_HOME", None)
    output = os.open(journal.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)

    def train_here(folder: Path, *_: Any, **__: Any) -> torchrun.TrainerHandle:
        if run.main([str(folder)]) != 0:
            raise RuntimeError("the trainer failed")
        return torchrun.TrainerHandle(folder, None, 0)

    torchrun.start_or_attach = train_here
    if (
        not every
    ):  # a run of Dagster's costs as much as a stage's work, and what it writes is Dagster's own
        pipeline.open_instance = _nothing_kept
    kill_at_new_points(home, stage, journal, every=every, kill=kill, only=only)
    select = None if stage == "all" else stage
    pipeline.bring_up_to_date(home, select=select, only=select is not None)


class Walk:
    """One workspace on its way through the graph."""

    def __init__(self, home: Path, *, every: bool = False, kill: bool = True) -> None:
        """Name the workspace; its journals lie beside it, and a walk that ended early goes on after
        them."""
        self.home, self.every, self.kill = home, every, kill

    @property
    def journal(self) -> Path:
        """Points killed at; without killing those that were passed."""
        return self.home.with_name(f"{self.home.name}.{'killed' if self.kill else 'passed'}")

    def points(self) -> list[str]:
        """What the journal holds."""
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def attempt(self, stage: str, only: str = "") -> bool:
        """Attempt a stage, killed at its first new point or at the point `only`; whether it came to
        its end."""
        process = WARM.Process(
            target=_attempt, args=(self.home, stage, self.every, self.kill, only, self.journal)
        )
        process.start()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(
                f"{stage}: status {process.exitcode}\n{self.journal.with_suffix('.log').read_text()}"
            )
        return process.exitcode == 0
