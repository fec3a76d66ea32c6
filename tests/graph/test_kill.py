"""Kill -9 during any stage, run again: the digests of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from graph_tools import digests, foundry, make_small

STAGES = (
    "source_listing", "raw_images", "embeddings", "duplicate_groups", "quality_pairs", "quality_model",
    "quality_scores", "tag_vocabulary", "selected_images", "bucket_assignments", "latents", "training_set",
    "base_model", "prompt_statistics", "checkpoints", "prompt_sets", "sample_images", "eval_metrics", "verdicts",
    "release",
)  # fmt: skip
COSTLY = ("raw_images", "embeddings", "latents", "checkpoints", "sample_images")
TYPICAL = ("embeddings", "checkpoints", "sample_images")


def kill_during(home, stage, delay_s):
    """Run until `stage` is announced, wait, and kill the process and its workers; the trainer lives on by design."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("FOUNDRY_HOME", None)
    command = [Path(sys.executable).with_name("foundry"), "run", "--home", str(home)]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        for line in run.stderr:
            if stage in line.strip().split(",")[0].split(" + "):
                time.sleep(delay_s)
                run.send_signal(signal.SIGKILL)
                run.stderr.read()
                return True
    return False


def killed_and_finished(home, source, stages):
    make_small(home, source)
    for number, stage in enumerate(stages):
        # A cheap stage is over in tenths of a second, and the next one with it: that could then not be killed.
        delay_s = 0.3 + 0.7 * (number % 3) if stage in COSTLY else 0.06 * (number % 3)
        assert kill_during(home, stage, delay_s), f"{stage} was not announced"
    foundry("run", "--home", home)
    return digests(home)


@pytest.mark.timeout(900)
def test_a_run_killed_in_typical_stages_ends_as_an_undisturbed_one(small, small_source, tmp_path):
    assert killed_and_finished(tmp_path / "workspace", small_source, TYPICAL) == digests(small)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_in_every_stage_ends_as_an_undisturbed_one(small, small_source, tmp_path):
    assert killed_and_finished(tmp_path / "workspace", small_source, STAGES) == digests(small)


def test_verify_finds_damage_and_repair_rebuilds_just_that(small_copy, small):
    table = next((small_copy / "tables" / "quality_scores").glob("*.parquet"))
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    latents = next(small_copy.glob("latents/*/*/*.safetensors"))
    latents.write_bytes(latents.read_bytes()[:-7])
    found = foundry("verify", "--home", small_copy, check=False)
    assert found.returncode == 1
    assert table.name in found.stdout
    assert latents.name in found.stdout
    assert "2 damaged" in found.stdout
    foundry("verify", "--home", small_copy, "--repair")
    foundry("run", "--home", small_copy)
    assert foundry("verify", "--home", small_copy).stdout.startswith("0 damaged")
    before, after = digests(small), digests(small_copy)
    assert {name for name in before if before[name] != after.get(name)} == set()
