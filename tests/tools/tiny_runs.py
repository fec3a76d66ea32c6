"""A tiny SDXL with random weights and a run on it: enough for every path of the trainer, in seconds
on one core."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from training import commit, manifests, toml
from training.buckets.geometry import Size
from training.config import recipes
from training.config.run import RunConfig
from training.curation import vocabulary
from training.curation.vocabulary import Vocabulary
from training.latents.files import BucketWriter
from training.runs import run_folder
from training.tables.schemas import TABLES

# Sums over other numbers of threads have other bits: proofs of bit-equality pin one, here and in
# their children.
os.environ["OMP_NUM_THREADS"] = "1"

BUCKETS = (Size(32, 32), Size(32, 48), Size(48, 32))
SHARDS = ("s000000", "s000001")
# Long enough that a prompt of all of them fills two chunks of text.
WORDS = [f"tag_{letter}" for letter in "abcdefghijklmnop"]


def _tokenizer(pad_token):
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad_token)


def _text_encoder(cls, width, act, num_words):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=num_words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=8, hidden_act=act, bos_token_id=num_words - 2,
        eos_token_id=num_words - 1, pad_token_id=num_words - 1,
    )  # fmt: skip
    return cls(config)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A diffusers folder: SDXL's classes and conditioning, 40,000 parameters, random."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "base")


def write_tiny_sdxl(folder):
    """Write `tiny_sdxl`; returns `folder`."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from training.models.saving import save_diffusers_folder
    from training.models.unet import PipelineParts

    torch.manual_seed(7)
    tokenizers = (_tokenizer("<|endoftext|>"), _tokenizer("!"))
    num_words = len(tokenizers[0])
    parts = PipelineParts(
        family="sdxl",
        unet=UNet2DConditionModel(
            sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, cross_attention_dim=24,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4), norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
        ),
        text_encoders=(
            _text_encoder(CLIPTextModel, 8, "quick_gelu", num_words),
            _text_encoder(CLIPTextModelWithProjection, 16, "gelu", num_words),
        ),
        tokenizers=tokenizers,
        force_zeros_for_empty_prompt=False,
        noise_scheduler_config={
            "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
        },
    )  # fmt: skip
    save_diffusers_folder(parts, folder, torch.float32)
    return folder


