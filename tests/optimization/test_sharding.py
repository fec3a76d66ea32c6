"""Who steps which parameter: every one has one owner, no rank has much more than another, and the
order of the model's tensors has no say."""

import dataclasses
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config.run import RunConfig
from training.optimization.sharding import Sharding, assign_owners

sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=30)


class Alone:
    """A rank of a run that does not speak to others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def parameters(sizes):
    return {
        f"p{number}": torch.nn.Parameter(torch.zeros(size)) for number, size in enumerate(sizes)
    }


@given(sizes=sizes, num_ranks=st.integers(1, 8), seed=st.integers(0, 99))
def test_shares_differ_by_at_most_the_largest_parameter(sizes, num_ranks, seed):
    model = parameters(sizes)
    owners = assign_owners(model, num_ranks)
    assert list(owners) == list(model)
    assert set(owners.values()) <= set(range(num_ranks))
    loads = [0] * num_ranks
    for name, owner in owners.items():
        loads[owner] += model[name].numel()
    assert max(loads) - min(loads) <= max(sizes)

    shuffled = list(model)
    random.Random(seed).shuffle(shuffled)
    assert assign_owners({name: model[name] for name in shuffled}, num_ranks) == owners


def test_by_hand():
    # 8 to rank 0, 5 to rank 1, then 4 and 3 to the lighter one: 8 + 3 and 5 + 4; 2 to rank 1 (9).
    assert assign_owners(parameters([3, 8, 2, 5, 4]), 2) == {
        "p0": 0,
        "p1": 0,
        "p2": 1,
        "p3": 1,
        "p4": 1,
    }


def test_the_ranks_of_a_run_own_all_together():
    config = RunConfig(encoding="sdxl", num_samples=1)
    shared = dataclasses.replace(
        config, compute=dataclasses.replace(config.compute, shard_optimizer=True)
    )
    model = parameters([7, 5, 3, 2])
    owned = [set(Sharding(model, Alone(rank, 3), shared).owned) for rank in range(3)]
    assert sum(map(len, owned)) == len(set().union(*owned)) == 4
    assert set(Sharding(model, Alone(1, 3), config).owned) == set(model)
    assert not Sharding(model, Alone(0, 1), shared).active
