"""Messages between GPUs, without any: what happens before each, and what a lost rank looks like."""

import pytest
import torch
import torch.distributed as dist

from training.errors import TrainingError
from training.ranks import Ranks


@pytest.fixture
def calls(monkeypatch):
    """Two ranks on GPUs, of which this is one; calls are written down instead of made."""
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append("synchronize"))
    for name in ("broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: made.append(name))

    def all_reduce(values, group=None, **_):
        made.append("all_reduce" if group is None else "agree")

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return made


@pytest.fixture
def ranks():
    ranks = Ranks()
    ranks.size, ranks._control = 2, "gloo"
    return ranks


MESSAGES = {
    "all_reduce": lambda ranks: ranks.sum_(torch.ones(2)),
    "all_gather": lambda ranks: ranks.gather(torch.ones(2)),
    "broadcast": lambda ranks: ranks.broadcast_([torch.ones(2)], 1),
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
    with pytest.raises(TrainingError, match=r"another rank of this run was lost, .*Connection closed by peer"):
        MESSAGES[name](ranks)
    assert calls == ["synchronize"]
