"""Images that could not be drawn, were lost or were swapped are told of, and never a dead end for
the others."""

import hashlib
import shutil

import dagster as dg
import numpy as np
import polars as pl
import pytest
from judged_world import World
from original_names import write_single_file

from assets import eval_metrics, release, release_report, sample_images, verdicts
from assets.declared import assets
from assets.partitions import checkpoints
from resources.mlflow.tracking import Tracking
from resources.operations import maintenance
from training.commit import sha256_file
from training.evaluation import candidates
from training.models.unet import load_pipeline_parts
from training.runs import retention
from training.sampling import prompt_encoding, sampling
from training.sampling.image_files import NOT_DRAWN
from training.sampling.png_parameters import write_png
from training.tables.schemas import TABLES

NUM_PROMPTS = 4


class Evaluation:
    """A workspace whose stages draw by dice, and score by the demo's tiny networks."""

    def __init__(self, home):
        self.world = World(home, NUM_PROMPTS)
        self.not_finite = {}
        """Checkpoint -> numbers of prompts whose images are not finite."""
        self.instance = dg.DagsterInstance.ephemeral(str(home / "cache"))

    def sample_folder(self, model, name, prompts, config, folder, **options):
        """Stands in for the real one, and keeps to its contract."""
        rows = []
        for number, prompt in enumerate(prompts.iter_rows(named=True)):
            row = {key: prompt[key] for key in ("prompt_id", "text", "negative", "group", "seed")}
            rows.append(row | {"height": 32, "width": 32})
            if number not in self.not_finite.get(name, ()):
                rng = np.random.default_rng([number, *name.encode()])
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                write_png(folder / f"{number}.png", image, "x")
                rows[-1] |= {
                    "file": f"{number}.png",
                    "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
                }
        return pl.DataFrame(rows, schema=TABLES["sample_images"].schema)

    def save(self, run, *clocks):
        """Write checkpoints of a run, which have a tokenizer and no weights."""
        self.world.save(run, *clocks)
        for clock in clocks:
            (self.world.folder(f"{run}@{clock}") / "tokenizer").symlink_to(
                self.store.models.path("base") / "tokenizer"
            )

    def materialize(self, stage, *keys):
        """Run one stage for checkpoints that are stale."""
        self.instance.add_dynamic_partitions(checkpoints.name, list(keys))
        for key in keys:
            dg.materialize(
                assets([stage]),
                partition_key=key,
                instance=self.instance,
                resources={"store": self.store},
            )

    def evaluate(self, *keys):
        """Draw, score and judge what is stale of checkpoints."""
        self.materialize(sample_images.sample_images, *keys)
        self.materialize(eval_metrics.eval_metrics, *keys)
        for key in keys:
            self.world.judge(key)

    @property
    def store(self):
        return self.world.store

    def image(self, key, number):
        return self.store.paths.sample_folder(key) / f"{number}.png"

    def verdict(self, key):
        """Words of the verdict against the base, and its note."""
        manifest = self.store.manifest("verdicts", f"base~{key}")
        words = self.store.read("verdicts", ["verdict"], [f"base~{key}"])["verdict"].to_list()
        return words, manifest.report["numbers"].get("note", "")

    def damage(self):
        return [problem for problem in maintenance.verify(self.store) if problem.kind == "damage"]


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    made = Evaluation(tmp_path / "workspace")
    monkeypatch.setattr(sampling, "sample_folder", made.sample_folder)
    monkeypatch.setattr(prompt_encoding, "cut_prompts", lambda prompts, tokenizer, config: [])
    monkeypatch.setattr(
        Tracking, "run_url", lambda self, run: ""
    )  # an MLflow database takes longer than all the rest
    return made


def test_a_broken_checkpoint_is_shown_and_not_judged_and_later_ones_are(evaluation):
    evaluation.save("run", 1000, 2000, 3000)
    evaluation.not_finite = {"run@1000": [0, 2], "run@2000": range(NUM_PROMPTS)}
    evaluation.evaluate(evaluation.world.base, "run@1000", "run@2000", "run@3000")
    store = evaluation.store
    drawn = store.read("sample_images", ["file", "sha256"], ["run@1000"])
    assert drawn["file"].to_list() == [None, "1.png", None, "3.png"]
    assert store.manifest("sample_images", "run@1000").report["numbers"] == {
        "images that are not finite": 2
    }
    scores = store.read("eval_metrics", parts=["run@2000"])
    assert scores.filter(metric="failed")["reason"].to_list() == [NOT_DRAWN] * NUM_PROMPTS
    assert evaluation.verdict("run@1000") == (
        [],
        f"no verdict on run@1000 against {evaluation.world.base}: 2 of 4 images of run@1000 have no scores: "
        f"'p0000' ({NOT_DRAWN}), 'p0002' ({NOT_DRAWN}); the checkpoint is broken",
    )
    assert "4 of 4 images of run@2000 have no scores" in evaluation.verdict("run@2000")[1]
    assert evaluation.verdict("run@3000") == (["too_few_prompts"] * 2, "")
    assert store.currency.stale(verdicts.verdicts) == []
    assert evaluation.damage() == []


