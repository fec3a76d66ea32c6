"""The demo: every stage made, every candidate accounted for, what the models say is true; the whole
one is won."""

import json

import polars as pl
import pytest
from graph_tools import foundry

from resources.workspace.store import Store


@pytest.fixture(scope="session")
def truth(demo):
    """What the generator knows of every file."""
    lines = (demo / "truth.jsonl").read_text("utf-8").splitlines()
    return pl.DataFrame([json.loads(line) for line in lines], infer_schema_length=None)


def test_every_candidate_is_accounted_for(demo):
    query = "select status, count(*) n from ingest_verdicts group by 1 order by 1"
    rows = [
        json.loads(line)
        for line in foundry("sql", "--home", demo, "--format", "jsonl", query).stdout.splitlines()
    ]
    counts = {row["status"]: row["n"] for row in rows}
    files = [
        path
        for path in (demo / "pictures").rglob("*")
        if path.is_file() and path.suffix not in (".txt", ".json")
    ]
    assert counts["accepted"] + counts["rejected"] == len(files)
    assert counts["rejected"] > 0


def test_every_stage_is_made_and_shown(demo):
    from assets.registry import STAGES

    store = Store(demo)
    for name, stage in STAGES.items():
        assert store.currency.keys(stage.scope), name
        assert store.currency.stale(stage) == [], name
    printed = (demo / "first_run.txt").read_text()
    assert "paired by prompt" in printed
    assert "fine-tuned" in printed


def test_what_the_annotators_say_is_true(demo, truth):
    store = Store(demo)
    good = truth.filter(pl.col("kind") == "good").select(
        "image_id", "tags", "quality", "watermark_box"
    )
    tags = store.read("tags", ["image_id", "tags"]).join(good, on="image_id", how="inner")
    hits = wrong = missed = 0
    for row in tags.iter_rows(named=True):
        said = {tag["name"] for tag in row["tags"] if tag["probability"] >= 0.4}
        hits += len(said & set(row["tags_right"]))
        wrong += len(said - set(row["tags_right"]))
        missed += len(set(row["tags_right"]) - said)
    assert 2 * hits / (2 * hits + wrong + missed) > 0.8
    scores = store.read("quality_scores", ["image_id", "score"]).join(
        good, on="image_id", how="inner"
    )
    assert scores.select(pl.corr("score", "quality", method="spearman")).item() > 0.6
    junk = truth.filter(pl.col("kind") == "junk").select("image_id")
    found = store.read("quality_scores", ["image_id", "score"]).join(
        junk, on="image_id", how="inner"
    )
    assert (found["score"] == 0).mean() > 0.7


def test_duplicates_are_found_and_split_as_one(demo, truth):
    store = Store(demo)
    copies = truth.filter(pl.col("copy_of").is_not_null())
    groups = store.read("duplicate_groups", ["image_id", "group"]).unique("image_id")
    of = dict(groups.iter_rows())
    together = [
        of.get(a) is not None and of.get(a) == of.get(b)
        for a, b in copies.select("image_id", "copy_of").iter_rows()
    ]
    assert sum(together) / len(together) > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fine_tune_learned_the_concept(whole_demo):
    """On prompts and seeds that nothing was tuned on."""
    store = Store(whole_demo)
    verdicts = store.read("verdicts", parts=[f"base~{store.checkpoints.last('demo')}"])
    scores = verdicts.filter(pl.col("metric") == "clip_score")
    assert dict(scores.select("group", "verdict").iter_rows())["star"] == "better"
    # The first recipe lost 0.047 here; this one came to +0.006 and -0.005 with two seeds, give or
    # take 0.023.
    assert dict(scores.select("group", "difference").iter_rows())["general"] > -0.03, (
        "what the base knew is forgotten"
    )


def test_checks_pass(demo):
    import dagster as dg

    from resources.instance import instance

    with instance(demo) as opened:
        runs = opened.get_runs()
        assert runs
        assert all(run.status == dg.DagsterRunStatus.SUCCESS for run in runs)
        failed = {}
        for run in reversed(runs):
            for record in opened.all_logs(run.run_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION):
                evaluation = record.dagster_event.asset_check_evaluation_data
                failed[evaluation.check_name] = not evaluation.passed
    assert len(failed) >= 20
    # The aesthetic verdict may honestly be `worse`: many stars have bent points (docs/experiments.md).
    assert {name for name, bad in failed.items() if bad} <= {"nothing_got_worse"}


@pytest.mark.filterwarnings("ignore")  # MLflow imports modules that others have deprecated
def test_mlflow_has_the_run_and_its_images(demo):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{demo / 'mlflow.db'}")
    (experiment,) = [item for item in client.search_experiments() if item.name != "Default"]
    (run,) = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "demo"
    ]
    assert "train/loss" in run.data.metrics
    assert len(run.data.params) <= 6
    assert list((demo / "mlartifacts").rglob("*.png"))


def test_lineage_from_a_checkpoint_back_to_a_file(demo):
    store = Store(demo)
    checkpoint = store.read("checkpoints").sort("samples_seen").row(-1, named=True)
    manifest = store.manifest("training_set", "sdxl")
    assert checkpoint["training_set"] == manifest.digest
    sample = store.read("training_set").row(0, named=True)
    latent = (
        store.read("latents").filter(pl.col("image_id") == sample["image_id"]).row(0, named=True)
    )
    assert (demo / "latents" / "sdxl" / sample["shard"] / latent["file"]).is_file()
    image = (
        store.read("raw_images").filter(pl.col("image_id") == sample["image_id"]).row(0, named=True)
    )
    assert (demo / "pictures" / image["locator"]).is_file()


def test_the_release_loads_in_diffusers(demo):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(demo / "release" / "demo" / "model")
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert "# " in (demo / "release" / "demo" / "README.md").read_text()
