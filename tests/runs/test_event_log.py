import json
import math
import resource

import pytest

from training.errors import WorkspaceError
from training.runs.event_log import EventLog, read_events, read_lines


def attempt(path, opening, samples_seen, steps, ending=None):
    with EventLog(path) as log:
        log.write(opening, samples_seen=samples_seen)
        for step in steps:
            log.write("step", samples_seen=step, attempted=log.attempt)
        if ending:
            log.write(ending, samples_seen=steps[-1] if steps else samples_seen)


def shape(path):
    return [
        (event["event"], event["samples_seen"], event["attempt"]) for event in read_events(path)
    ]


def test_a_resume_takes_back_what_it_does_again(tmp_path):
    path = tmp_path / "events.jsonl"
    attempt(path, "started", 0, [8, 16, 24])  # killed
    attempt(path, "resumed", 16, [24, 32], "stopped")
    attempt(path, "resumed", 32, [40], "finished")
    assert shape(path) == [
        ("started", 0, 1), ("step", 8, 1), ("step", 16, 1),
        ("resumed", 16, 2), ("step", 24, 2), ("step", 32, 2), ("stopped", 32, 2),
        ("resumed", 32, 3), ("step", 40, 3), ("finished", 40, 3),
    ]  # fmt: skip
    assert len(read_lines(path)) == 11


def test_a_second_start_from_the_base_takes_all_metrics_back(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("started", samples_seen=0)
        log.write("validation", samples_seen=0, loss=1.0)
        log.write("failed", samples_seen=0, reason="disk")
    attempt(path, "started", 0, [8])
    assert shape(path) == [("started", 0, 1), ("failed", 0, 1), ("started", 0, 2), ("step", 8, 2)]


def test_a_validation_that_a_resume_makes_up_for_counts_once(tmp_path):
    path = tmp_path / "events.jsonl"
    attempt(path, "started", 0, [8], "stopped")
    for number in (2, 3):  # the first of them killed after its validation
        with EventLog(path) as log:
            log.write("resumed", samples_seen=8)
            log.write("validation", samples_seen=8, loss=0.5, number=number)
            log.write("checkpoint", samples_seen=8, number=number)
    events = read_events(path)
    assert [(event["event"], event["number"]) for event in events[-2:]] == [
        ("validation", 3),
        ("checkpoint", 3),
    ]
    assert sum("number" in event for event in events) == 2
    assert [event["samples_seen"] for event in events if event["event"] == "step"] == [8]


def test_a_torn_last_line_is_left_out_and_closed_off(tmp_path):
    path = tmp_path / "events.jsonl"
    attempt(path, "started", 0, [8])
    with path.open("ab") as file:
        file.write(b'{"event": "step", "samples_se')
    assert [event["samples_seen"] for event in read_events(path)] == [0, 8]
    attempt(path, "resumed", 8, [16])
    assert [event["samples_seen"] for event in read_events(path)] == [0, 8, 8, 16]


def test_lines_are_whole_json_with_utc_milliseconds(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("warning", samples_seen=3, message="Grüße\nzweite Zeile")
        # Flushed before the file is closed: a reader sees it at once.
        (line,) = path.read_text("utf-8").splitlines()
    event = json.loads(line)
    assert event["message"] == "Grüße\nzweite Zeile"
    assert event["time_ms"] > 1_700_000_000_000


def test_not_a_number_is_no_json(tmp_path):
    with EventLog(tmp_path / "e.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write("step", samples_seen=1, loss=math.nan)


def test_a_missing_log_is_empty(tmp_path):
    assert read_events(tmp_path / "none.jsonl") == []


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    """A limit on the size of files stops a write within a line, as a disk does that is full."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("started", samples_seen=0)
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        for room in range(40):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
            try:
                with pytest.raises(
                    WorkspaceError,
                    match=r"file too large while writing .*events\.jsonl; raise the limit",
                ):
                    log.write("step", samples_seen=8)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert path.read_bytes() == before
        log.write("step", samples_seen=8)
    assert [event["event"] for event in read_events(path)] == ["started", "step"]