def test_a_lost_image_is_found_drawn_again_and_scored_again(evaluation):
    evaluation.save("run", 1000)
    keys = (evaluation.world.base, "run@1000")
    evaluation.materialize(sample_images.sample_images, *keys)
    digest = evaluation.store.manifest("sample_images", "run@1000").digest
    evaluation.image("run@1000", 2).unlink()
    evaluation.evaluate(*keys)
    assert "foundry verify --repair" in evaluation.verdict("run@1000")[1]
    images, scores = sorted(
        evaluation.damage(), key=lambda problem: problem.path.parent.name, reverse=True
    )
    assert "1 of 4 images in" in images.detail
    assert "2.png is missing" in images.detail
    assert scores.detail.startswith("scores of run@1000 lack 1 images, such as: 2.png is missing")
    maintenance.repair(evaluation.store, [images, scores])
    evaluation.evaluate(*keys)
    assert evaluation.store.manifest("sample_images", "run@1000").digest == digest
    assert evaluation.verdict("run@1000") == (["too_few_prompts"] * 2, "")
    assert evaluation.damage() == []


def test_images_that_are_cut_or_swapped_go_to_quarantine_and_those_that_are_whole_stay(
    evaluation,
):
    base = evaluation.world.base
    evaluation.materialize(sample_images.sample_images, base)
    cut, swapped = evaluation.image(base, 0), evaluation.image(base, 3)
    cut.write_bytes(cut.read_bytes()[:100])
    shutil.copyfile(evaluation.image(base, 1), swapped)
    (problem,) = evaluation.damage()
    assert problem.files == (cut, swapped)
    assert "2 of 4 images in" in problem.detail
    (moved,) = maintenance.repair(evaluation.store, [problem])
    quarantine = moved.parents[2]
    assert sorted(path.name for path in (quarantine / "sample_images" / base).iterdir()) == [
        "0.png",
        "3.png",
    ]
    assert sorted(path.name for path in cut.parent.iterdir()) == ["1.png", "2.png"]
    assert evaluation.store.currency.stale(sample_images.sample_images) == [base]


def test_a_release_that_is_not_as_it_was_made_is_damage(evaluation):
    folder = evaluation.world.home / "release" / "run"
    (folder / "model").mkdir(parents=True)
    rows = []
    for name in ("README.md", "model/unet.safetensors"):
        (folder / name).write_text(name)
        size, sha256 = (folder / name).stat().st_size, sha256_file(folder / name)
        rows.append({"file": name, "about": "", "bytes": size, "sha256": sha256})
    frame = pl.DataFrame(rows, schema=TABLES["release"].schema)
    evaluation.world._commit(release.release, "run", frame)
    assert evaluation.damage() == []
    (folder / "README.md").unlink()
    (folder / "model" / "unet.safetensors").write_text("model/unet.safetensorZ")
    (problem,) = evaluation.damage()
    assert problem.files == (folder / "README.md", folder / "model" / "unet.safetensors")
    assert f"{folder / 'README.md'} is missing" in problem.detail


def test_a_release_leaves_gaps_where_images_are_broken(evaluation):
    evaluation.save("run", 1000, 2000)
    keys = (evaluation.world.base, "run@1000", "run@2000")
    evaluation.not_finite = {"run@2000": [1]}
    evaluation.evaluate(*keys)
    for key, number in ((keys[0], 0), ("run@1000", 0), ("run@1000", 3), ("run@2000", 2)):
        evaluation.image(key, number).write_bytes(b"no image")
    store = evaluation.store
    assert release_report.shown(store, "run", "run@2000") == list(keys)
    assert [image.text for image, _ in release._card_images(store, "run@2000")] == ["star 0"]
    assert release._grid(store, "run@2000").startswith(f"![{2 * NUM_PROMPTS} images]")
    assert release._sheet(store, "run", "run@2000").startswith(b"\xff\xd8")


def test_a_rival_in_a_single_file_is_drawn_and_left_as_it_is(evaluation, tiny_sdxl, tmp_path):
    file = tmp_path / "photo.safetensors"
    write_single_file(load_pipeline_parts(tiny_sdxl, "cpu"), file)
    shutil.copytree(tiny_sdxl, tmp_path / "photo", ignore=shutil.ignore_patterns("*.safetensors"))
    before = sha256_file(file)
    rival = candidates.add_external_model(evaluation.world.home, "photo", file)
    evaluation.evaluate(evaluation.world.base, rival)
    assert evaluation.verdict(rival)[0] == ["too_few_prompts"] * 2
    assert sha256_file(file) == before


def test_a_checkpoint_of_a_run_is_let_go_once_it_is_drawn(evaluation):
    evaluation.save("run", 1000)
    folder = evaluation.world.folder("run@1000")
    retention.want(folder, sample_images.WANTED_BY)
    retention.want(folder, "champion")
    evaluation.materialize(sample_images.sample_images, "run@1000")
    assert [path.name for path in folder.glob("WANTED.*")] == ["WANTED.champion"]
