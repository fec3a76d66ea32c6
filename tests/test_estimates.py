"""What `foundry train --dry-run` and `foundry cost --run` say of a small workspace, against its own tables."""

import dataclasses
import re

import numpy as np
import polars as pl
import pytest
from conftest import SHARDS, training_rows
from typer.testing import CliRunner

from jobs import estimates
from jobs.cli import app
from resources.store import Store
from training import commit, recipes
from training.data.tables import TABLES
from training.errors import ConfigError, DataError, ModelError
from training.run_config import BatchConfig, ComputeConfig, RunConfig

CONFIG = RunConfig(
    encoding="tiny", num_samples=48, precision="fp32",
    batch=BatchConfig(global_batch_size=8, micro_batch_size=3),
)  # fmt: skip
HARDWARE = estimates.Hardware(num_gpus=2, gpu="H200", dollars_per_hour=3.0, rates=None)


def put(store, table, part, frame):
    """Commit a table as a stage would, as far as a reader can tell."""
    folder, frame = store.table_folder(table, part), TABLES[table].conform(frame)
    digests = commit.column_digests(frame)
    manifest = commit.Manifest(
        table=table, part=part, version=1, files=(commit.write_parquet(folder, part, frame),), rows=frame.height,
        digest=commit.logical_digest(digests, frame.height), columns=digests,
    )  # fmt: skip
    commit.commit_manifest(folder / f"{part}.json", manifest)


@pytest.fixture
def workspace(tmp_path, tiny_sdxl, write_generation):
    """22 images that train and 5 that validate, encoded; a base model; no run."""
    (tmp_path / "foundry.toml").write_text(
        f'format = 1\nsources = []\n[models]\nbase = "{tiny_sdxl}"\n'
        '[encodings.tiny.buckets]\nplan = "custom"\nsizes = [[32, 32], [32, 48], [48, 32]]\n'
    )
    store, rows = Store(tmp_path), training_rows(22, 5)
    put(store, "training_set", "tiny", rows)
    put(store, "tag_vocabulary", "all", pl.DataFrame(schema=TABLES["tag_vocabulary"].schema))
    for shard in SHARDS:
        write_generation(tmp_path / "latents" / "tiny" / shard, 1, rows.filter(pl.col("shard") == shard))
    return store


def files(store):
    return {path: path.stat().st_mtime_ns for path in store.home.rglob("*") if path.is_file()}


def test_a_dry_run_counts_what_the_trainer_would_do_and_writes_nothing(workspace):
    before = files(workspace)
    text = "\n".join(estimates.dry_run(workspace, CONFIG, HARDWARE))
    assert files(workspace) == before
    assert "training set: 22 images train, 5 validate" in text
    # Two whole epochs of 3 steps and 4 samples of the third: one step more.
    assert "steps: 7 of 8 samples in 2.18 epochs of 3" in text
    assert "$" in text
    assert "GPU-hours" in text


def test_short_micro_batches_of_each_bucket_are_those_of_the_order(workspace):
    epoch = estimates.count_epoch(workspace, CONFIG)
    sizes = np.diff(epoch.order.micro_starts)
    assert sizes.sum() == 22
    text = estimates.dry_run(workspace, CONFIG, HARDWARE)
    start = next(number for number, line in enumerate(text) if line.startswith("bucket"))
    table = [line.split() for line in text[start + 1 : start + 4]]
    assert {row[0]: int(row[1]) for row in table} == {"32x32": 8, "32x48": 7, "48x32": 7}
    assert sum(int(row[2]) for row in table) == len(sizes)
    assert sum(int(row[3]) for row in table) == (sizes < 3).sum()


