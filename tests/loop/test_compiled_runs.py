"""Compiled runs say which graphs they made, warn of one that is made again, and of what cannot be
compiled."""

import functools

import pytest
import torch

from training.errors import ConfigError, TrainingError
from training.loop import startup
from training.models import compute
from training.runs import run_folder
from training.runs.event_log import read_events

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected", "ignore::DeprecationWarning", "ignore:The .grad attribute"
)


@pytest.fixture
def captured(monkeypatch):
    """Graphs are captured and run as they are: making kernels of them takes minutes on two
    cores."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        startup, "apply_compute", functools.partial(compute.apply_compute, backend="eager")
    )
    monkeypatch.setattr(startup, "why_not_compiled", lambda device: "")


def events(run, kind):
    return [
        event for event in read_events(run.folder / run_folder.EVENTS) if event["event"] == kind
    ]


def test_graphs_are_named_and_one_that_is_made_again_is_a_warning(make_run, train, captured):
    run = make_run(
        num_samples=44, **{"compute.compile": "blocks", "validation.every_samples": 1000}
    )

    def prepare(trainer):
        step = trainer._step

        def forget(draws):
            if trainer.state.clock.step == 5:
                torch._dynamo.reset()
            return step(draws)

        trainer._step = forget

    assert train(run, prepare=prepare) == "finished"
    before = [event for event in events(run, "compiled") if event["samples_seen"] < 38]
    assert before[0]["samples_seen"] == 0
    # Blocks with text and without; all sizes share them, but for a single sample, which torch takes
    # for a constant.
    assert sum(event["num_graphs"] for event in before) <= 4
    (warning, *_) = (event for event in events(run, "warning") if event["kind"] == "recompiled")
    assert warning["samples_seen"] == 38
    assert "compiled again for" in warning["message"]
    assert not [event for event in events(run, "warning") if event["samples_seen"] < 38]


def test_graphs_of_a_resumed_runs_validation_are_no_repetitions(make_run, train, captured):
    run = make_run(num_samples=44, **{"compute.compile": "blocks", "validation.every_samples": 30})
    assert train(run, stop_at=20) == "stopped"
    torch._dynamo.reset()
    assert train(run) == "finished"
    later = [event for event in events(run, "compiled") if event["samples_seen"] > 20]
    assert any(event.get("validation") for event in later)
    assert not [event for event in events(run, "warning") if event["kind"] == "recompiled"]


def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(make_run, train, monkeypatch):
    monkeypatch.setattr(startup, "why_not_compiled", lambda device: "no C++ compiler found")
    monkeypatch.setattr(startup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    run = make_run(**{"compute.compile": "whole"})
    with pytest.raises(
        ConfigError,
        match=r'compute.compile="whole": nothing .* for cpu here \(no C\+\+ compiler found\)',
    ):
        train(run)


def test_a_graph_that_the_compiler_fails_on_names_the_option(
    make_run, train, captured, monkeypatch
):
    def fail(graph, inputs):
        raise RuntimeError("internal error of the compiler")

    monkeypatch.setattr(
        startup, "apply_compute", functools.partial(compute.apply_compute, backend=fail)
    )
    run = make_run(**{"compute.compile": "blocks"})
    message = r'compute.compile="blocks": \d+ x \d+x\d+ with \d chunks .* internal error'
    with pytest.raises(TrainingError, match=message):
        train(run)  # in the validation before the first step
    with pytest.raises(TrainingError, match=message):
        train(run, prepare=lambda trainer: setattr(trainer, "_validate", lambda: True))


def test_the_compiler_is_asked_only_where_it_may_be_wanted(make_run, train, monkeypatch):
    monkeypatch.setattr(startup, "why_not_compiled", lambda device: pytest.fail("asked"))
    assert train(make_run(num_samples=8)) == "finished"


def test_a_missing_compiler_is_told_in_one_line(monkeypatch):
    def failing(numbers):
        raise RuntimeError("no\n compiler")

    monkeypatch.setattr(torch, "compile", lambda function: failing)
    assert compute.why_not_compiled(torch.device("cpu")) == "no compiler"
