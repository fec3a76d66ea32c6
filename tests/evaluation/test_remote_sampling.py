"""Images that another machine draws are those of this one, and none that was drawn otherwise
comes in."""

import contextlib
import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import tomlkit
from PIL import Image
from safetensors.numpy import save_file

from assets import sample_images
from jobs import comparison
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import manifests, toml
from training.config.evaluation import SamplingConfig
from training.errors import DamageError, EvaluationError, ModelError
from training.evaluation import candidates, prompt_sets, remote_sampling
from training.models.weights import model_digest
from training.runs.run_folder import Ready, write_ready
from training.sampling import sampling
from training.tables.schemas import TABLES

SAMPLING = SamplingConfig(
    num_steps=2, guidance_scale=4.0, batch_size=2, sampler="euler_a", schedule="karras"
)
ROWS = [
    {"prompt_id": key, "text": text, "negative": "", "group": "g", "height": 32, "width": 48}
    for key, text in (("a", "red cat"), ("b", "a dog"), ("c", "tree"))
]


@pytest.fixture(scope="module")
def prompts():
    return prompt_sets.make_frame(ROWS)


@pytest.fixture(scope="module")
def away(tmp_path_factory, tiny_sdxl, prompts):
    """A folder as the other machine leaves it."""
    folder = tmp_path_factory.mktemp("away")
    remote_sampling.write_prompts(folder / "prompts.json", prompts, SAMPLING)
    remote_sampling.draw(tiny_sdxl, folder / "prompts.json", folder / "out")
    return folder


def test_the_prompt_file_carries_prompts_seeds_and_how_they_are_drawn(away, prompts, tmp_path):
    read, sampling_config = remote_sampling.read_file(away / "prompts.json")
    assert read.equals(prompts)
    assert sampling_config == SAMPLING
    prompt_sets.write_prompts(tmp_path / "plain.csv", prompts)
    read, sampling_config = remote_sampling.read_file(tmp_path / "plain.csv")
    assert read.equals(prompts)
    assert sampling_config == SamplingConfig()


def test_images_come_home_as_they_would_have_been_drawn_here(away, tiny_sdxl, prompts, tmp_path):
    record = remote_sampling.read_record(away / "out")
    assert record.digest == model_digest(tiny_sdxl)
    assert record.checkpoint == f"base.{record.digest[:8]}@0"
    assert record.prompts == prompt_sets.digest(prompts)
    home = remote_sampling.bring_home(away / "out", record, tmp_path / "home")
    here = sampling.sample_folder(
        tiny_sdxl, record.checkpoint, prompts, SAMPLING, tmp_path / "here"
    )
    assert home.equals(here)
    for file in here["file"]:
        images = [Image.open(tmp_path / side / file) for side in ("home", "here")]
        assert images[0].tobytes() == images[1].tobytes()
        assert images[0].text == images[1].text


@pytest.fixture
def home(tmp_path, prompts, monkeypatch):
    """A workspace that draws as `away` did, with another base; Dagster is left out."""
    from assets.base_model import base_model
    from assets.prompt_sets import prompt_sets

    for name in ("open_instance", "_name_partitions"):
        monkeypatch.setattr(comparison, name, lambda *arguments: contextlib.nullcontext())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    drawn = {name: value for name, value in toml.dump(SAMPLING).items() if value is not None}
    values = {"format": 1, "models": {"base": "base"}, "prompt_sets": {"standard": {"held_out": 3}},
              "evaluation": {"sampling": drawn}}  # fmt: skip
    (tmp_path / "foundry.toml").write_text(tomlkit.dumps(values))
    store = Store(tmp_path)
    row = {"name": "base", "checkpoint": "base.abc@0", "family": "sdxl", "digest": "d", "num_parameters": 1,
           "prediction_type": "epsilon", "parents": []}  # fmt: skip
    for stage, key, frame in (
        (base_model, "base", pl.DataFrame([row], schema=TABLES["base_model"].schema)),
        (prompt_sets, "standard", prompts),
    ):  # fmt: skip
        store.writer.commit(stage, key, Made(frame=frame), {"inputs": {}, "models": {}}, seconds=0)
    return store


