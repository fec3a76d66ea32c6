"""Messages between GPUs, without any: what happens before each, and what a lost rank looks like."""

import pytest
import torch
import torch.distributed as dist

from training.config.run import ComputeConfig, RunConfig
from training.errors import TrainingError
from training.optimization.ranks import Ranks


@pytest.fixture
def calls(monkeypatch):
    """Two ranks on GPUs, of which this is one; calls are written down instead of made."""
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append("synchronize"))
    for name in ("broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: made.append(name))

    def all_reduce(values, group=None, async_op=False, **_):
        made.append("agree" if group else "all_reduce")

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return made


@pytest.fixture
def ranks():
    ranks = Ranks()
    ranks.size, ranks._control = 2, "gloo"
    return ranks


MESSAGES = {
    "all_gather": lambda ranks: ranks.gather(torch.ones(2)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_ranks_meet_before_a_message_between_gpus_and_only_there(ranks, calls, name):
    MESSAGES[name](ranks)
    assert calls == [name]
    calls.clear()
    ranks.device = torch.device("cuda", 0)
    MESSAGES[name](ranks)
    assert calls == ["synchronize", "agree", name]


@pytest.mark.parametrize("name", MESSAGES)
def test_a_lost_rank_is_noticed_before_the_message(ranks, calls, monkeypatch, name):
    def lost(values, group=None, **_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", lost)
    ranks.device = torch.device("cuda", 0)
    with pytest.raises(
        TrainingError, match=r"another rank of this run was lost, .*Connection closed by peer"
    ):
        MESSAGES[name](ranks)
    assert calls == ["synchronize"]


class Sum:
    """A sum under way that writes down when it is waited for."""

    def __init__(self, calls):
        self.calls = calls

    def wait(self):
        self.calls.append("wait")


def test_sums_overlap_and_ranks_meet_once_for_all_of_them_between_gpus(ranks, calls):
    pending = [Sum(calls), Sum(calls)]
    ranks.begin_sum(torch.ones(2))
    ranks.wait(pending)
    assert calls == ["all_reduce", "wait", "wait"]
    calls.clear()
    ranks.device = torch.device("cuda", 0)
    ranks.begin_sum(torch.ones(2))
    ranks.wait(pending)
    assert calls == ["all_reduce", "agree", "wait", "wait"], (
        "the host goes on with the device's queue full"
    )


def test_numbers_of_the_host_are_added_without_the_gpu(ranks, calls):
    ranks.device = torch.device("cuda", 0)
    ranks.sum_(torch.ones(2))
    assert calls == ["agree"]


def test_a_rank_that_is_lost_in_a_sum_is_named(ranks):
    class Broken:
        def wait(self):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(
        TrainingError, match=r"another rank of this run was lost, .*Connection closed by peer"
    ):
        ranks.wait([Broken()])


def test_shares_are_sent_after_one_meeting(ranks, calls):
    from training.optimization.sharding import Sharding

    ranks.device = torch.device("cuda", 0)
    config = RunConfig(encoding="tiny", compute=ComputeConfig(shard_optimizer=True))
    parameters = {f"unet.{number}": torch.nn.Parameter(torch.ones(2)) for number in range(4)}
    Sharding(parameters, ranks, config).publish()
    assert calls == ["synchronize", "agree", "broadcast", "broadcast"]
