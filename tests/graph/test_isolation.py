"""Two workspaces share nothing; a second run on one of them is refused; what is forgotten never
returns."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import polars as pl
from graph_tools import foundry

from resources.instance import instance
from resources.workspace.store import Store
from training.runs.run_folder import read_inputs


def run_ids(home):
    with instance(home) as opened:
        return {run.run_id for run in opened.get_runs()}


def test_two_workspaces_share_nothing(small, demo):
    assert run_ids(small)
    assert run_ids(demo)
    assert not run_ids(small) & run_ids(demo)
    with instance(small) as opened:
        assert opened.get_dynamic_partitions("runs") == ["demo"]
        assert opened.get_latest_materialization_event(dg.AssetKey("selected_images")) is not None
    for home in (small, demo):
        outside = str(demo if home == small else small)
        for path in [*home.glob("tables/*/*.json"), *home.glob("runs/*/*.json")]:
            assert outside not in path.read_text()


def test_a_second_run_on_the_same_workspace_names_the_first(small_copy):
    code = (
        "import sys; from pathlib import Path; from training.commit import lock\n"
        "with lock(Path(sys.argv[1]) / 'locks' / 'foundry-run.lock', 'x'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(small_copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        second = foundry("run", "--home", small_copy, check=False)
        holder.stdin.close()
    assert second.returncode == 2
    assert f"is held by pid {holder.pid}" in second.stderr
    assert len([line for line in second.stderr.splitlines() if line.startswith("foundry: ")]) == 1
    assert "Traceback" not in second.stderr


def test_forgotten_images_leave_every_table_and_never_return(small_copy):
    store = Store(small_copy)
    gone = store.read("training_set", ["image_id"])["image_id"][0]
    said = foundry("forget", gone, "--home", small_copy).stdout
    assert "runs that saw one of them: demo" in said
    foundry("run", "--home", small_copy, "--select", "training_set")
    store = Store(small_copy)
    for table in ("raw_images", "embeddings", "tags", "captions", "watermark_boxes", "quality_scores",
                  "selected_images", "bucket_assignments", "latents", "training_set"):  # fmt: skip
        assert store.read(table, ["image_id"]).filter(pl.col("image_id") == gone).is_empty(), table
    rejected = store.read("rejected_images").filter(pl.col("image_id") == gone)
    assert set(rejected["reason"]) == {"forgotten"}
    left = [path for path in small_copy.rglob("*.parquet") if gone in path_ids(path)]
    (frozen,) = [path for path in left if path.parent.name != "rejected_images"]
    assert frozen == read_inputs(store.paths.run_folder("demo")).training_set, (
        "which the run is told of"
    )
    (row,) = pl.read_parquet(frozen).filter(pl.col("image_id") == gone).iter_rows(named=True)
    assert (row["split"], row["tags"], row["caption"], row["height"]) == (
        "forgotten",
        [],
        None,
        None,
    )


def test_runs_reports_and_releases_stay_readable_after_forgetting(small_copy):
    """A run was trained on the image, and an image of its report is nearest to it."""
    store = Store(small_copy)
    last = store.checkpoints.last("demo")
    nearest = (
        store.read("eval_metrics", parts=[last]).drop_nulls("image_id").sort("value")["image_id"]
    )
    frozen = store.read("training_set").filter(pl.col("split") == "train")["image_id"].to_list()
    gone = next((image_id for image_id in reversed(nearest) if image_id in frozen), frozen[0])
    foundry("forget", gone, "--home", small_copy)
    assert "training set is missing" not in foundry("status", "--home", small_copy).stdout
    foundry("run", "--home", small_copy)
    assert "nothing was done" in foundry("run", "--home", small_copy).stdout
    for command in (("verify",), ("train", "--run", "demo"), ("prompts", "--run", "demo"), ("cost", "--run", "demo"),
                    ("compare", "base", last), ("gc",), ("train", "--run", "demo", "--dry-run")):  # fmt: skip
        foundry(*command, "--home", small_copy)
    release = small_copy / "release" / "demo"
    assert (
        "1 more were in the set and have been forgotten since"
        in (release / "README.md").read_text()
    )
    report = (release / "report.html").read_text()
    assert "1 of its images forgotten since" in report
    assert gone[:12] not in report
    assert "0 damaged" in foundry("verify", "--home", small_copy).stdout


def path_ids(path: Path) -> set[str]:
    frame = pl.read_parquet(path)
    return set(frame["image_id"]) if "image_id" in frame.columns else set()
