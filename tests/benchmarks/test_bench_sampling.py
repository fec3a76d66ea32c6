"""The benchmark of sampling runs at tiny size wherever there is no GPU, and halves a batch that
does not fit."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import bench_sampling

    return bench_sampling


def test_every_precision_is_measured(bench, capsys):
    results = bench.measure_all(
        torch.device("cpu"), tiny=True, batch_size=2, num_batches=1, num_steps=1
    )
    assert [result.precision for result in results] == ["fp32", "tf32", "bf16"]
    assert all(result.images_per_s > 0 and result.batch_size == 2 for result in results)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["fp32", "2"], ["tf32", "2"], ["bf16", "2"],
    ]  # fmt: skip


@pytest.mark.parametrize(("fitting", "found"), [(3, 2), (0, 0)])
def test_a_batch_that_does_not_fit_is_halved(bench, monkeypatch, fitting, found):
    asked = []

    def sample(parts, prompts, config, device):
        asked.append(config.batch_size)
        if config.batch_size > fitting:
            raise torch.OutOfMemoryError
        return iter(())

    monkeypatch.setattr(bench, "sample", sample)
    config = bench.SamplingConfig(batch_size=4)
    result = bench.measure(None, config, torch.device("cpu"), side_px=64, num_batches=1)
    assert (result.batch_size, result.images_per_s is None) == (found, not found)
    assert list(dict.fromkeys(asked)) == ([4, 2] if found else [4, 2, 1])
