"""The loss curve of the tiny model: it changes only on purpose, and then this list does, in the
same commit."""

import json
from pathlib import Path

import pytest

from training.runs import run_folder
from training.runs.event_log import read_events

GOLDEN = Path(__file__).with_name("golden_losses.json")


def test_the_losses_are_those_of_the_golden_curve(unbroken):
    events = read_events(unbroken.folder / run_folder.EVENTS)
    golden = json.loads(GOLDEN.read_text())
    found = {
        "step": [event["loss"] for event in events if event["event"] == "step"],
        "validation": [event["loss"] for event in events if event["event"] == "validation"],
        "ema": [event["ema_loss"] for event in events if event["event"] == "validation"],
    }
    assert found.keys() == golden.keys()
    for name, losses in found.items():
        # Sums in another order, as other processors make them, differ in the last digits.
        assert losses == pytest.approx(golden[name], rel=1e-4), name
