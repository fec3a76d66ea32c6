"""What ranks send, against a ring that is played through and hand-worked figures; and what a card
holds, by trying."""

import dataclasses
import functools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdxl_shapes import SDXL

from jobs.scale import memory_lines
from training.config.run import BatchConfig, ComputeConfig, RunConfig
from training.estimates.flops import ModelConfigs
from training.estimates.gpus import find_gpu
from training.estimates.memory import MemoryEstimate, estimate_memory
from training.estimates.scale import largest_micro_batch, step_traffic, without_checkpointing

NUM_TRAINED = 2_683_000_000  # SDXL's UNet and first text encoder, about
ENCODERS = tuple(
    {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "projection_dim": width,
        "vocab_size": 49408, "max_position_embeddings": 77,
    }
    for width, layers in ((768, 12), (1280, 32))
)  # fmt: skip


def run_config(**changes):
    return RunConfig(encoding="sdxl", **changes)


def played_ring(num_ranks, numbers_per_part):
    """A ring all-reduce of small vectors, step by step: the numbers that one rank sends, and the
    sums that come out."""
    held = [
        [[float(rank + part)] * numbers_per_part for part in range(num_ranks)]
        for rank in range(num_ranks)
    ]
    sent = 0
    for turn in range(2 * (num_ranks - 1)):
        gathers = (
            turn >= num_ranks - 1
        )  # first parts are summed on their way round, then the sums go round
        part_of = [
            (rank + 1 - (turn - num_ranks + 1) if gathers else rank - turn) % num_ranks
            for rank in range(num_ranks)
        ]
        messages = [(part, list(held[rank][part])) for rank, part in enumerate(part_of)]
        sent += numbers_per_part
        for rank, (part, values) in enumerate(messages):
            mine = held[(rank + 1) % num_ranks][part]
            for place, value in enumerate(values):
                mine[place] = value if gathers else mine[place] + value
    return sent, held


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_a_fast_step_sends_what_a_ring_sends(num_ranks):
    sent, held = played_ring(num_ranks, 5)
    for part in range(num_ranks):
        total = [float(sum(rank + part for rank in range(num_ranks)))] * 5
        assert all(held[rank][part] == total for rank in range(num_ranks))
    traffic = step_traffic(run_config(), 5 * num_ranks, num_ranks, 256)
    assert traffic.gradients == pytest.approx(4 * sent)
    assert traffic.weights == 0


def test_a_canonical_step_gathers_every_rounds_gradients():
    # 10.7 GB of fp32 gradients: of 8 ranks some 69 s over 10 Gbit/s with the rank's own, 60 without.
    one_round = step_traffic(run_config(reduction="canonical"), NUM_TRAINED, 8, 8)
    assert one_round.gradients == 7 * 4 * NUM_TRAINED
    assert one_round.seconds(10) == pytest.approx(60, abs=0.5)
    assert one_round.seconds(400) == pytest.approx(60 / 40, abs=0.02)
    # bigASP's step: 2,048 samples in micro-batches of 8 are 32 rounds of 8 ranks.
    assert (
        step_traffic(run_config(reduction="canonical"), NUM_TRAINED, 8, 256).total
        == 32 * one_round.total
    )
    assert (
        step_traffic(run_config(reduction="canonical"), NUM_TRAINED, 8, 4).total == one_round.total
    )


@pytest.mark.parametrize(("precision", "num_bytes"), [("bf16", 2), ("fp16_amp", 4)])
def test_a_shared_optimizer_sends_its_weights_too(precision, num_bytes):
    config = run_config(precision=precision, compute=ComputeConfig(shard_optimizer=True))
    traffic = step_traffic(config, 800, 8, 256)
    # Each of 8 ranks has stepped 100 weights, and misses 700.
    assert traffic.weights == 700 * num_bytes
    assert traffic.total == 700 * num_bytes + 2 * 700 * 4
    assert step_traffic(config, 800, 1, 256).total == 0


@given(fixed=st.integers(0, 50), sample=st.integers(1, 9), room=st.integers(0, 400))
def test_the_largest_micro_batch_fits_and_the_next_does_not(fixed, sample, room):
    def estimate(size):
        return MemoryEstimate(
            num_parameters=0, num_trained=0, weights=fixed, gradients=0, optimizer=0, ema=0, activations=size * sample,
            context=0,
        )  # fmt: skip

    largest = largest_micro_batch(estimate, room)
    assert largest == max(
        (size for size in range(500) if size and fixed + size * sample <= room), default=0
    )


def sdxl_memory(num_ranks):
    model = ModelConfigs(family="sdxl", unet=SDXL, text_encoders=ENCODERS)
    return functools.partial(
        estimate_memory, model, height=1024, width=1024, num_chunks=2, num_ranks=num_ranks
    )


@pytest.mark.parametrize(
    ("gpu", "num_ranks", "shard", "least"),
    [("H100", 1, False, 5), ("H100", 8, True, 7), ("H200", 1, False, 13)],
)
def test_full_size_sdxl_fits_without_checkpointing_as_the_issue_wants(gpu, num_ranks, shard, least):
    compute = ComputeConfig(shard_optimizer=shard, gradient_checkpointing=("all",))
    config = run_config(precision="bf16", compute=compute, batch=BatchConfig(global_batch_size=8))
    estimated, room = sdxl_memory(num_ranks), find_gpu(gpu).memory_bytes
    assert (
        largest_micro_batch(lambda size: estimated(without_checkpointing(config, size)), room)
        >= least
    )


def test_what_stands_between_a_card_and_sixteen_is_named_in_bytes():
    config = run_config(precision="bf16", batch=BatchConfig(micro_batch_size=2))
    card = find_gpu("H100")
    per_card, largest, wanted = memory_lines(sdxl_memory(1), config, card, (1024, 1024, 2))
    assert largest.endswith("without gradient checkpointing: 5 on one H100 of 85.50 GB")
    whole = sdxl_memory(1)(dataclasses.replace(config, batch=BatchConfig(micro_batch_size=16)))
    assert wanted.startswith(
        f"a micro-batch of 16 takes {(whole.total - 85.5e9) / 1e9:.2f} GB more than it has: weights"
    )
    listed = {
        name: float(size)
        for name, size in re.findall(r"(\w+) (\d+\.\d\d)(?:,|$)", wanted.partition(": ")[2])
    }
    assert sum(listed.values()) == pytest.approx(whole.total / 1e9, abs=0.05)
    assert f"of which {whole.activations / 16e9:.2f} GB per sample" in wanted
    assert per_card.startswith("memory per card: about ")
