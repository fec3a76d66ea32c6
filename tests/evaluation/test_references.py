"""What a checkpoint is compared with comes from its own run's set, and makes its scores stale only
through that."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from assets import references
from assets.annotations import STAGES
from assets.eval_metrics import eval_metrics
from assets.raw_images import raw_images
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.annotators.aesthetic import Aesthetic
from training.annotators.clip import Clip
from training.commit import sha256_file
from training.errors import DataError
from training.evaluation.clip_score import Networks
from training.runs import run_folder
from training.tables.schemas import TABLES

RUN, KEY = "demo", "demo@48"
BASIS = {"inputs": {}, "models": {}}


def commit(store, stage, key, frame, **models):
    schema = TABLES[stage.name].schema
    store.writer.commit(
        stage,
        key,
        Made(frame=pl.DataFrame(frame, schema=schema)),
        BASIS | {"models": models},
        seconds=0,
    )


@pytest.fixture
def store(make_run, tmp_path, clip_folder, aesthetic_folder):
    """A workspace with a run on 27 images in two shards, of which 26 have embeddings and
    images."""
    run = make_run(RUN)
    (tmp_path / "foundry.toml").write_text(
        f'format = 1\n[models]\nclip = "{clip_folder}"\naesthetic = "{aesthetic_folder}"\n'
        f'base = "{run.inputs.base_model}"\n'
        '[decode]\nnum_workers = 1\n[[sources]]\nname = "pictures"\nkind = "folder"\npath = "pictures"\n'
    )
    store = Store(tmp_path)
    (tmp_path / "pictures").mkdir()
    rng, renamed = np.random.default_rng(0), {}
    for number, image_id in enumerate(run.rows["image_id"]):
        path = tmp_path / "pictures" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (80, 112, 3), dtype=np.uint8)).save(path)
        renamed[image_id] = sha256_file(path)
    rows = run.rows.with_columns(pl.col("image_id").replace_strict(renamed))
    rows.write_parquet(run.inputs.training_set)
    clip = Clip.load(clip_folder, "cpu")
    files = {sha256_file(path): path for path in (tmp_path / "pictures").iterdir()}
    for shard in ("s000000", "s000001"):
        own = rows.filter(pl.col("shard") == shard)["image_id"].to_list()[shard == "s000001" :]
        raw = [
            {
                "source": "pictures",
                "source_id": files[i].name,
                "locator": files[i].name,
                "image_id": i,
            }
            for i in own
        ]
        commit(store, raw_images, shard, raw)
        seen = [
            row.embedding.tolist() for row in clip([np.asarray(Image.open(files[i])) for i in own])
        ]
        vectors = [
            {"image_id": i, "model": "clip", "vector": v, "projection": v}
            for i, v in zip(own, seen, strict=True)
        ]
        commit(store, STAGES["embeddings"], shard, vectors, clip=store.models.digest("clip"))
    row = {"name": "base", "checkpoint": "base.abc@0", "family": "sdxl", "digest": "d", "num_parameters": 1,
           "prediction_type": "epsilon", "parents": []}  # fmt: skip
    from assets.base_model import base_model

    commit(store, base_model, "base", [row])
    return store


@pytest.fixture
def networks(store, clip_folder, aesthetic_folder):
    return Networks(
        clip=Clip.load(clip_folder, "cpu"), aesthetic=Aesthetic.load(aesthetic_folder, "cpu")
    )


def pictures(store, key, seed=0, ids=("p0", "p1", "p2")):
    """Commit sample images of a checkpoint, one a prompt."""
    from assets.sample_images import sample_images

    rows, rng = [], np.random.default_rng(seed)
    for number, prompt_id in enumerate(ids):
        path = store.paths.sample_folder(key) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(path)
        rows.append({"prompt_id": prompt_id, "text": "a cat", "negative": "", "group": "g", "seed": seed,
                     "height": 32, "width": 48, "file": path.name, "sha256": str(seed)})  # fmt: skip
    commit(store, sample_images, key, rows)


def test_a_checkpoint_is_compared_with_the_images_it_was_trained_on(store, networks):
    pictures(store, "base.abc@0")
    found = references.gather(store, eval_metrics, KEY, networks, batch_size=2)
    assert found.base.embeddings.shape == (3, 12)
    images = found.training.images
    assert images["split"].value_counts().sort("split").rows() == [("train", 22), ("validation", 5)]
    blocks = list(found.training.embeddings_of(images))
    assert [len(ids) for ids, _ in blocks] == [14, 12]
    for ids, vectors in blocks:
        assert vectors.shape == (len(ids), 12)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(ids)), abs=1e-5)
    few = images.filter(pl.col("split") == "validation")
    assert {i for ids, _ in found.training.embeddings_of(few) for i in ids} <= set(few["image_id"])
    # 22 train, less at most one without a row. Noise has a saturation of 0.5, until it is shrunk to
    # its bucket.
    assert 21 <= len(found.training.levels["detail"]) <= 22
    assert 0.1 < found.training.levels["saturation"].max() < 0.35


def test_a_copy_of_a_training_image_is_found_under_its_id(store, networks):
    images = references.training_images(store, KEY).filter(pl.col("split") == "train")
    image_id, file = references.located(store, images)[3]
    pixels = np.asarray(Image.open(file()))
    seen = networks.clip([pixels])[0].embedding
    found = references.gather(store, eval_metrics, KEY, networks, batch_size=2)
    levels = {name: np.zeros(1) for name in found.training.levels}
    nearest = found.compare(seen[None], levels, np.ones(1, dtype=bool)).nearest
    assert nearest.image_ids.tolist() == [image_id]
    assert nearest.similarity[0] == pytest.approx(1, abs=1e-5)


def test_the_base_and_models_made_elsewhere_have_no_training_set(store, networks):
    pictures(store, "base.abc@0")
    assert references.digests(store, "base.abc@0") == {}
    base = references.gather(store, eval_metrics, "base.abc@0", networks, batch_size=2)
    assert (base.base, base.training) == (None, None)
    rival = references.gather(store, eval_metrics, "rival.other@0", networks, batch_size=2)
    assert rival.base is not None
    assert rival.training is None
    assert references.digests(store, "rival.other@0")["training_set"] == "absent"


class CountingClip(Clip):
    """Counts the images and texts that it encodes."""

    images = texts = 0

    def __call__(self, images):
        self.images += len(images)
        return super().__call__(images)

    def encode_text(self, prompts):
        self.texts += len(prompts)
        return super().encode_text(prompts)


def test_the_bases_images_are_not_looked_at_again_while_their_scores_are_current(
    store, networks, clip_folder
):
    from training.evaluation.clip_score import score

    base = "base.abc@0"
    pictures(store, base)
    pictures(store, KEY, seed=2)
    (store.paths.sample_folder(base) / "1.png").unlink()

    def scored(key):
        clip = CountingClip.load(clip_folder, "cpu")
        compared = references.gather(
            store, eval_metrics, key, Networks(clip=clip, aesthetic=networks.aesthetic), 2
        )
        samples, folder = store.read("sample_images", parts=[key]), store.paths.sample_folder(key)
        frame = score(
            samples,
            folder,
            Networks(clip=clip, aesthetic=networks.aesthetic),
            batch_size=2,
            references=compared,
        )
        return frame, clip.images, clip.texts

    looked, *count = scored(KEY)
    assert count == [5, 2]
    own, *_ = scored(base)
    store.writer.commit(
        eval_metrics, base, Made(frame=own), store.currency.basis(eval_metrics, base), seconds=0
    )
    read, *count = scored(KEY)
    assert count == [3, 1]
    assert read.equals(looked)  # to the bit
    pictures(store, base, seed=3)
    *_, seen, _ = scored(KEY)
    assert seen == 6  # their scores are of the images before


@pytest.mark.parametrize("committed", [False, True])
def test_shipped_prompts_are_scored_and_leave_the_summary_alone(store, networks, committed):
    from training.evaluation.clip_score import score
    from training.evaluation.prompt_groups import group_prompts

    base, shipped = "base.abc@0", [prompt_id for prompt_id, _ in group_prompts("hands")[:2]]

    def scored(key, compared):
        samples, folder = store.read("sample_images", parts=[key]), store.paths.sample_folder(key)
        return score(samples, folder, networks, batch_size=2, references=compared)

    found = []
    for ids in (("p0", "p1", "p2"), ("p0", "p1", "p2", *shipped)):
        pictures(store, base, ids=ids)
        if committed:
            made = Made(frame=scored(base, references.References()))
            store.writer.commit(
                eval_metrics, base, made, store.currency.basis(eval_metrics, base), seconds=0
            )
        pictures(store, KEY, seed=2, ids=ids)
        found.append(
            scored(KEY, references.gather(store, eval_metrics, KEY, networks, batch_size=2))
        )
    alone, both = found
    summaries = [
        dict(one.filter(pl.col("prompt_id").is_null()).select("metric", "value").iter_rows())
        for one in found
    ]
    assert summaries[1] == pytest.approx(summaries[0], rel=1e-5, nan_ok=True)
    assert (summaries[1]["count_LAIONScore"], summaries[1]["num_floor_images"]) == (3, 3)
    nearest = both.filter(pl.col("metric") == "train_similarity")
    assert nearest.height == 5
    assert set(shipped) <= set(nearest["prompt_id"])
    assert alone.filter(pl.col("metric") == "train_similarity").height == 3


def test_scores_are_stale_by_the_runs_set_and_the_bases_images_alone(store):
    pictures(store, KEY)
    pictures(store, "base.abc@0")
    before = store.currency.basis(eval_metrics, KEY)
    assert before["inputs"]["training_set"] == "f" * 16
    # Images, their embeddings and the present selection come and go.
    commit(store, STAGES["embeddings"], "s000000", [], clip="x")
    commit(store, raw_images, "s000001", [])
    assert Store(store.home).currency.basis(eval_metrics, KEY) == before
    pictures(store, "base.abc@0", seed=1)
    assert Store(store.home).currency.basis(eval_metrics, KEY) != before
    pictures(store, "base.abc@0")
    assert Store(store.home).currency.basis(eval_metrics, KEY) == before
    folder = store.paths.run_folder(RUN)
    run_folder.write_inputs(
        folder, dataclasses.replace(run_folder.read_inputs(folder), fingerprint="e" * 16)
    )
    assert Store(store.home).currency.basis(eval_metrics, KEY) != before


def test_a_scorer_and_its_weights_make_scores_stale(store, clip_folder):
    pictures(store, KEY)
    before = store.currency.basis(eval_metrics, KEY)
    path = store.home / "foundry.toml"
    path.write_text(path.read_text() + '\n[evaluation.scoring]\nscorers = ["pickscore"]\n')
    text = path.read_text().replace("[models]", f'[models]\npickscore = "{clip_folder}"')
    path.write_text(text)
    after = Store(store.home).currency.basis(eval_metrics, KEY)
    assert after["inputs"]["scorer:pickscore"] == store.models.digest("clip")
    assert after["config"] != before["config"]


def test_embeddings_of_another_clip_are_refused(store, networks):
    commit(
        store,
        STAGES["embeddings"],
        "s000001",
        [{"image_id": "0", "model": "clip", "vector": [], "projection": []}],
        clip="x",
    )
    found = references.gather(store, eval_metrics, KEY, networks, batch_size=2)
    with pytest.raises(DataError, match=r"embeddings s000001\.clip are of another CLIP"):
        list(found.training.embeddings_of(found.training.images))


def test_images_of_a_source_that_was_removed_are_left_out(store):
    images = references.training_images(store, KEY)
    assert len(references.located(store, images)) == 26
    path = store.home / "foundry.toml"
    path.write_text(path.read_text().split("[[sources]]")[0])
    assert references.located(Store(store.home), images) == []


def test_a_forgotten_image_is_nobodys_neighbour(store):
    images = references.training_images(store, KEY)
    (store.home / "forget.txt").write_text(f"{images['image_id'][0]}\n")
    left = references.training_images(Store(store.home), KEY)
    assert left.height == images.height - 1
    assert json.dumps(images["image_id"][0]) not in json.dumps(left["image_id"].to_list())


def test_the_report_shows_pairs_comparisons_failures_and_the_alarm(store, networks, monkeypatch):
    from assets import eval_metrics as module
    from training.evaluation.clip_score import score

    pictures(store, "base.abc@0")
    pictures(store, KEY, seed=2)
    images = references.training_images(store, KEY).filter(pl.col("split") == "train")
    image_id, file = references.located(store, images)[0]
    Image.open(file()).save(store.paths.sample_folder(KEY) / "1.png")
    (store.paths.sample_folder(KEY) / "2.png").unlink()
    samples = store.read("sample_images", parts=[KEY])
    compared = references.gather(store, eval_metrics, KEY, networks, batch_size=2)
    frame = score(
        samples,
        store.paths.sample_folder(KEY),
        networks,
        batch_size=2,
        references=compared,
    )
    copied = frame.filter((pl.col("metric") == "train_similarity") & (pl.col("prompt_id") == "p1"))
    assert copied["image_id"].to_list() == [image_id]
    without_mlflow = SimpleNamespace(run_url=lambda run: None)  # which takes seconds to import
    monkeypatch.setattr(module, "workspace_tracking", lambda *arguments: without_mlflow)
    report = module._report(store, KEY, frame, samples)
    assert report["numbers"]["num_failed"] == 1
    assert report["numbers"]["count_LAIONScore"] == 2
    tables = report["tables"]
    nearest = {row["images of"]: row for row in tables["nearest training images (CLIP neighbours)"]}
    assert list(nearest) == ["checkpoint", "validation images", "base"]
    assert nearest["checkpoint"]["max"] == pytest.approx(1, abs=1e-5)
    assert [row["images of"] for row in tables["distance from validation images"]] == [
        "checkpoint", "base", "as many training images"
    ]  # fmt: skip
    assert tables["images without scores"] == [
        {"prompt_id": "p2", "text": "a cat", "reason": "2.png is missing"}
    ]
    assert report["pictures"]["nearest training images"].startswith("![4 images](data:image/jpeg")
    # Noise at its own size is finer and harder than noise that was shrunk to a bucket, but so is
    # the base's: no alarm.
    assert "alarm" not in report["numbers"]
    (store.paths.sample_folder(KEY) / "1.png").write_bytes(b"lost since it was scored")
    assert [pair.prompt_id for pair in references.closest(store, KEY, frame, samples)] == ["p0"]


def test_the_alarm_of_a_run_names_the_last_checkpoint_before_it(store):
    from assets import eval_metrics as module

    for samples_seen, index in ((8, 0.1), (16, 0.2), (100, 0.9)):
        rows = [{"metric": "overbaked_index", "value": index}]
        commit(store, eval_metrics, f"{RUN}@{samples_seen}", rows)
    found = module._alarm(store, f"{RUN}@200", {"overbaked_index": 0.7})
    assert found["last checkpoint before the alarm"] == f"{RUN}@16"
    assert "0.70 is above 0.5" in found["alarm"]
    assert module._alarm(store, "other@8", {"overbaked_index": 0.1}) == {}
    assert module._alarm(store, f"{RUN}@8", {"overbaked_index": 0.1})["alarm"].startswith(
        "none here"
    )


def test_an_embedding_that_is_not_finite_is_nobodys_neighbour(store, networks):
    images = references.training_images(store, KEY)
    vector = np.eye(12)[0].tolist()
    own = images.filter(pl.col("shard") == "s000000")["image_id"].to_list()[:2]
    rows = [{"image_id": own[0], "model": "clip", "vector": vector, "projection": vector},
            {"image_id": own[1], "model": "clip", "vector": vector, "projection": [float("nan")] * 12}]  # fmt: skip
    commit(store, STAGES["embeddings"], "s000000", rows, clip=store.models.digest("clip"))
    found = references.gather(Store(store.home), eval_metrics, KEY, networks, batch_size=2)
    blocks = dict(zip(("s000000", "s000001"), found.training.embeddings_of(images), strict=True))
    assert blocks["s000000"][0] == [own[0]]
    assert blocks["s000000"][1].shape == (1, 12)
