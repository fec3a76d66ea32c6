"""A lever of training that is set but does not act is named, for each of them: the benchmark is
seen to fail."""

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from training.loop.prefetch import Prefetch, Sender
from training.models import compute
from training.optimization.precision import Arithmetic

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import train_throughput

    return train_throughput


def variants(bench):
    """Every lever with those before it."""
    variant = bench.recreated(2)
    found, steps = {"bigASP recreated": variant}, bench.levers(variant)
    with contextlib.suppress(StopIteration):
        name, variant = next(steps)
        while True:
            found[name] = variant
            name, variant = steps.send(variant)
    return found


def find_contradiction(bench, name):
    """What a step of a lever's variant shows against it."""
    import levers_seen
    import train_bench

    torch.compiler.reset()
    variant, shapes = variants(bench)[name], bench.draw_shapes(1, tiny=True)
    model = train_bench.Bench(variant, CPU, tiny=True, backend="eager")
    try:
        if variant.run.compute.compile:
            model.warm_up(shapes)
        return levers_seen.contradiction(name, model.inspect(shapes))
    finally:
        model.close()


def laid_out_as(bench, monkeypatch, **values):
    """The model is laid out with other values than the lever's."""
    import train_bench

    apply = compute.apply_compute

    def other(parts, config, **options):
        apply(parts, dataclasses.replace(config, **values), **options)

    monkeypatch.setattr(train_bench, "apply_compute", other)


def wait_in_passes(bench, monkeypatch):
    backward = Arithmetic.backward
    monkeypatch.setattr(
        Arithmetic, "backward", lambda self, loss: (loss.item(), backward(self, loss))
    )


def step_unfused(bench, monkeypatch):
    import train_bench

    make = train_bench.make_optimizer

    def unfused(config, weights):
        optimizer = make(config, weights)
        for group in optimizer.param_groups:
            group |= {"fused": False, "foreach": True}
        return optimizer

    monkeypatch.setattr(train_bench, "make_optimizer", unfused)


def cast_nothing(bench, monkeypatch):
    monkeypatch.setattr(Arithmetic, "autocast", lambda self: contextlib.nullcontext())


def keep_fp32(bench, monkeypatch):
    prepare = Arithmetic.__init__
    monkeypatch.setattr(
        Arithmetic,
        "__init__",
        lambda self, config, *args, **named: prepare(
            self, dataclasses.replace(config, precision="fp32"), *args, **named
        ),
    )


def hang_gradients_on_parameters(bench, monkeypatch):
    """16-bit gradients stay where autograd leaves them."""
    from training.optimization.gradients import Gradients

    monkeypatch.setattr(Gradients, "_arrival", lambda self, number: lambda parameter: None)


def round_nothing(bench, monkeypatch):
    monkeypatch.setattr("training.optimization.masters._Chunk.split", lambda self, buffer: None)


def make_in_the_loop(bench, monkeypatch):
    class Now(Prefetch):
        def __init__(self, make, items, worker, depth):
            super().__init__(make, (), worker, depth)
            self.make, self.items = make, iter(items)

        def __next__(self):
            return self.make(next(self.items))

    import train_bench

    monkeypatch.setattr(train_bench, "Prefetch", Now)


def send_unpinned(bench, monkeypatch):
    monkeypatch.setattr(
        Sender, "receive", lambda self, mark, tensors: [tensor.to(CPU) for tensor in tensors]
    )


def break_graphs(bench, monkeypatch):
    from diffusers.models.attention import BasicTransformerBlock

    forward = BasicTransformerBlock.forward

    def broken(self, *args, **named):
        torch._dynamo.graph_break()
        return forward(self, *args, **named)

    monkeypatch.setattr(BasicTransformerBlock, "forward", broken)


def attend_in_full(bench, monkeypatch):
    monkeypatch.setattr(compute, "AttnProcessor2_0", AttnProcessor)


def halve_batches(bench, monkeypatch):
    import train_bench

    make = train_bench.Bench._make
    monkeypatch.setattr(
        train_bench.Bench, "_make",
        lambda self, item: ({key: value[:1] for key, value in make(self, item)[0].items()}, None),
    )  # fmt: skip


IDLE = [
    ("bigASP recreated", lambda b, m: laid_out_as(b, m, gradient_checkpointing=()), "bigASP recreated: blocks ran 1"),
    ("no sync in micro-steps", wait_in_passes, r"no sync in micro-steps: 2 waits of the host"),
    ("fused AdamW", step_unfused, "fused AdamW: no fused kernel"),
    ("bf16 autocast", cast_nothing, r"bf16 autocast: activations are torch\.float32"),
    ("bf16 weights, fp32 master", keep_fp32, r"bf16 weights, fp32 master: weights are torch\.float32"),
    ("bf16 weights, fp32 master", hang_gradients_on_parameters, "keeps a 16-bit gradient"),
    ("bf16 weights, fp32 master", round_nothing, "rounded into the model by 0 calls"),
    (
        "no checkpointing", lambda b, m: laid_out_as(b, m, gradient_checkpointing=("all",)),
        "no checkpointing: blocks ran 2 times",
    ),
    ("channels_last", lambda b, m: laid_out_as(b, m, channels_last=False), "channels_last: an activation"),
    ("pinned, sent ahead", make_in_the_loop, "pinned, sent ahead: batches were not made by the prefetch thread"),
    ("pinned, sent ahead", send_unpinned, r"pinned, sent ahead: 8 copies from memory that is not pinned"),
    ("compile blocks", lambda b, m: laid_out_as(b, m, compile=False), "compile blocks: nothing was compiled"),
    ("compile blocks", break_graphs, r"compile blocks: \d+ graph breaks"),
    ("compile whole; one size", lambda b, m: laid_out_as(b, m, compile=False), "compile whole; one size: nothing was"),
    ("no checkpointing", attend_in_full, r"attention: 6 calls of a flash kernel a pass instead of \d+"),
    ("micro-batch 4", halve_batches, "micro-batch 4: micro-batches have 1 samples"),
]  # fmt: skip


# Of torch itself, about what comes after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("name", "disable", "message"),
    IDLE,
    ids=[f"{row[0]}-{number}" for number, row in enumerate(IDLE)],
)
def test_a_lever_that_does_not_act_is_named(bench, monkeypatch, name, disable, message):
    disable(bench, monkeypatch)
    found = find_contradiction(bench, name)
    assert re.search(message, found), found


def test_every_lever_is_disabled_above(bench):
    import levers_seen

    disabled = {name for name, _, _ in IDLE}
    assert levers_seen.CHECKS.keys() <= {name.partition("; ")[0] for name in disabled}
    known = {name for name in variants(bench) if not name.startswith("micro-batch")}
    assert {name.partition("; ")[0] for name in known} == levers_seen.CHECKS.keys()