def test_missing_latents_are_told_before_anything_starts(workspace):
    for path in (workspace.home / "latents" / "tiny" / SHARDS[1]).glob("g*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"13 of 27 images of the training set have no latents"):
        estimates.dry_run(workspace, CONFIG, HARDWARE)


def test_what_cannot_be_trained_is_told(workspace):
    other = dataclasses.replace(CONFIG, family="sd1")
    with pytest.raises(ModelError, match=r"sd1.*sdxl"):
        estimates.dry_run(workspace, other, HARDWARE)
    with pytest.raises(ConfigError, match=r"clip_skip=9.*3 layers"):
        estimates.dry_run(workspace, dataclasses.replace(CONFIG, clip_skip=9), HARDWARE)
    with pytest.raises(ConfigError, match=r"encoding='other'.*tiny"):
        estimates.dry_run(workspace, dataclasses.replace(CONFIG, encoding="other"), HARDWARE)
    half = dataclasses.replace(CONFIG, precision="bf16")
    with pytest.raises(ConfigError, match="V100"):
        estimates.dry_run(workspace, half, dataclasses.replace(HARDWARE, gpu="V100"))


def test_before_there_is_a_set_the_plan_stands_in(workspace):
    (workspace.home / "tables" / "training_set" / "tiny.json").unlink()
    text = "\n".join(estimates.dry_run(workspace, CONFIG, HARDWARE))
    assert "steps: 6; no training set yet" in text
    assert "TFLOP per sample" in text


def test_time_and_money_follow_cards_and_price(workspace):
    def figures(**changes):
        line = estimates.dry_run(workspace, long, dataclasses.replace(HARDWARE, **changes))[-1]
        return [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.\d\d", line)], line

    long = dataclasses.replace(CONFIG, num_samples=10**12)
    (one, hours, dollars), line = figures(num_gpus=1)
    assert "1 x H200" in line
    assert (one, dollars) == (hours, pytest.approx(3 * hours, abs=0.02))
    (four, *_), line = figures(num_gpus=4, dollars_per_hour=6.0)
    assert four == pytest.approx(hours / 4, abs=0.01)
    assert line.endswith("at $6 an hour")


def test_a_model_too_large_for_the_card_is_told(workspace):
    large = dataclasses.replace(CONFIG, batch=BatchConfig(global_batch_size=10**9, micro_batch_size=10**8))
    text = "\n".join(estimates.dry_run(workspace, large, HARDWARE))
    assert "memory: more than the 151 GB of one H200" in text


def test_a_block_that_the_model_does_not_have_is_told_before_weights_are_loaded(workspace):
    wrong = dataclasses.replace(CONFIG, compute=ComputeConfig(gradient_checkpointing=("down_blocks.7",)))
    with pytest.raises(ConfigError, match=r"no block 'down_blocks\.7'; there are down_blocks, down_blocks\.0, "):
        estimates.dry_run(workspace, wrong, HARDWARE)
    right = dataclasses.replace(CONFIG, compute=ComputeConfig(gradient_checkpointing=("up_blocks.0", "text_encoders")))
    assert estimates.dry_run(workspace, right, HARDWARE)


def test_the_bill_of_a_workspace_reads_its_tables(workspace):
    folder = workspace.run_folder("one")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(recipes.run_toml(CONFIG))
    with pytest.raises(DataError, match="no images yet"):
        estimates.workspace_work(workspace, "one")
    schema = TABLES["raw_images"].schema
    ids = training_rows(22, 5)["image_id"]
    raw = pl.DataFrame(
        {"image_id": ids, "source_id": ids, "bytes": [1000] * 27}, schema_overrides={"bytes": schema["bytes"]}
    )
    missing = [pl.lit(None, dtype=kind).alias(name) for name, kind in schema.items() if name not in raw.columns]
    put(workspace, "raw_images", SHARDS[0], raw.with_columns(missing).select(list(schema)))
    work, stored, advice = estimates.workspace_work(workspace, "one")
    assert (work.num_images, work.num_samples, work.num_generated) == (27, 48, 0)
    assert work.training_tflop > 0
    assert stored["raw"] == 27_000
    latents = sum(path.stat().st_size for path in (workspace.home / "latents").rglob("*.safetensors"))
    assert stored["latents"] == latents
    assert "2.2 per image and 6 steps" in advice[0]
    result = CliRunner().invoke(app, ["cost", "--home", str(workspace.home), "--run", "one"])
    assert result.exit_code == 0, result.exception
    assert "27.00 kB" in result.stdout
