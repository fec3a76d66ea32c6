"""Real torchrun jobs of 1, 2 and 4 gloo ranks see the same samples in the same order, and make the
same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.runs import run_folder
from training.runs.event_log import read_events

SHORT = {"num_samples": 44, "validation.every_samples": 44, "checkpoints.every_samples": 44}


def torchrun(run, num_ranks, trace, **environment):
    """Train a run under torchrun with `traced_run.py`; returns what every micro-batch was made of,
    in order."""
    trace.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks),
        str(Path(__file__).parents[1] / "tools" / "traced_run.py"), str(run.folder),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRACE": str(trace), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for path in trace.glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len({path.stem for path in trace.glob("*.jsonl")}) == num_ranks
    return sorted(lines, key=lambda line: (line["step"], line["index"]))


def contents(run):
    ready = run_folder.read_ready(run_folder.checkpoints(run.folder)[-1])
    return {entry.name: entry.sha256 for entry in (*ready.files, *ready.state_files)}


def losses(run):
    return [
        event["loss"].hex()
        for event in read_events(run.folder / run_folder.EVENTS)
        if event["event"] == "step"
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_sdxl):
    from tiny_runs import build_run

    folder = tmp_path_factory.mktemp("one")
    run = build_run(folder, tiny_sdxl, "one", SHORT)
    return run, torchrun(run, 1, folder / "trace")


def test_the_trace_names_every_sample_once_an_epoch(one):
    run, trace = one
    seen = [image_id for line in trace for image_id in line["image_ids"]]
    # 22 training images, 44 samples: two epochs.
    assert (
        sorted(seen[:22]) == sorted(seen[22:]) == sorted(run.rows.filter(split="train")["image_id"])
    )
    assert seen[:22] != seen[22:]
    assert [line["index"] for line in trace if line["step"] == 0] == list(
        range(sum(x["step"] == 0 for x in trace))
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_more_ranks_see_the_same_sequence_and_make_the_same_bits(
    one, make_run, tmp_path, num_ranks
):
    first, sequence = one
    run = make_run(f"ranks{num_ranks}", **SHORT, num_processes=num_ranks)
    assert torchrun(run, num_ranks, tmp_path / "trace", PYTHONHASHSEED="3") == sequence
    assert losses(run) == losses(first)
    assert contents(run) == contents(first)


def test_fast_reduction_and_shared_optimizer_agree_in_their_losses(one, make_run, tmp_path):
    first, sequence = one
    run = make_run("fast", **SHORT, reduction="fast", **{"compute.shard_optimizer": True})
    assert torchrun(run, 2, tmp_path / "trace") == sequence
    pairs = zip(losses(run), losses(first), strict=True)
    assert all(abs(float.fromhex(a) - float.fromhex(b)) < 1e-6 for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 1])
def test_a_shared_optimizer_is_resumed_on_as_many_ranks_and_on_another_number(
    one, make_run, tmp_path, num_ranks
):
    run = make_run("shared", **SHORT, **{"compute.shard_optimizer": True})
    torchrun(run, 2, tmp_path / "first", SIGTERM_AT="3.0")
    assert read_events(run.folder / run_folder.EVENTS)[-1]["event"] == "stopped"
    torchrun(run, num_ranks, tmp_path / "second")
    assert losses(run) == losses(one[0])
    assert contents(run) == contents(one[0])


def test_another_seed_is_another_sequence(one, make_run, tmp_path):
    run = make_run("other", **SHORT, seed=12)
    assert torchrun(run, 1, tmp_path / "trace") != one[1]
    assert losses(run) != losses(one[0])


def test_twelve_steps_equal_five_and_seven_after_sigterm_in_the_middle_of_one(make_run, tmp_path):
    twelve = {"num_samples": 88, "validation.every_samples": 44, "checkpoints.every_samples": 1000}
    whole, broken = make_run("whole", **twelve), make_run("broken", **twelve)
    sequence = torchrun(whole, 1, tmp_path / "whole")
    assert len(losses(whole)) == 12, "22 images make steps of 8, 8 and 6"
    first = torchrun(broken, 1, tmp_path / "first", SIGTERM_AT="5.0")
    assert run_folder.read_ready(run_folder.checkpoints(broken.folder)[-1]).samples_seen == 38
    assert read_events(broken.folder / run_folder.EVENTS)[-1]["event"] == "stopped"
    assert len(losses(broken)) == 5
    second = torchrun(broken, 1, tmp_path / "second")
    assert [*(line for line in first if line["step"] < 5), *second] == sequence
    assert losses(broken) == losses(whole)
    assert contents(broken) == contents(whole)
