import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import DamageError
from training.loop.order import make_order, read_order, write_order


@st.composite
def epochs(draw):
    count = draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    sides = np.array([[64, 64], [64, 96], [96, 64], [128, 32]])[: draw(st.integers(1, 4))]
    global_batch_size = draw(st.integers(1, 40))
    return {
        "buckets": sides[rng.integers(len(sides), size=count)],
        "num_chunks": rng.integers(1, 4, size=count),
        "seed": draw(st.integers(0, 5)),
        "epoch": draw(st.integers(0, 5)),
        "global_batch_size": global_batch_size,
        "micro_batch_size": draw(st.integers(1, global_batch_size)),
    }


@given(epochs())
def test_every_sample_once_in_pure_micro_batches_and_full_steps(arguments):
    order = make_order(**arguments)
    count = len(arguments["buckets"])
    steps = [order.micro_batches(step) for step in range(order.num_steps)]
    everything = np.concatenate([rows for step in steps for rows in step])
    assert sorted(everything.tolist()) == list(range(count))
    assert np.array_equal(everything, order.samples)
    for rows in (rows for step in steps for rows in step):
        assert 1 <= len(rows) <= arguments["micro_batch_size"]
        assert len(np.unique(arguments["buckets"][rows], axis=0)) == 1
        assert len(np.unique(arguments["num_chunks"][rows])) == 1
    sizes = [order.step_size(step) for step in range(order.num_steps)]
    assert sizes == [sum(map(len, step)) for step in steps]
    assert set(sizes[:-1]) <= {arguments["global_batch_size"]}
    assert 1 <= sizes[-1] <= arguments["global_batch_size"]


@given(epochs())
def test_only_remainders_and_step_borders_make_short_micro_batches(arguments):
    order = make_order(**arguments)
    full = arguments["micro_batch_size"]
    short = Counter()
    for step in range(order.num_steps):
        # The first and the last micro-batch of a step may be parts of one that was split.
        for rows in order.micro_batches(step)[1:-1]:
            if len(rows) < full:
                short[
                    (*arguments["buckets"][rows[0]].tolist(), int(arguments["num_chunks"][rows[0]]))
                ] += 1
    assert all(count == 1 for count in short.values())


@given(epochs())
def test_ranks_share_a_step_without_overlap(arguments):
    order = make_order(**arguments)
    for step in range(order.num_steps):
        micro_batches = order.micro_batches(step)
        whole = np.concatenate(micro_batches).tolist()
        for size in (1, 2, 4):
            slices = [micro_batches[rank::size] for rank in range(size)]
            rounds = [
                rows
                for turn in range(len(slices[0]))
                for own in slices
                for rows in own[turn : turn + 1]
            ]
            assert np.concatenate(rounds).tolist() == whole


def test_epochs_and_seeds_differ_and_repeat():
    rng = np.random.default_rng(0)
    sides = np.array([[64, 64], [64, 96]])[rng.integers(2, size=100)]
    common = {
        "buckets": sides,
        "num_chunks": np.ones(100, dtype=np.int64),
        "micro_batch_size": 4,
        "global_batch_size": 16,
    }
    orders = [
        make_order(**common, seed=seed, epoch=epoch).samples.tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    again = make_order(**common, seed=1, epoch=1).samples.tolist()
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == again


def test_samples_meet_others_in_each_epoch():
    company = []
    for epoch in (0, 1):
        order = make_order(
            np.full((40, 2), 64),
            np.ones(40, dtype=int),
            seed=0,
            epoch=epoch,
            micro_batch_size=4,
            global_batch_size=40,
        )
        company.append({frozenset(rows.tolist()) for rows in order.micro_batches(0)})
    assert company[0] != company[1]


SCRIPT = """
import numpy as np
from training.loop.order import make_order
rng = np.random.default_rng(1)
order = make_order(np.array([[64, 64], [64, 96]])[rng.integers(2, size=50)], rng.integers(1, 3, size=50),
                   seed=3, epoch=2, micro_batch_size=4, global_batch_size=10)
print(order.samples.tolist(), order.micro_starts.tolist(), order.step_starts.tolist())
"""


def test_the_order_does_not_depend_on_the_hash_seed():
    printed = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@settings(max_examples=20)
@given(epochs())
def test_a_written_order_is_mapped_back(tmp_path_factory, arguments):
    path = tmp_path_factory.mktemp("order") / "0.npz"
    order = make_order(**arguments)
    sha256 = write_order(path, order)
    assert write_order(path, order) == sha256
    mapped = read_order(path, sha256)
    for name in ("samples", "micro_starts", "step_starts"):
        assert isinstance(getattr(mapped, name), np.memmap)
        assert np.array_equal(getattr(mapped, name), np.load(path)[name])
        assert np.array_equal(getattr(mapped, name), getattr(order, name))


def test_another_order_under_the_same_name_is_damage(tmp_path):
    one = make_order(
        np.full((4, 2), 64),
        np.ones(4, dtype=int),
        seed=0,
        epoch=0,
        micro_batch_size=2,
        global_batch_size=4,
    )
    write_order(tmp_path / "0.npz", one)
    with pytest.raises(DamageError, match=r"0\.npz"):
        read_order(tmp_path / "0.npz", "0" * 64)
