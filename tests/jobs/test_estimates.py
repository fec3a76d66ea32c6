"""What `foundry train --dry-run`, `cost --run` and `prompts` say of a small workspace, against its
own tables."""

import dataclasses
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys

import dagster as dg
import numpy as np
import polars as pl
import pytest
from tiny_runs import SHARDS, training_rows
from typer.testing import CliRunner

from assets import checkpoints, prompt_statistics
from assets.declared import assets
from jobs import estimates, pipeline
from jobs.cli import app as cli
from jobs.cli.app import app
from resources import torchrun
from resources.workspace.store import Store
from training import commit, manifests
from training.config import recipes
from training.config.run import (
    BatchConfig,
    ComputeConfig,
    LossConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
)
from training.errors import ConfigError, DataError, ModelError, TrainingError
from training.runs.run_folder import read_config, read_inputs, write_inputs
from training.tables.schemas import TABLES

CONFIG = RunConfig(
    encoding="tiny", num_samples=48, precision="fp32",
    batch=BatchConfig(global_batch_size=8, micro_batch_size=3),
)  # fmt: skip
HARDWARE = estimates.Hardware(num_gpus=2, gpu="H200", dollars_per_hour=3.0, rates=None)


def put(store, table, part, frame):
    """Commit a table as a stage would, as far as a reader can tell."""
    folder, frame = store.tables.folder(table, part), TABLES[table].conform(frame)
    digests = commit.column_digests(frame)
    manifest = manifests.Manifest(
        table=table, part=part, version=1, files=(manifests.write_parquet(folder, part, frame),), rows=frame.height,
        digest=commit.logical_digest(digests, frame.height), columns=digests,
    )  # fmt: skip
    manifests.commit_manifest(folder / f"{part}.json", manifest)


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
        write_generation(
            tmp_path / "latents" / "tiny" / shard, 1, rows.filter(pl.col("shard") == shard)
        )
    return store


def files(store):
    return {path: path.stat().st_mtime_ns for path in store.home.rglob("*") if path.is_file()}


def test_a_dry_run_counts_what_the_trainer_would_do_and_writes_nothing(workspace):
    before = files(workspace)
    text = "\n".join(estimates.dry_run(workspace, "new", CONFIG, HARDWARE))
    assert files(workspace) == before
    assert "training set: 22 images train, 5 validate" in text
    # Two whole epochs of 3 steps and 4 samples of the third: one step more.
    assert "steps: 7 of up to 8 samples in 2.18 epochs of 3" in text
    assert "$" in text
    assert "GPU-hours" in text


def test_short_micro_batches_of_each_bucket_are_those_of_the_order(workspace):
    epoch = estimates.count_epoch(workspace, "new", CONFIG)
    sizes = np.diff(epoch.order.micro_starts)
    assert sizes.sum() == 22
    text = estimates.dry_run(workspace, "new", CONFIG, HARDWARE)
    start = next(number for number, line in enumerate(text) if line.startswith("bucket"))
    table = [line.split() for line in text[start + 1 : start + 4]]
    assert {row[0]: int(row[1]) for row in table} == {"32x32": 8, "32x48": 7, "48x32": 7}
    assert sum(int(row[2]) for row in table) == len(sizes)
    assert sum(int(row[3]) for row in table) == (sizes < 3).sum()


