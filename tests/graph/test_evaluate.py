"""Evaluating on another machine, external models, comparisons and the sensor, on the small workspace."""

import json
import shutil

import dagster as dg
import pytest
from graph_tools import digests, foundry

from assets import sample_images
from jobs import comparison
from jobs.sensors import new_checkpoint
from resources.workspace.store import Store
from training.errors import DataError, EvaluationError
from training.evaluation import champion
from training.evaluation.remote_sampling import RECORD
from training.runs import retention
from training.runs.run_folder import checkpoints, read_ready


def ends(home):
    """The first and the last checkpoint of the run, with their folders."""
    folders = checkpoints(home / "runs" / "demo")
    return [(read_ready(folder).checkpoint, folder) for folder in (folders[0], folders[-1])]


def test_images_drawn_elsewhere_are_those_of_this_machine(small_copy, tmp_path):
    before = digests(small_copy)
    _, (last, model) = ends(small_copy)
    foundry("evaluate", "--home", small_copy, "--export", tmp_path / "prompts.json")
    away = tmp_path / "away"
    away.mkdir()
    shutil.copytree(model, away / "model", ignore=shutil.ignore_patterns("state"))
    draw = ("evaluate", "--checkpoint", away / "model", "--prompts", tmp_path / "prompts.json")
    assert "drew 6 images" in foundry(*draw, "--out", away / "out", folder=away).stdout

    (small_copy / "tables" / "sample_images" / f"{last}.json").unlink()
    shutil.rmtree(small_copy / "sample_images" / last)
    retention.want(model, "evaluation")
    assert last in foundry("evaluate", "--home", small_copy, "--adopt", away / "out").stdout
    assert digests(small_copy) == before
    assert len(list((small_copy / "sample_images" / last).glob("*.png"))) == 6
    assert not Store(small_copy).currency.stale(sample_images.sample_images)
    assert not list(model.glob("WANTED.evaluation"))

    record = json.loads((away / "out" / RECORD).read_text())
    record["sampling"]["num_steps"] = 3
    (away / "out" / RECORD).write_text(json.dumps(record))
    with pytest.raises(
        EvaluationError, match="drawn otherwise than this workspace would: sampling: here"
    ):
        comparison.adopt(Store(small_copy), away / "out")


def test_a_rival_is_judged_beside_ours_and_any_two_compare(small_copy, tmp_path):
    (_, first_folder), (last, _) = ends(small_copy)
    shutil.copytree(first_folder, tmp_path / "other")
    added = foundry("external", "add", "other", tmp_path / "other", "--home", small_copy).stdout
    assert "rival.other@0: sdxl" in added
    done = foundry("compare", "demo", "other", "--home", small_copy).stdout
    assert "clip_score (all): too few prompts to tell" in done
    page = small_copy / "comparisons" / f"{last}~rival.other@0.html"
    assert str(page) in done.replace("\n", "")
    assert "<svg" in page.read_text() or "data:image" in page.read_text()
    assert f"{last}~rival.other@0" in Store(small_copy).tables.parts("verdicts")
    with pytest.raises(DataError, match="demo@77 is not there"):
        comparison.resolve(Store(small_copy), "demo@77")
    for name in ("base", "champion"):
        assert comparison.resolve(Store(small_copy), name).startswith("base.")
    assert champion.read(small_copy).checkpoint.startswith("base.")


def test_the_sensor_asks_for_what_is_due_and_keeps_it(small_copy):
    (first, folder), _ = ends(small_copy)
    for table in ("eval_metrics", "sample_images"):
        (small_copy / "tables" / table / f"{first}.json").unlink()
    store = Store(small_copy)
    with dg.instance_for_test() as instance:
        context = dg.build_sensor_context(instance=instance, resources={"store": store})
        found = new_checkpoint(context)
    assert [request.partition_key for request in found.run_requests] == [first]
    marks = list(folder.glob("WANTED.*"))
    assert [mark.name for mark in marks] == ["WANTED.evaluation"]
    foundry("evaluate", first, "--home", small_copy)
    assert not list(folder.glob("WANTED.*"))
