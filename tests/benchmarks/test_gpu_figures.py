"""The figures of a GPU: taken on a CPU at tiny size, where every lever is seen to act, and their
book-keeping."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_figures

    return gpu_figures


@pytest.fixture
def setting(bench):
    return bench.Setting(device=torch.device("cpu"), tiny=False)


@pytest.mark.timeout(1800)
def test_everything_runs_at_tiny_size_and_every_lever_is_seen_to_act(tmp_path):
    out, table = tmp_path / "figures.json", tmp_path / "table.md"
    command = [
        ROOT / "benchmarks" / "gpu_figures.sh",
        "--tiny",
        "--out",
        str(out),
        "--table",
        str(table),
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "SECONDS_AT_MOST": "1700"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads(out.read_text())
    assert list(content["parts"]) == ["training", "levers", "encoding", "sampling", "annotators"]
    assert {part["status"] for part in content["parts"].values()} == {"done"}
    rows = {row["name"]: row for row in content["parts"]["levers"]["rows"]}
    assert list(rows) == [
        "bigASP recreated", "no sync in micro-steps", "fused AdamW", "bf16 autocast", "bf16 weights, fp32 master",
        "no checkpointing", "channels_last", "pinned, sent ahead", "compile blocks", "micro-batch 3", "micro-batch 4",
        "micro-batch 1", "compile blocks; one size", "compile whole; one size", "bigASP recreated; again",
    ]  # fmt: skip
    syncs = {name: row["counts"]["host syncs"] for name, row in rows.items()}
    assert {name for name, count in syncs.items() if count != 1} == {
        "bigASP recreated",
        "bigASP recreated; again",
    }
    assert rows["pinned, sent ahead"]["not_run"] == "pinned memory: no CUDA"
    assert rows["compile whole; one size"]["counts"]["graphs"] == 1
    phases = [
        "data",
        "host-to-device",
        "forward",
        "backward",
        "reduction",
        "optimizer",
        "validation",
        "checkpoint",
    ]
    assert list(rows["bigASP recreated"]["budget"]) == phases
    # AdamW in one call reads weights, gradients and moments once; operation by operation it is over
    # twice as much.
    moved = {name: row["counts"]["optimizer bytes"] for name, row in rows.items()}
    assert moved["no sync in micro-steps"] > 2 * moved["fused AdamW"]
    assert "| bigASP recreated |" in table.read_text()


def part(bench, name, rows, cap_s=100):
    return bench.Part(name=name, cap_s=cap_s, rows=rows)


def two_rows(setting):
    yield {"name": "one", "images_per_s": 1.0, "goal": 2.0}
    yield {"name": "two", "images_per_s": None, "goal": 2.0}


def never_ends(setting):
    yield {"name": "before", "images_per_s": 3.0, "goal": 2.0}
    while True:
        time.sleep(0.01)


def hides_what_it_meets(setting):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue
    yield


def fails(setting):
    yield {"name": "first", "images_per_s": 3.0, "goal": 2.0}
    raise RuntimeError("out of luck")


def breaks_the_gpu(setting):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
    yield


def test_parts_end_each_in_their_own_way_and_a_rest_that_has_no_time_is_not_run(
    bench, setting, tmp_path, monkeypatch
):
    now = [0.0]

    def late(setting):
        now[0] += 100
        yield from never_ends(setting)

    monkeypatch.setattr(bench, "MIN_PART_S", 0.1)
    monkeypatch.setattr(bench.time, "time", lambda: now[0])
    parts = [
        part(bench, "whole", two_rows),
        part(bench, "bad", fails),
        part(bench, "endless", late, cap_s=0.3),
    ]
    parts += [part(bench, "stubborn", hides_what_it_meets)]
    monkeypatch.setattr(bench, "PARTS", parts)
    figures = bench.Figures(tmp_path / "f.json", setting, resume=False)
    assert bench.run(setting, figures, until=50.0) == 1
    found = json.loads((tmp_path / "f.json").read_text())["parts"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "whole": "done", "bad": "failed", "endless": "cut_off", "stubborn": "not_run",
    }  # fmt: skip
    assert [len(found[name]["rows"]) for name in ("whole", "bad", "endless", "stubborn")] == [
        2,
        1,
        1,
        0,
    ]
    assert "out of luck" in found["bad"]["reason"]
    assert "0 s of the call were left" in found["stubborn"]["reason"]
    lines = bench.table(figures.content).splitlines()
    assert any("| two | out of memory |" in line for line in lines)
    assert any(line.startswith("- stubborn: not_run (") for line in lines)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_part_ends_when_its_time_is_over_whatever_it_catches(
    bench, setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "PARTS", [part(bench, "stubborn", hides_what_it_meets)])
    figures = bench.Figures(tmp_path / "f.json", setting, resume=False)
    bench.run_part(bench.PARTS[0], setting, figures, 0.2)
    assert figures.part("stubborn")["status"] == "not_run"
    assert "was over" in figures.part("stubborn")["reason"]


def test_a_broken_gpu_costs_its_part_and_the_rest_is_resumed(bench, setting, tmp_path, monkeypatch):
    parts = [part(bench, "broken", breaks_the_gpu), part(bench, "whole", two_rows)]
    monkeypatch.setattr(bench, "PARTS", parts)
    path = tmp_path / "f.json"
    until = time.time() + 60
    assert bench.run(setting, bench.Figures(path, setting, resume=False), until) == bench.GPU_FAILED
    figures = bench.Figures(path, setting, resume=True)
    assert bench.run(setting, figures, until) == 1
    assert [figures.part(name)["status"] for name in ("broken", "whole")] == ["failed", "done"]


def test_a_lever_that_is_not_seen_fails_the_call(bench, setting, tmp_path, monkeypatch, capsys):
    def idle(setting):
        yield {
            "name": "lever",
            "images_per_s": 1.0,
            "goal": 1.0,
            "contradiction": "lever: nothing was compiled",
        }

    monkeypatch.setattr(bench, "PARTS", [part(bench, "levers", idle)])
    assert (
        bench.run(
            setting, bench.Figures(tmp_path / "f.json", setting, resume=False), time.time() + 60
        )
        == 1
    )
    assert "fault: lever: nothing was compiled" in capsys.readouterr().err


def test_a_cpu_is_measured_at_tiny_size_only(bench, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["--out", str(tmp_path / "f.json")])
    assert "give --tiny" in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()