def test_missing_latents_are_told_before_anything_starts(workspace):
    for path in (workspace.home / "latents" / "tiny" / SHARDS[1]).glob("g*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"13 of 27 images of the training set have no latents"):
        estimates.dry_run(workspace, "new", CONFIG, HARDWARE)


def test_what_cannot_be_trained_is_told(workspace):
    other = dataclasses.replace(CONFIG, family="sd1")
    with pytest.raises(ModelError, match=r"sd1.*sdxl"):
        estimates.dry_run(workspace, "new", other, HARDWARE)
    with pytest.raises(ConfigError, match=r"clip_skip=9.*3 layers"):
        estimates.dry_run(workspace, "new", dataclasses.replace(CONFIG, clip_skip=9), HARDWARE)
    with pytest.raises(ConfigError, match=r"encoding='other'.*tiny"):
        estimates.dry_run(workspace, "new", dataclasses.replace(CONFIG, encoding="other"), HARDWARE)
    half = dataclasses.replace(CONFIG, precision="bf16")
    with pytest.raises(ConfigError, match="V100"):
        estimates.dry_run(workspace, "new", half, dataclasses.replace(HARDWARE, gpu="V100"))


def test_the_schedule_and_the_loss_are_refused_as_the_trainer_refuses_them(
    workspace, tiny_sdxl, tmp_path
):
    def refused(error, said, **changes):
        with pytest.raises(error, match=said):
            estimates.dry_run(workspace, "new", dataclasses.replace(CONFIG, **changes), HARDWARE)

    plain = LossConfig(weighting="plain")
    # The base model predicts the noise, and the recipe leaves it at that.
    refused(
        ConfigError,
        r"zero_terminal_snr=true, and the UNet is to predict the noise",
        zero_terminal_snr=True,
        loss=plain,
    )
    # A base model whose own schedule ends without signal.
    shutil.copytree(tiny_sdxl, tmp_path / "zero")
    path = tmp_path / "zero" / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text()) | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    path.write_text(json.dumps(schedule))
    toml = workspace.home / "foundry.toml"
    toml.write_text(toml.read_text().replace(str(tiny_sdxl), str(tmp_path / "zero")))
    workspace = Store(workspace.home)
    refused(TrainingError, r'loss.weighting="min_snr" on a noise schedule of zero terminal SNR')
    refused(
        ConfigError,
        r"the base model's schedule has zero terminal SNR",
        prediction_type="epsilon",
        loss=plain,
    )
    assert estimates.dry_run(workspace, "new", dataclasses.replace(CONFIG, loss=plain), HARDWARE)


def test_an_optimizer_that_cannot_be_had_is_told(workspace, monkeypatch):
    def version(name):
        assert name == "bitsandbytes"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    eight_bit = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name="adamw_8bit"))
    monkeypatch.setattr("training.optimization.installed.metadata.version", version)
    installed = None
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed"):
        estimates.dry_run(workspace, "new", eight_bit, HARDWARE)
    installed = "0.41.0"
    with pytest.raises(ConfigError, match=r"bitsandbytes 0\.41\.0"):
        estimates.dry_run(workspace, "new", eight_bit, HARDWARE)
    installed = "0.45.1"
    assert estimates.dry_run(workspace, "new", eight_bit, HARDWARE)


def test_prodigy_is_not_shared_among_ranks(workspace):
    prodigy = dataclasses.replace(
        CONFIG,
        optimizer=OptimizerConfig(name="prodigy", learning_rate=1),
        compute=ComputeConfig(shard_optimizer=True),
    )
    assert estimates.dry_run(workspace, "new", prodigy, dataclasses.replace(HARDWARE, num_gpus=1))
    with pytest.raises(ConfigError, match="prodigy estimates one rate"):
        estimates.dry_run(workspace, "new", prodigy, HARDWARE)


def test_before_there_is_a_set_the_plan_stands_in(workspace):
    (workspace.home / "tables" / "training_set" / "tiny.json").unlink()
    text = "\n".join(estimates.dry_run(workspace, "new", CONFIG, HARDWARE))
    assert "steps: 6 at least; no training set yet" in text
    assert "TFLOP per sample" in text


def test_time_and_money_follow_cards_and_price(workspace):
    def figures(**changes):
        line = estimates.dry_run(workspace, "new", long, dataclasses.replace(HARDWARE, **changes))[
            -1
        ]
        return [
            float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.\d\d", line)
        ], line

    long = dataclasses.replace(CONFIG, num_samples=10**12)
    (one, hours, dollars), line = figures(num_gpus=1)
    assert "1 x H200" in line
    assert (one, dollars) == (hours, pytest.approx(3 * hours, abs=0.02))
    (four, *_), line = figures(num_gpus=4, dollars_per_hour=6.0)
    assert four == pytest.approx(hours / 4, abs=0.01)
    assert line.endswith("at $6 an hour")


