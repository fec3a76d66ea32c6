"""In the steady state, the host waits for the device once a step: for what the log says."""

from pathlib import Path

import pytest
import torch

from training.loop.trainer import Trainer
from training.optimization.ema import Ema

CPU = torch.device("cpu")


@pytest.fixture
def step_counter(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import step_counter

    return step_counter


def held(trainer):
    """All that a GPU would hold between two steps."""
    state = trainer.state
    modules = (state.parts.unet, *state.parts.text_encoders)
    yield from (
        tensor for module in modules for tensor in (*module.parameters(), *module.buffers())
    )
    yield from (
        trainer.signal,
        trainer.weights,
        state.arithmetic.gradients.flat,
        *state.arithmetic.weights.values(),
    )
    yield from (value for moments in state.optimizer.state.values() for value in moments.values())
    yield from state.ema.shadows.values()


def count_steps(step_counter, monkeypatch, run, train):
    """The counters of the third and the fourth step of a run."""
    counters, step, receive = [], Trainer._step, Trainer._receive

    def counted(self, draws):
        if self.state.clock.step < 2:
            return step(self, draws)
        counters.append(step_counter.StepCounter(CPU, held(self)))
        with counters[-1]:
            return step(self, draws)

    def received(self, sent):
        draw = receive(self, sent)
        for counter in counters:
            counter.place(draw.tensors())
        return draw

    monkeypatch.setattr(Trainer, "_step", counted)
    monkeypatch.setattr(Trainer, "_receive", received)
    assert train(run) == "finished"
    assert len(counters) == 2
    return counters


@pytest.mark.parametrize("precision", ["fp32", "fp16_amp", "bf16_amp", "bf16"])
def test_the_host_waits_once_a_step(step_counter, monkeypatch, make_run, train, precision):
    run = make_run(num_samples=30, precision=precision)
    for counter in count_steps(step_counter, monkeypatch, run, train):
        assert [line.partition(":")[0] for line in counter.host_syncs] == [
            "training/loop/trainer.py"
        ], counter.host_syncs
        assert counter.blocking_copies == []
        assert counter.operations["aten::_fused_adamw_"] == 2, (
            "one call for the UNet, one for the text encoder"
        )


def test_a_wait_that_hides_in_the_averages_is_found(step_counter, monkeypatch, make_run, train):
    update = Ema.update

    def waiting(self, *arguments):
        update(self, *arguments)
        next(iter(self.shadows.values())).sum().item()

    monkeypatch.setattr(Ema, "update", waiting)
    for counter in count_steps(step_counter, monkeypatch, make_run(num_samples=30), train):
        assert {line.partition(":")[0] for line in counter.host_syncs} == {
            "training/loop/trainer.py", "tests/benchmarks/test_step_syncs.py",
        }  # fmt: skip


READS = {
    "a number": lambda there: there.sum().item(),
    "a list": lambda there: there.tolist(),
    "an array": lambda there: there.numpy(),
    "truth": lambda there: bool(there.sum() > 0),
    "float": lambda there: float(there[0]),
    "a copy": lambda there: there.cpu(),
    "a copy by name": lambda there: there.to("cpu"),
    "places of what is not zero": lambda there: there.nonzero(),
    "what a mask holds": lambda there: there[there > 0],
    "assignment through a mask": lambda there: there.index_put_((there > 0,), torch.zeros(())),
    "equality": lambda there: torch.equal(there, there * 2),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_kind_of_reading_waits(step_counter, read):
    there = torch.tensor([1.0, 2.0, 0.0])
    for is_there in (True, False):
        counter = step_counter.StepCounter(CPU, [there] if is_there else [])
        with counter:
            read(there)
        assert len(counter.host_syncs) == is_there
        assert all(
            line.startswith("tests/benchmarks/test_step_syncs.py:") for line in counter.host_syncs
        )


def test_work_on_the_device_waits_for_nothing(step_counter):
    there, here = torch.ones(4, 4), torch.ones(4)
    with step_counter.StepCounter(CPU, [there]) as counter:
        there[torch.tensor([0, 1])] += 1  # places that are known
        (there @ there).sum().sqrt()
        torch.zeros(3, device=there.device).add_(1)
        here.sum().item()
        torch.ones(3).tolist()
    assert counter.host_syncs == counter.blocking_copies == []


def test_copies_to_the_device_block_unless_they_are_pinned(step_counter):
    here = torch.ones(4)
    with step_counter.StepCounter(CPU) as counter:
        there = here.to(CPU)
        there.to(CPU)
        (there + 1).tolist()
        torch.tensor([1.0], device=CPU)
    assert len(counter.blocking_copies) == 2
    assert len(counter.host_syncs) == 1


def test_bytes_are_counted_by_hand(step_counter):
    weights = [torch.nn.Parameter(torch.ones(100)), torch.nn.Parameter(torch.ones(28))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    phases = step_counter.Phases(CPU)
    optimizer = torch.optim.AdamW(weights, fused=True)
    optimizer.step()
    held = [*weights, *(weight.grad for weight in weights)]
    held += [moment for state in optimizer.state.values() for moment in state.values()]
    with step_counter.StepCounter(CPU, held, phases) as counter, phases.phase("optimizer"):
        optimizer.step()
    # Reads weight, gradient and two moments, writes all but the gradient; two steps' counters, read
    # and written.
    assert counter.operations["aten::_fused_adamw_"] == 1
    assert counter.bytes_moved["optimizer"] == pytest.approx(128 * 4 * 7, abs=100)
    assert set(phases.take()) == set(step_counter.PHASES)
