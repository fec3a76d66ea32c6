"""The benchmark of training runs writes what `foundry cost` reads, and fails where a lever is not
seen to act."""

import json
import sys
from pathlib import Path

import pytest
import torch

from training.errors import ConfigError
from training.estimates.cost import read_rates


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import train_throughput

    return train_throughput


def results(bench, contradiction=""):
    return [
        bench.Result(name="bigASP recreated", images_per_s=8.0, mfu=0.16, peak_bytes=10**9, ratio=1.0),
        bench.Result(name="all levers", images_per_s=20.0, mfu=0.4, peak_bytes=10**9, ratio=2.5,
                     contradiction=contradiction),
        bench.Result(name="too large", images_per_s=None, mfu=None, peak_bytes=None, ratio=None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("contradiction", "status"), [("", 0), ("all levers: nothing was compiled", 1)]
)
def test_the_results_are_written_and_a_lever_that_does_nothing_fails(
    bench, monkeypatch, tmp_path, capsys, contradiction, status
):
    monkeypatch.setattr(bench, "measure_all", lambda *_, **__: iter(results(bench, contradiction)))
    monkeypatch.setattr(
        sys, "argv", ["train_throughput.py", "--tiny", "--out", str(tmp_path / "rates.json")]
    )
    assert bench.main() == status
    found = json.loads((tmp_path / "rates.json").read_text())
    assert [result["name"] for result in found["configurations"]] == [
        "bigASP recreated",
        "all levers",
        "too large",
    ]
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert ("NOT SEEN" in printed) == bool(contradiction)
    with pytest.raises(ConfigError, match="rates"):
        read_rates(tmp_path / "rates.json")  # a tiny model's rates are no one's


def test_foundry_cost_reads_the_best_rate_of_a_known_card(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    bench.write(tmp_path / "rates.json", torch.device("cuda"), results(bench), tiny=False)
    rates = read_rates(tmp_path / "rates.json")
    assert (rates.training, rates.mfu) == (20.0, 0.4)