def test_what_is_left_to_the_device_is_told_and_a_started_run_keeps_its_own(workspace):
    left = dataclasses.replace(CONFIG, precision="auto")

    def line(gpu):
        return estimates.dry_run(workspace, "one", left, dataclasses.replace(HARDWARE, gpu=gpu))[0]

    rest = 'compute.channels_last = true, compute.compile = "blocks"'
    assert line("H200") == f'auto, on H200: precision = "bf16_amp", {rest}'
    assert line("V100") == f'auto, on V100: precision = "fp16_amp", {rest}'
    folder = workspace.paths.run_folder("one")
    folder.mkdir(parents=True)
    values = {"precision": "fp32", "compute.channels_last": False, "compute.compile": False}
    commit.write_json(folder / "resolved.json", {"format": 1, "device": "cpu", "values": values})
    assert line("H200").startswith(
        'auto, recorded: precision = "fp32", compute.channels_last = false'
    )


def test_the_largest_micro_batch_is_told(workspace):
    text = "\n".join(estimates.dry_run(workspace, "new", CONFIG, HARDWARE))
    found = re.search(
        r"largest micro-batch of (32x48|48x32) with \d x 77 tokens, without .*: (\d+) on one H200",
        text,
    )
    assert int(found[2]) > 10_000
    assert "a micro-batch of 16 takes" not in text


def test_a_model_too_large_for_the_card_is_told(workspace):
    large = dataclasses.replace(
        CONFIG, batch=BatchConfig(global_batch_size=10**9, micro_batch_size=10**8)
    )
    text = "\n".join(estimates.dry_run(workspace, "new", large, HARDWARE))
    assert "memory: more than the 151 GB of one H200" in text


def test_a_block_that_the_model_does_not_have_is_told_before_weights_are_loaded(workspace):
    wrong = dataclasses.replace(
        CONFIG, compute=ComputeConfig(gradient_checkpointing=("down_blocks.7",))
    )
    with pytest.raises(
        ConfigError, match=r"no block 'down_blocks\.7'; there are down_blocks, down_blocks\.0, "
    ):
        estimates.dry_run(workspace, "new", wrong, HARDWARE)
    right = dataclasses.replace(
        CONFIG, compute=ComputeConfig(gradient_checkpointing=("up_blocks.0", "text_encoders"))
    )
    assert estimates.dry_run(workspace, "new", right, HARDWARE)


def test_the_bill_of_a_workspace_reads_its_tables(workspace):
    folder = workspace.paths.run_folder("one")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(recipes.run_toml(CONFIG))
    with pytest.raises(DataError, match="no images yet"):
        estimates.workspace_work(workspace, "one")
    schema = TABLES["raw_images"].schema
    ids = training_rows(22, 5)["image_id"]
    raw = pl.DataFrame(
        {"image_id": ids, "source_id": ids, "bytes": [1000] * 27},
        schema_overrides={"bytes": schema["bytes"]},
    )
    missing = [
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in schema.items()
        if name not in raw.columns
    ]
    put(workspace, "raw_images", SHARDS[0], raw.with_columns(missing).select(list(schema)))
    work, stored, advice = estimates.workspace_work(workspace, "one")
    assert (work.num_images, work.num_samples, work.num_generated) == (27, 48, 0)
    assert work.training_tflop > 0
    assert stored["raw"] == 27_000
    latents = sum(
        path.stat().st_size for path in (workspace.home / "latents").rglob("*.safetensors")
    )
    assert stored["latents"] == latents
    assert "2.2 per image and 7 steps" in advice[0]
    result = CliRunner().invoke(app, ["cost", "--home", str(workspace.home), "--run", "one"])
    assert result.exit_code == 0, result.exception
    assert "27.00 kB" in result.stdout


def configure(store, **changes):
    """Give the workspace a run `one` that is not started."""
    folder = store.paths.run_folder("one")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(recipes.run_toml(dataclasses.replace(CONFIG, **changes)))
    return folder


@pytest.fixture
def foundry(workspace, monkeypatch, capsys):
    """`foundry("train", ...)` on the workspace: status, standard output and standard error."""

    def call(command, *arguments):
        monkeypatch.setattr(
            sys, "argv", ["foundry", command, "--home", str(workspace.home), *arguments]
        )
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


