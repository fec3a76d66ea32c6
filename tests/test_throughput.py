"""The benchmark of training runs at tiny size wherever there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.cost import read_rates
from training.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train_throughput.py"


def test_every_lever_runs_and_the_results_are_written(tmp_path):
    out = tmp_path / "rates.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--steps", "1", "--accumulate", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    names = [result["name"] for result in found["configurations"]]
    assert names[0] == "bigASP recreated"
    assert names[-1] == "bigASP recreated, again"
    assert {"bf16 autocast", "no checkpointing", "channels_last", "fused AdamW", "micro-batch 4"} < set(names)
    assert all(result["images_per_s"] > 0 for result in found["configurations"])
    assert all(name in done.stdout for name in names)
    with pytest.raises(ConfigError, match="rates"):
        read_rates(out)  # a tiny model's rates are nobody's