def ready_model(folder):
    """A checkpoint of another workspace's run."""
    ready = Ready(run="theirs", checkpoint="theirs@48", samples_seen=48, files=(), state_files=(), digest="r" * 64,
                  fingerprint="", base_digest="", validation_loss=None, config={})  # fmt: skip
    folder.mkdir()
    write_ready(folder, ready)
    return folder


def single_file(folder):
    path = folder.with_suffix(".safetensors")
    save_file({"a": np.zeros(2)}, path)
    return path


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_images_of_a_rival_come_home_under_its_name(away, home, tiny_sdxl, tmp_path, kind):
    makers = {"folder": lambda folder: tiny_sdxl, "file": single_file, "checkpoint": ready_model}
    model = makers[kind](tmp_path / "model")
    drawn = tmp_path / "drawn"
    shutil.copytree(away / "out", drawn)
    record = json.loads((drawn / remote_sampling.RECORD).read_text())
    name = "theirs@48" if kind == "checkpoint" else f"base.{model_digest(model)[:8]}@0"
    weights = "r" * 64 if kind == "checkpoint" else model_digest(model)
    (drawn / remote_sampling.RECORD).write_text(
        json.dumps({**record, "checkpoint": name, "digest": weights})
    )

    candidates.add_external_model(home.home, "gone", tmp_path / "gone")
    with pytest.raises(
        EvaluationError, match=f"images of {name} with weights {weights[:8]}, and no checkpoint"
    ):
        comparison.adopt(home, drawn)
    candidates.add_external_model(home.home, "other", model)
    assert comparison.adopt(home, drawn) == "rival.other@0"
    assert home.currency.is_current(sample_images.sample_images, "rival.other@0")
    assert len(list(home.paths.sample_folder("rival.other@0").glob("*.png"))) == len(ROWS)


def test_images_that_failed_elsewhere_come_home_as_rows_without_a_file(away, tmp_path):
    shutil.copytree(away / "out", tmp_path / "out")
    record = remote_sampling.read_record(tmp_path / "out")
    failed = pl.col("prompt_id") == "b"
    samples = pl.read_parquet(tmp_path / "out" / record.samples.name)
    columns = [
        pl.when(failed).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("file", "sha256")
    ]
    entry = manifests.write_parquet(tmp_path / "out", "failed", samples.with_columns(columns))
    rows = remote_sampling.bring_home(
        tmp_path / "out", replace(record, samples=entry), tmp_path / "home"
    )
    assert rows.filter(pl.col("file").is_null())["prompt_id"].to_list() == ["b"]
    assert len(list((tmp_path / "home").glob("*.png"))) == 2


def test_finished_images_are_not_drawn_over(away, tiny_sdxl):
    with pytest.raises(EvaluationError, match=r"holds the images of base\..* already"):
        remote_sampling.draw(tiny_sdxl, away / "prompts.json", away / "out")


def test_what_is_damaged_or_unfinished_stays_out(away, tiny_sdxl, tmp_path):
    remote_sampling.draw(tiny_sdxl, away / "prompts.json", tmp_path / "out")
    record = remote_sampling.read_record(tmp_path / "out")
    file = tmp_path / "out" / remote_sampling.IMAGES / sampling.file_name("b")
    Image.new("RGB", (48, 32)).save(file)
    with pytest.raises(DamageError, match="is not the image that was drawn for prompt 'b'"):
        remote_sampling.bring_home(tmp_path / "out", record, tmp_path / "home")
    file.unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        remote_sampling.bring_home(tmp_path / "out", record, tmp_path / "home")
    path = tmp_path / "out" / remote_sampling.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    with pytest.raises(DamageError, match="has format 7"):
        remote_sampling.read_record(tmp_path / "out")
    path.unlink()
    with pytest.raises(DamageError, match="were not drawn to the end"):
        remote_sampling.read_record(tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    ["{", '{"format": 1}', '{"format": 3}', '{"format": 1, "sampling": {}, "prompts": 1}'],
)
def test_a_broken_prompt_file_is_named(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"p\.json"):
        remote_sampling.read_file(tmp_path / "p.json")


def test_a_missing_model_is_named(away, tmp_path):
    with pytest.raises(EvaluationError, match="is neither a model folder nor"):
        remote_sampling.draw(tmp_path / "nothing", away / "prompts.json", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        remote_sampling.draw(tmp_path / "empty", away / "prompts.json", tmp_path / "out")