def test_a_dry_run_without_a_recipe_reads_the_runs_config_and_trains_nothing(
    workspace, foundry, monkeypatch
):
    monkeypatch.setattr(
        pipeline, "bring_up_to_date", lambda *_, **__: pytest.fail("a dry run started something")
    )
    status, _, errors = foundry("train", "--run", "one", "--dry-run")
    assert (status, "run 'one' has no configuration" in errors) == (2, True)
    configure(workspace, num_samples=64, num_processes=4)
    before = files(workspace)
    status, out, _ = foundry("train", "--run", "one", "--dry-run")
    assert status == 0
    assert "num_samples = 64" in out
    assert "steps: 9 of up to 8 samples" in out
    assert " on 4 x H200" in out, "cards are the run's own unless others are named"
    assert " on 2 x H200" in foundry("train", "--run", "one", "--dry-run", "--gpus", "2")[1]
    status, out, _ = foundry("train", "--run", "one", "--dry-run", "--world-size", "8")
    assert (
        "network: each of 8 ranks sends and receives 0.00 GB a step (gradients 0.00 GB, all-reduced)"
        in out
    )
    assert re.search(
        r"network: \S+ s at 10 Gbit/s, \S+ s at 100 Gbit/s, \S+ s at 400 Gbit/s per rank, beside",
        out,
    )
    assert "fewer than 8 ranks" in out
    assert files(workspace) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "num_samples=9"], "--set and --tiny change a recipe"),
        (["--tiny", "--dry-run"], "--set and --tiny change a recipe"),
        (["--dry-run", "--stop"], "--dry-run, --stop and --bundle do different things"),
        (["--dry-run", "--bundle", "there"], "--dry-run, --stop and --bundle do different things"),
        (["--world-size", "8"], "--world-size 8 is for --dry-run"),
        (["--world-size", "0", "--dry-run"], "--world-size 0 must be at least 1"),
        (["--gpus", "-3", "--dry-run"], "--world-size -3 must be at least 1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    workspace, foundry, monkeypatch, arguments, said
):
    monkeypatch.setattr(
        pipeline, "bring_up_to_date", lambda *_, **__: pytest.fail("something was started")
    )
    configure(workspace)
    status, _, errors = foundry("train", "--run", "one", *arguments)
    assert status == 2
    assert said in errors


@pytest.mark.parametrize(
    ("file", "told"), [("events.jsonl", "started"), ("bundled.json", "bundled")]
)
@pytest.mark.parametrize("dry", [True, False])
def test_other_values_are_refused_for_a_run_that_began_here_or_in_its_bundle(
    workspace, foundry, monkeypatch, file, told, dry
):
    monkeypatch.setattr(
        pipeline, "bring_up_to_date", lambda *_, **__: pytest.fail("something was started")
    )
    folder = configure(workspace)
    (folder / file).write_text('{"event_bytes": 0}' if told == "bundled" else "")
    status, _, errors = foundry(
        "train", "--run", "one", *["--dry-run"][: int(dry)], "--recipe", "demo"
    )
    assert status == 2
    assert f"run 'one' was {told} with other values (" in errors
    assert "num_samples: 48 -> " in errors


def test_prompts_are_those_of_images_that_train_and_of_a_started_run_those_it_was_frozen_with(
    workspace, foundry
):
    def prompts(count):
        status, out, errors = foundry("prompts", "--run", "one", "--n", str(count))
        assert status == 0, errors
        return out.splitlines(), errors.splitlines()[-1]

    def statistics():
        return prompt_statistics.prompt_statistics.others(workspace, "one")

    configure(
        workspace, prompts=PromptConfig(mean_tags=0, empty_prob=0, alias_prob=1, score_tags=False)
    )
    rows = training_rows(22, 5)
    train = rows.filter(pl.col("split") == "train").sort("image_id")
    wanted = [sorted(tag["name"] for tag in tags) for tags in train["tags"]]

    lines, read = prompts(50)
    assert [sorted(re.findall(r"tag[_ ].", line.replace(" ", "_"))) for line in lines] == wanted
    assert read == "epoch 0 of current training set tiny: 22 of 22 images that train"
    assert prompts(3) == (
        lines[:3],
        "epoch 0 of current training set tiny: 3 of 22 images that train",
    )

    made_before = statistics()
    folder = workspace.paths.run_folder("one")
    checkpoints.prepare(workspace, "one", read_config(folder))
    write_inputs(
        folder, dataclasses.replace(read_inputs(folder), vae_digest="")
    )  # latents of no VAE
    assert statistics() == made_before, "its start alone is no reason to count again"
    # Then the tables go on without the run: one image trains, and its tags have other names.
    put(workspace, "training_set", "tiny", train.head(1))
    vocabulary = [
        {"tag": f"tag_{letter}", "category": "general", "aliases": ["another"]}
        for letter in "abcdefghijklmnop"
    ]
    schema = TABLES["tag_vocabulary"].schema
    frame = pl.DataFrame([{**dict.fromkeys(schema), **row} for row in vocabulary], schema=schema)
    put(workspace, "tag_vocabulary", "all", frame)
    assert statistics() == made_before
    fingerprint = read_inputs(folder).fingerprint[:16]
    assert prompts(50) == (
        lines,
        f"epoch 0 of set {fingerprint} of the run: 22 of 22 images that train",
    )
    assert estimates.count_epoch(workspace, "one", CONFIG).num_held_out == 5
    assert len(estimates.count_epoch(workspace, "new", CONFIG).buckets) == 1