def training_rows(num_train, num_validation, buckets=BUCKETS):
    """Rows of `training_set`: three buckets, two shards, every fifth image with a watermark box."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(num_train + num_validation):
        bucket = buckets[number % len(buckets)]
        tags = sorted(rng.choice(WORDS, size=rng.integers(1, len(WORDS)), replace=False).tolist())
        rows.append(
            {
                "image_id": hashlib.sha256(f"image {number}".encode()).hexdigest(),
                "shard": SHARDS[number % 2],
                "height": bucket.height * 2, "width": bucket.width * 2 + 16,
                "bucket_height": bucket.height, "bucket_width": bucket.width,
                "score": int(rng.integers(1, 10)),
                "tags": [{"name": tag, "category": "general"} for tag in tags],
                "caption": None, "made_caption": None, "words": [],
                "boxes": [] if number % 5 else [{"y0": 0.0, "x0": 0.0, "y1": 20.0, "x1": 30.0, "confidence": 0.9}],
                "split": "train" if number < num_train else "validation",
                "stable": number < 4,
            }
        )  # fmt: skip
    return TABLES["training_set"].conform(pl.DataFrame(rows, schema=TABLES["training_set"].schema))


def commit_generation(
    folder, number, rows, *, log_variance=True, max_bytes=1_000, flip=False, scaling_factor=0.13025
):
    """Commit one generation of random latents for `rows` of a shard; returns its manifest."""
    table, entries = [], []
    sizes = (
        rows.select("bucket_height", "bucket_width")
        .unique(maintain_order=True)
        .sort(pl.all())
        .rows()
    )
    for bucket in (Size(*size) for size in sizes):
        writer = BucketWriter(
            folder=folder, generation=number, bucket=bucket, max_bytes=max_bytes,
            metadata={"scaling_factor": str(scaling_factor), "vae": "tiny"},
        )  # fmt: skip
        members = rows.filter(
            (pl.col("bucket_height") == bucket.height) & (pl.col("bucket_width") == bucket.width)
        )
        for row in members.iter_rows(named=True):
            rng = np.random.default_rng([number, int(row["image_id"][:8], 16)])
            shape = (4, bucket.height // 8, bucket.width // 8)
            spread = np.full(shape, -4, dtype=np.float32) if log_variance else None
            writer.add(row["image_id"], rng.standard_normal(shape, dtype=np.float32), spread)
        writer.finish()
        entries += writer.entries
        for row in members.iter_rows(named=True):
            file, place = writer.places[row["image_id"]]
            table.append(
                {
                    "image_id": row["image_id"], "file": file, "row": place, "bucket_height": bucket.height,
                    "bucket_width": bucket.width, "original_height": row["height"],
                    "original_width": row["width"], "resized_height": bucket.height,
                    "resized_width": bucket.width + 8, "crop_top": 0, "crop_left": number, "pad_top": 0, "pad_left": 0,
                    "flip": flip, "encoded_in": number,
                }
            )  # fmt: skip
    frame = TABLES["latents"].conform(pl.DataFrame(table, schema=TABLES["latents"].schema))
    entries.insert(0, manifests.write_parquet(folder, f"g{number:04d}", frame))
    manifest = manifests.Manifest(
        table="latents", part=folder.name, version=1, files=tuple(entries), rows=len(frame),
        digest=commit.logical_digest(commit.column_digests(frame), len(frame)),
        provenance={"time": f"2026-01-{number:02d}T00:00:00Z"},
    )  # fmt: skip
    manifests.commit_manifest(folder / f"g{number:04d}.json", manifest)
    return manifest


@dataclass
class TinyRun:
    """A run folder that the trainer can be started on, and what it is made from."""

    folder: Path
    config: RunConfig
    inputs: run_folder.RunInputs
    rows: pl.DataFrame


def build_run(workspace, base_model, name, changes, rows=None, **latents):
    """Write a run into a workspace that has the tiny training set and its latents, which are made
    when missing.

    `rows` are the set's instead, and `latents` options of `commit_generation`.
    """

    from training.models.weights import model_digest

    rows = training_rows(22, 5) if rows is None else rows
    table = workspace / "tables" / "training_set"
    entry = manifests.write_parquet(table, "tiny.f", rows)
    for shard in SHARDS:
        folder = workspace / "latents" / "tiny" / shard
        if not folder.exists():
            commit_generation(folder, 1, rows.filter(pl.col("shard") == shard), **latents)
    values = {
        "encoding": "tiny",
        "num_samples": 48,
        "seed": 11,
        "reduction": "canonical",
        "prompts": {"mean_tags": 8.0, "std_tags": 6.0},
        "batch": {"global_batch_size": 8, "micro_batch_size": 3},
        "optimizer": {"learning_rate": 1e-3, "warmup_samples": 16, "ema_half_life_samples": 24},
        "loss": {"watermark_weight": 0.25, "noise_offset": 0.05},
        "validation": {"every_samples": 24},
        "checkpoints": {"every_samples": 24},
    }
    assignments = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    config = toml.build(RunConfig, toml.override(values, assignments))
    folder = workspace / "runs" / name
    folder.mkdir(parents=True)
    (folder / run_folder.CONFIG).write_text(recipes.run_toml(config))
    words = dict.fromkeys(WORDS, "general")
    known = Vocabulary(words, {"tag_a": ("alpha",), "tag_b": ("beta", "bravo")})
    path = folder / run_folder.VOCABULARY
    inputs = run_folder.RunInputs(
        run=name, vocabulary=path, vocabulary_sha256=vocabulary.write(path, known),
        training_set=table / entry.name, training_set_sha256=entry.sha256, fingerprint="f" * 16,
        latents=workspace / "latents" / "tiny", base_model=base_model, base_digest=model_digest(base_model),
    )  # fmt: skip
    run_folder.write_inputs(folder, inputs)
    return TinyRun(folder, config, inputs, rows)


@pytest.fixture
def make_run(tmp_path, tiny_sdxl):
    """`make_run("name", **{"a.b": value})`: 22 + 5 images, 7 steps of up to 8 samples unless told
    otherwise."""

    def make(name="demo", **changes):
        return build_run(tmp_path, tiny_sdxl, name, changes)

    return make


@pytest.fixture
def other_vae(tmp_path):
    """`other_vae(run)`: another VAE of the same scaling factor becomes the one that encoded the
    run's latents."""

    def change(run):
        import dataclasses

        import torch
        from diffusers import AutoencoderKL

        from training.models.weights import model_digest

        torch.manual_seed(8)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(run.inputs.base_model / "vae"))
        folder = tmp_path / "other_vae"
        vae.save_pretrained(folder)
        digest = model_digest(folder)
        for path in run.inputs.latents.glob("*/g0001.json"):
            manifests.commit_manifest(
                path, dataclasses.replace(manifests.read_manifest(path), models={"vae": digest})
            )
        run.inputs = dataclasses.replace(run.inputs, vae=folder, vae_digest=digest)
        run_folder.write_inputs(run.folder, run.inputs)

    return change


@pytest.fixture
def write_generation():
    """`write_generation(folder, number, rows)`, see `commit_generation`."""
    return commit_generation


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, tiny_sdxl):
    """A finished run that no one disturbed; not to be written to."""
    run = build_run(tmp_path_factory.mktemp("unbroken"), tiny_sdxl, "unbroken", {})
    assert train_here(run) == "finished"
    return run


def train_here(run, stop_at=None, prepare=None):
    """Train in this process; the `stop_at`-th question for a stop in a step is answered with
    yes."""
    from training.loop.trainer import Trainer
    from training.optimization.ranks import Ranks
    from training.runs.event_log import EventLog

    asked = iter(range(1, 1_000_000))
    with EventLog(run.folder / run_folder.EVENTS) as log:
        trainer = Trainer(
            folder=run.folder, config=run.config, inputs=run.inputs, ranks=Ranks(), log=log,
            stop_requested=lambda: not trainer.state.clock.validation_owed and next(asked) == stop_at,
        )  # fmt: skip
        if prepare is not None:
            prepare(trainer)
        return trainer.run()


@pytest.fixture
def train():
    """`train(run, stop_at=n)`, see `train_here`."""
    return train_here


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's database of a workspace named `space` as it is created, 3 to 6 s, once per
    session."""
    from resources.mlflow.tracking import workspace_tracking

    home = tmp_path_factory.mktemp("template") / "space"
    home.mkdir()
    workspace_tracking(home).experiment_url()
    return home / "mlflow.db"


@pytest.fixture(scope="session")
def small_source(tmp_path_factory):
    """A folder of forty drawn images with their trouble."""
    from demo.images import write_world

    return write_world(tmp_path_factory.mktemp("small"), num_images=40, seed=5)
