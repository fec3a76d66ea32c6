"""What a run's event log still owes MLflow: cut into batches, each ending at an offset that can be
committed.

A resumed run does part of itself again. Lines that a later attempt took back are left out when they
were not sent yet; when they were, it is their repetition that is left out, which a resume makes
equal. So each point is sent once.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training import commit
from training.runs.event_log import ENDINGS, OPENINGS, Event, parse_line
from training.runs.run_folder import EVENTS

STATE = "tracking.json"
MAX_METRICS = 1_000
"""MLflow's limit of metrics in one batch."""
_POINTS = frozenset({"step", "validation", "checkpoint", "data"})
"""Of `data` one number is a curve; `compiled` is for whoever reads the log."""
_EVERY_LINE = frozenset({"time_ms", "event", "attempt", "samples_seen"})
_NAMES = {
    ("step", "step"): "progress/optimizer_step",
    ("step", "epoch"): "progress/epoch",
    ("step", "eta_s"): "progress/eta_s",
    ("step", "images_per_s"): "perf/images_per_s",
    ("step", "data_wait"): "perf/data_wait",
    ("data", "share"): "perf/data_wait_share",
    ("validation", "seconds"): "perf/validation_s",
    ("checkpoint", "seconds"): "perf/checkpoint_s",
}
_SECTIONS = {"step": "train", "validation": "val"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of one metric."""

    name: str
    """`section/metric`: MLflow makes a section of the part before the slash."""
    value: float
    time_ms: int
    samples_seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a run's log has been sent; kept in the run's folder."""

    run_id: str
    """MLflow's id of the run that it was sent to; another one gets all of it."""
    offset: int = 0
    """Bytes of the log that are sent."""
    marks: dict[str, int] = field(default_factory=dict)
    """Kind of event -> the highest samples_seen that was sent of it."""


@dataclass(slots=True, kw_only=True)
class Chunk:
    """What is sent in one go."""

    points: list[Point] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    last_warning: str = ""
    phase: Event | None = None
    """The last line that opened or ended an attempt."""
    state: State
    """To be committed once all of it is sent."""


def read_state(folder: Path, run_id: str) -> State:
    """How far the log in `folder` has been sent to MLflow's run `run_id`; a damaged file means not
    at all."""
    try:
        values = json.loads((folder / STATE).read_bytes())
        state = State(
            run_id=values["run_id"], offset=int(values["offset"]), marks=dict(values["marks"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return State(run_id=run_id)
    return state if state.run_id == run_id else State(run_id=run_id)


def write_state(folder: Path, state: State) -> None:
    """Commit how far the log has been sent."""
    commit.write_json(
        folder / STATE, {"run_id": state.run_id, "offset": state.offset, "marks": state.marks}
    )


def began_ms(folder: Path) -> int | None:
    """When the run in `folder` wrote its first line, ms since 1970; None where it has none yet."""
    try:
        with (folder / EVENTS).open("rb") as file:
            first = parse_line(file.readline())
    except FileNotFoundError:
        return None
    return int(first["time_ms"]) if first is not None else None


def pending(folder: Path, state: State) -> Iterator[Chunk]:
    """What has not been sent yet, in order; only whole lines, none beyond the log as it is now."""
    lines = _new_lines(folder / EVENTS, state.offset)
    if not lines:
        return
    marks = dict(state.marks)
    chunk, before = Chunk(state=state), state.offset
    for event, end in _not_taken_back(lines):
        kind, samples_seen = str(event["event"]), int(event["samples_seen"])
        if kind in OPENINGS | ENDINGS:
            chunk.phase = event
        elif kind == "warning":
            chunk.last_warning = str(event.get("message", ""))
        elif kind in _POINTS and samples_seen > marks.get(kind, -1):
            points = _points(event)
            if len(chunk.points) + len(points) > MAX_METRICS:
                # A validation may have hundreds: by timesteps and by bucket, of raw and of averaged
                # weights.
                yield _ended(chunk, before, marks)
                chunk = Chunk(state=chunk.state)
            marks[kind] = samples_seen
            chunk.points += points
            if kind == "checkpoint":
                chunk.checkpoints.append(event)
        # Most events have a few dozen numbers.
        if len(chunk.points) > MAX_METRICS - 100:
            yield _ended(chunk, end, marks)
            chunk = Chunk(state=chunk.state)
        before = end
    yield _ended(chunk, lines[-1][1], marks)


def _ended(chunk: Chunk, offset: int, marks: dict[str, int]) -> Chunk:
    """The chunk, with the state that holds once it is sent."""
    chunk.state = State(run_id=chunk.state.run_id, offset=offset, marks=dict(marks))
    return chunk


def _new_lines(path: Path, offset: int) -> list[tuple[Event | None, int]]:
    """Whole lines behind `offset`, parsed, each with the offset at which it ends."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        lines.append((parse_line(line), offset))
    return lines


def _not_taken_back(lines: list[tuple[Event | None, int]]) -> Iterator[tuple[Event, int]]:
    """Events that no later line of the same reading takes back, by the rules of
    `training.runs.event_log`."""
    limit = math.inf
    kept = []
    for event, end in reversed(lines):
        if event is None:
            continue
        if event["event"] not in _POINTS or event["samples_seen"] <= limit:
            kept.append((event, end))
        if event["event"] in OPENINGS:
            limit = min(limit, event["samples_seen"] if event["event"] == "resumed" else -1)
    yield from reversed(kept)


def _points(event: Event) -> list[Point]:
    """The numbers of one event as metrics; nested ones get a section of their own (`val_t/0` of
    `t`)."""
    kind = str(event["event"])
    section = _SECTIONS.get(kind)
    found: dict[str, Any] = {}
    for name, value in event.items():
        if name in _EVERY_LINE:
            continue
        if (kind, name) in _NAMES:
            found[_NAMES[kind, name]] = value
        elif section is not None and isinstance(value, dict):
            found |= {f"{section}_{name}/{key}": item for key, item in value.items()}
        elif section is not None:
            found[f"{section}/{name}"] = value
    return [
        Point(
            name=name,
            value=float(value),
            time_ms=int(event["time_ms"]),
            samples_seen=int(event["samples_seen"]),
        )
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