def test_prompts_tell_sizes_and_crops_as_the_trainer_does(workspace, foundry, write_generation):
    def told():
        status, out, errors = foundry("prompts", "--run", "one", "--n", "22", "--trace")
        assert status == 0, errors
        return out.splitlines()[2::3]

    folder = configure(workspace)
    rows = training_rows(22, 5)
    train = rows.filter(pl.col("split") == "train").sort("image_id")

    def expected(left, mirrored=""):
        sizes = train.select("height", "width", "bucket_height", "bucket_width").iter_rows()
        return [
            f"    {h}x{w} px, 0 cut off above and {left} on the left, {b}x{c}{mirrored}"
            for h, w, b, c in sizes
        ]

    assert told() == expected(1)
    # Generation 2 cuts two columns off on the left of images eight wider than their bucket: six
    # on the right.
    for shard in SHARDS:
        own = rows.filter(pl.col("shard") == shard)
        write_generation(workspace.home / "latents" / "tiny" / shard, 2, own, flip=True)
    assert told() == expected(6, ", mirrored")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("rules_version = 3", "rules_version = 1"))
    assert told() == expected(2, ", mirrored")
    config.write_text(config.read_text().replace("rules_version = 1", "rules_version = 3"))
    (folder / "epochs").mkdir()
    pins = {shard: {"generation": 1} for shard in SHARDS}
    (folder / "epochs" / "0.json").write_text(json.dumps({"latents": pins}))
    assert told() == expected(1), "what the epoch began with"
    shutil.rmtree(workspace.home / "latents")
    (folder / "epochs" / "0.json").unlink()
    assert set(told()) == {"    no latents yet"}


def test_prompt_statistics_count_images_that_train(workspace):
    configure(workspace)
    shutil.rmtree(
        workspace.home / "latents"
    )  # which they do not read, and whose tables are not those of the stage
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("runs", ["one"])
        resources = {"store": workspace}
        assert dg.materialize(
            assets([prompt_statistics.prompt_statistics]),
            partition_key="one",
            instance=instance,
            resources=resources,
        ).success
    numbers = workspace.manifest("prompt_statistics", "one").report["numbers"]
    assert (numbers["prompts"], numbers["images that train"]) == (22, 22)


def test_a_dry_run_imports_no_heavy_library(workspace):
    configure(workspace)
    heavy = "{'torch', 'diffusers', 'transformers', 'dagster', 'mlflow', 'scipy'}"
    code = (
        "import atexit, sys; from jobs.cli.app import main\n"
        f"atexit.register(lambda: print('heavy:', sorted({heavy} & set(sys.modules))))\n"
        f"sys.argv = ['foundry', 'train', '--home', {str(workspace.home)!r}, '--run', 'one', '--dry-run']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "training set: 22 images train" in done.stdout
    assert "GPU-hours" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_a_trainer_imports_its_libraries_while_the_launcher_checks(workspace, foundry, monkeypatch):
    seen = []

    def checks(home, **_):
        seen.append(torchrun._standby[0]._process)
        assert seen[-1].poll() is None
        if len(seen) > 1:
            raise DataError("nothing to train on")
        return []

    monkeypatch.setattr(pipeline, "bring_up_to_date", checks)
    configure(workspace)
    assert foundry("train", "--run", "one")[0] == 0
    status, _, errors = foundry("train", "--run", "one")
    assert (status, errors.splitlines()[-1]) == (2, "foundry: nothing to train on")
    assert [process.poll() for process in seen] == [-signal.SIGKILL] * 2, "neither is left behind"
    assert not torchrun._standby
