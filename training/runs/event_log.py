"""`events.jsonl`: all that a run says about itself, one JSON object a line, flushed; the only
source of tracking.

Every line has `time_ms` (UTC), `event`, `attempt` and `samples_seen`. An attempt opens with
`started` (from the base model) or `resumed` (from a checkpoint) and ends with `finished`, `stopped`
or `failed`; an attempt that was killed has no such line. A `data` line says where the time of an
interval went, a `compiled` line which graphs a batch needed, or a validation. A `resumed` line
takes back every other kind of line before it that lies beyond its `samples_seen`, a second
`started` takes back all of them: that part of the run is done again. Of two `validation` or
`checkpoint` lines at the same `samples_seen` the later one counts: a resume may make up for a
validation that a stop request dropped.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Self

from training.commit import explain_disk

OPENINGS = frozenset({"started", "resumed"})
ENDINGS = frozenset({"finished", "stopped", "failed"})
_REPEATED = frozenset({"step", "epoch", "validation", "checkpoint", "warning", "data", "compiled"})
_TAIL_BYTES = 65_536
"""More than any last line has."""

Event = dict[str, Any]


class EventLog:
    """The writing end; one process holds it, the one that holds `trainer.lock`."""

    def __init__(self, path: Path) -> None:
        """Open for appending; a torn last line, which a kill leaves, is closed off."""
        self.attempt = 1 + sum(event["event"] in OPENINGS for event in read_lines(path))
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.path = path
        self._file = path.open("ab", buffering=0)
        if torn:
            self._append(b"\n")

    def write(self, event: str, *, samples_seen: int, **values: Any) -> None:
        """Append one line, whole or not at all; values are plain JSON, never NaN or infinite.

        Raises:
            WorkspaceError: there is no space left for it.
        """
        line = {
            "time_ms": time.time_ns() // 1_000_000,
            "event": event,
            "attempt": self.attempt,
            "samples_seen": samples_seen,
            **values,
        }
        self._append((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def _append(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        with explain_disk(self.path):
            try:
                while data:  # of which a full disk takes a part
                    data = data[self._file.write(data) :]
            except OSError:
                self._file.truncate(end)
                raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()


def parse_line(line: bytes) -> Event | None:
    """The event of one line; None for an empty or torn one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def read_lines(path: Path) -> list[Event]:
    """All whole lines in the order in which they were written; a missing file has none."""
    if not path.is_file():
        return []
    events = (parse_line(line) for line in path.read_bytes().split(b"\n"))
    return [event for event in events if event is not None]


def read_events(path: Path) -> list[Event]:
    """The run as it happened in the end: lines that a later attempt took back are left out."""
    kept: list[Event] = []
    for event in read_lines(path):
        if event["event"] in OPENINGS:
            limit = event["samples_seen"] if event["event"] == "resumed" else -1
            kept = [
                old for old in kept if old["event"] not in _REPEATED or old["samples_seen"] <= limit
            ]
        elif event["event"] in ("validation", "checkpoint"):
            place = (event["event"], event["samples_seen"])
            kept = [old for old in kept if (old["event"], old["samples_seen"]) != place]
        kept.append(event)
    return kept


def has_finished(path: Path) -> bool:
    """Whether the run came to its end: a stopped or failed one may go on. Reads the end of the log
    alone."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        events = (parse_line(line) for line in reversed(file.read().split(b"\n")))
        last = next((event for event in events if event is not None), None)
    return last is not None and last["event"] == "finished"
