"""Evaluating on another machine, rivals, comparisons and the sensor, on the small workspace."""

import json
import shutil

import dagster as dg
from graph_tools import digests, foundry

from jobs.sensors import new_checkpoint
from resources.store import Store
from training.evaluation import champion
from training.evaluation.elsewhere import PICTURES

LAST = "demo@96"


def test_pictures_drawn_elsewhere_are_those_of_this_machine(small_copy, tmp_path):
    before = digests(small_copy)
    model = small_copy / "runs" / "demo" / "checkpoints" / "samples_000000096"
    foundry("evaluate", "--home", small_copy, "--export", tmp_path / "prompts.json")
    away = tmp_path / "away"
    away.mkdir()
    shutil.copytree(model, away / "model", ignore=shutil.ignore_patterns("state"))
    draw = ("evaluate", "--checkpoint", away / "model", "--prompts", tmp_path / "prompts.json")
    assert "drew 6 pictures" in foundry(*draw, "--out", away / "out", cwd=away).stdout

    (small_copy / "tables" / "sample_images" / f"{LAST}.json").unlink()
    shutil.rmtree(small_copy / "sample_images" / LAST)
    assert LAST in foundry("evaluate", "--home", small_copy, "--adopt", away / "out").stdout
    assert digests(small_copy) == before
    assert len(list((small_copy / "sample_images" / LAST).glob("*.png"))) == 6
    assert "nothing was done" in foundry("run", "--home", small_copy).stdout

    values = json.loads((tmp_path / "prompts.json").read_text())
    values["sampling"]["num_steps"] = 3
    (tmp_path / "prompts.json").write_text(json.dumps(values))
    foundry(*draw, "--out", away / "other", cwd=away)
    refused = foundry("evaluate", "--home", small_copy, "--adopt", away / "other", check=False)
    assert refused.returncode == 2
    assert "drawn otherwise than this workspace would: sampling: here" in refused.stderr
    assert len(list((away / "other" / PICTURES).glob("*.png"))) == 6


def test_a_rival_is_judged_beside_ours_and_any_two_compare(small_copy, tmp_path):
    shutil.copytree(small_copy / "runs" / "demo" / "checkpoints" / "samples_000000048", tmp_path / "other")
    added = foundry("rival", "add", "other", tmp_path / "other", "--home", small_copy).stdout
    assert "rival.other@0: sdxl" in added
    done = foundry("compare", "demo", "other", "--home", small_copy).stdout
    assert "clip_score (all): too few prompts to tell" in done
    page = small_copy / "comparisons" / f"{LAST}~rival.other@0.html"
    assert str(page) in done.replace("\n", "")
    assert "<svg" in page.read_text() or "data:image" in page.read_text()
    asked = f"select b from verdicts where b like '%{LAST}' or a like '%{LAST}'"
    assert "rival.other@0" in foundry("sql", asked, "--home", small_copy, "--format", "csv").stdout
    assert "rival.other@0 has" not in foundry("compare", "base", "champion", "--home", small_copy, check=False).stderr
    gone = foundry("compare", "demo", "demo@77", "--home", small_copy, check=False)
    assert (gone.returncode, "demo@77 is not there" in gone.stderr) == (2, True)
    assert champion.read(small_copy).checkpoint.startswith("base.")


def test_the_sensor_asks_for_what_is_due_and_keeps_it(small_copy):
    for table in ("eval_metrics", "sample_images"):
        (small_copy / "tables" / table / "demo@48.json").unlink()
    store = Store(small_copy)
    with dg.instance_for_test() as instance:
        context = dg.build_sensor_context(instance=instance, resources={"store": store})
        found = new_checkpoint(context)
    assert [request.partition_key for request in found.run_requests] == ["demo@48"]
    marks = list(store.checkpoint_folder("demo@48").glob("WANTED.*"))
    assert [mark.name for mark in marks] == ["WANTED.evaluation"]
    foundry("evaluate", "demo@48", "--home", small_copy)
    assert not list(store.checkpoint_folder("demo@48").glob("WANTED.*"))
