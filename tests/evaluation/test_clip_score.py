"""CLIP score and aesthetics against an independent computation with the same random weights."""

import contextlib
import dataclasses
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from resources.engine.processes import ProcessPool
from training.annotators.aesthetic import Aesthetic
from training.annotators.clip import Clip
from training.config.evaluation import SamplingConfig
from training.errors import EvaluationError
from training.evaluation import clip_score, summary
from training.evaluation.clip_score import Networks
from training.sampling import image_files as images
from training.sampling import sampling
from training.tables.schemas import TABLES


@pytest.fixture(scope="module")
def scored(tmp_path_factory, clip_folder, aesthetic_folder):
    """Seven drawn images of two sizes, their table, folder and scores."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(1)
    rows = []
    for number in range(7):
        height, width = (32, 48) if number % 2 else (64, 40)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = f"{number}.png"
        Image.fromarray(image).save(folder / file)
        rows.append(
            {"prompt_id": f"p{number}", "text": ["red cat", "a dog", "tree"][number % 3], "negative": "",
             "group": "ab"[number % 2], "seed": number, "height": height, "width": width, "file": file, "sha256": ""}
        )  # fmt: skip
    samples = pl.DataFrame(rows, schema=TABLES["sample_images"].schema)
    clip, aesthetic = Clip.load(clip_folder, "cpu"), Aesthetic.load(aesthetic_folder, "cpu")
    return (
        samples,
        folder,
        clip,
        aesthetic,
        clip_score.score(samples, folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=3),
    )


def values(metrics, name):
    return metrics.filter(pl.col("metric") == name).sort("prompt_id")["value"].to_numpy()


def test_scores_equal_an_independent_computation(scored, clip_folder, aesthetic_folder):
    samples, folder, clip, _, metrics = scored
    model = CLIPModel.from_pretrained(clip_folder).eval()
    from safetensors.torch import load_file

    state = load_file(aesthetic_folder / "model.safetensors")
    for row, cosine, taste in zip(
        samples.iter_rows(named=True),
        values(metrics, "clip_score"),
        values(metrics, "aesthetic"),
        strict=True,
    ):
        # One image at a time: pixels by the adapter (proved elsewhere), all the rest by hand.
        pixels = clip.preprocess(np.asarray(Image.open(folder / row["file"])))[None]
        tokens = clip.tokenizer(
            [row["text"]], padding="max_length", max_length=77, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            text = model.text_projection(model.text_model(tokens).pooler_output)[0]
            expected = torch.dot(image, text) / (image.norm() * text.norm())
            score = image / image.norm()
            for layer in (0, 2, 4, 6, 7):
                score = state[f"layers.{layer}.weight"] @ score + state[f"layers.{layer}.bias"]
        assert cosine == pytest.approx(expected.item(), abs=1e-6)
        assert taste == pytest.approx(score.item(), abs=1e-5)


def test_the_table_holds_scores_embeddings_and_the_summary(scored):
    samples, _, _, _, metrics = scored
    assert metrics.schema == TABLES["eval_metrics"].schema
    own = metrics.filter(pl.col("prompt_id").is_not_null())
    expected = [
        "aesthetic",
        "clip_score",
        "contrast",
        "detail",
        "embedding",
        "saturation",
        "uniform_border",
    ]
    assert own["metric"].value_counts().sort("metric").rows() == [(name, 7) for name in expected]
    assert own.join(samples, on=["prompt_id", "group"]).height == own.height
    vectors = np.array(own.filter(pl.col("metric") == "embedding")["embedding"].to_list())
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(7), abs=1e-6)
    summed = dict(
        metrics.filter(pl.col("prompt_id").is_null()).select("metric", "value").iter_rows()
    )
    expected = summary.summarise(values(own, "clip_score"), values(own, "aesthetic"))
    assert {name: summed[name] for name in summary.COLUMNS} == pytest.approx(expected)
    taste = own.filter(pl.col("metric") == "aesthetic").join(samples, on="prompt_id")
    within = taste.group_by("text").agg(pl.col("value").std())["value"].mean()
    assert summed["aesthetic_std_within"] == pytest.approx(within)
    assert summed["num_failed"] == 0


def test_the_order_and_the_batches_do_not_matter(scored):
    samples, folder, clip, aesthetic, metrics = scored
    again = clip_score.score(
        samples.reverse(), folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=2
    )
    for name in ("clip_score", "aesthetic"):
        assert values(again, name) == pytest.approx(values(metrics, name), abs=1e-5)


@pytest.fixture
def damaged(scored, tmp_path):
    """The images with four that cannot be scored: gone, cut, never drawn, and one that makes CLIP
    give NaN."""
    samples, folder, clip, aesthetic, metrics = scored
    shutil.copytree(folder, tmp_path / "samples")
    (tmp_path / "samples" / "1.png").unlink()
    whole = (tmp_path / "samples" / "3.png").read_bytes()
    (tmp_path / "samples" / "3.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "samples" / "6.png")
    files = pl.when(pl.col("prompt_id") == "p4").then(None).otherwise("file")
    return samples.with_columns(file=files), tmp_path / "samples", clip, aesthetic, metrics


def test_a_image_that_cannot_be_scored_is_a_counted_row_and_never_averaged(damaged, monkeypatch):
    samples, folder, clip, aesthetic, whole = damaged
    forward = clip.forward

    def broken(batch):
        cls, embeddings = forward(batch)
        odd = batch.flatten(1).std(dim=1) < 0.2  # of one colour: only channels differ
        return cls, torch.where(odd[:, None], torch.nan, embeddings)

    monkeypatch.setattr(clip, "forward", broken)
    metrics = clip_score.score(
        samples, folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=3
    )
    failed = metrics.filter(pl.col("metric") == "failed")
    assert failed["prompt_id"].to_list() == ["p1", "p3", "p4", "p6"]
    assert failed["value"].null_count() == failed.height
    reasons = [
        "1.png is missing",
        "3.png is damaged (OSError)",
        images.NOT_DRAWN,
        "clip_score is nan",
    ]
    assert failed["reason"].to_list() == reasons
    own = metrics.filter(pl.col("prompt_id").is_not_null() & (pl.col("metric") != "failed"))
    assert own["prompt_id"].unique().sort().to_list() == ["p0", "p2", "p5"]
    good = whole.filter(pl.col("prompt_id").is_in(["p0", "p2", "p5"]))
    summed = dict(
        metrics.filter(pl.col("prompt_id").is_null()).select("metric", "value").iter_rows()
    )
    assert summed["num_failed"] == 4
    expected = summary.summarise(values(good, "clip_score"), values(good, "aesthetic"))
    assert {name: summed[name] for name in summary.COLUMNS} == pytest.approx(expected, abs=1e-5)
    assert summed["count_LAIONScore"] == 3


def test_a_checkpoint_without_any_image_has_failures_only(scored):
    samples, folder, clip, aesthetic, _ = scored
    none = samples.with_columns(file=pl.when(pl.col("prompt_id") > "p2").then(pl.lit("gone.png")))
    metrics = clip_score.score(none, folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=3)
    assert metrics.schema == TABLES["eval_metrics"].schema
    own = metrics.filter(pl.col("prompt_id").is_not_null())
    assert own.select("prompt_id", "group", "metric", "reason").rows() == [
        (f"p{n}", "ab"[n % 2], "failed", "gone.png is missing" if n > 2 else images.NOT_DRAWN)
        for n in range(7)
    ]
    summed = metrics.filter(pl.col("prompt_id").is_null() & pl.col("value").is_not_nan())
    assert dict(summed.select("metric", "value").iter_rows()) == {
        "count_LAIONScore": 0,
        "num_failed": 7,
    }


def test_images_are_not_blamed_for_a_broken_scorer(scored):
    samples, folder, clip, aesthetic, _ = scored
    with pytest.raises(EvaluationError, match="holds no sample images"):
        clip_score.score(
            samples.clear(), folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=3
        )
    broken = Aesthetic(aesthetic.weight * float("nan"), aesthetic.bias, "cpu")
    one_gone = samples.with_columns(file=pl.when(pl.col("prompt_id") > "p0").then("file"))
    with pytest.raises(
        EvaluationError,
        match=r"none of 7 images in .*, and 6 of them can be read: aesthetic is nan",
    ):
        clip_score.score(one_gone, folder, Networks(clip=clip, aesthetic=broken), batch_size=3)


def test_further_scorers_see_each_image_once_with_its_own_prompt(scored):
    samples, folder, clip, aesthetic, metrics = scored
    asked = []

    class Length:
        def score(self, images, texts):
            asked.extend((image.shape[0], text) for image, text in zip(images, texts, strict=True))
            return np.array([len(text) for text in texts], dtype=np.float32)

    found = clip_score.score(
        samples,
        folder,
        Networks(clip=clip, aesthetic=aesthetic, scorers={"length": Length()}),
        batch_size=3,
    )
    assert asked == list(samples.select("height", "text").iter_rows())
    assert values(found, "length").tolist() == [len(text) for text in samples["text"]]
    assert values(found, "length_mean").tolist() == [
        pytest.approx(samples["text"].str.len_chars().mean())
    ]
    same = found.filter(~pl.col("metric").str.starts_with("length"))
    assert same.equals(metrics)


def test_a_image_and_a_prompt_are_encoded_once(scored, monkeypatch):
    samples, folder, clip, aesthetic, _ = scored
    seen, read = [], []
    forward, encode = clip.forward, clip.encode_text
    monkeypatch.setattr(clip, "forward", lambda batch: seen.append(len(batch)) or forward(batch))
    monkeypatch.setattr(clip, "encode_text", lambda texts: read.extend(texts) or encode(texts))
    clip_score.score(samples, folder, Networks(clip=clip, aesthetic=aesthetic), batch_size=3)
    assert seen == [3, 3, 1]
    assert sorted(read) == sorted(samples["text"].unique())


def test_no_tf32_whatever_others_have_set(scored, monkeypatch):
    clip, set_to = scored[2], []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for tower in (clip.model.vision_model, clip.model.text_model):
        forward = tower.forward

        def note(*args, _forward=forward, **options):
            set_to.append([one.allow_tf32 for one in backends])
            return _forward(*args, **options)

        monkeypatch.setattr(tower, "forward", note)
    before = [one.allow_tf32 for one in backends]
    try:
        for one in backends:
            one.allow_tf32 = True
        clip([np.zeros((32, 32, 3), dtype=np.uint8)])
        clip.encode_text(["a cat"])
        assert set_to == [[False, False]] * 2
        assert [one.allow_tf32 for one in backends] == [True, True]
    finally:
        for one, value in zip(backends, before, strict=True):
            one.allow_tf32 = value


def test_sampled_images_are_scored_as_they_were_drawn(
    tiny_sdxl, clip_folder, aesthetic_folder, tmp_path
):
    rows = [
        {
            "prompt_id": key,
            "text": key,
            "negative": "",
            "group": "g",
            "height": 32,
            "width": 32,
            "seed": 1,
        }
        for key in ("a cat", "a dog")
    ]
    prompts = pl.DataFrame(rows, schema=TABLES["prompt_sets"].schema)
    config = dataclasses.replace(SamplingConfig(), num_steps=2)
    samples = sampling.sample_folder(tiny_sdxl, "run@1", prompts, config, tmp_path)
    clip, aesthetic = Clip.load(clip_folder, "cpu"), Aesthetic.load(aesthetic_folder, "cpu")
    metrics = clip_score.score(
        samples, tmp_path, Networks(clip=clip, aesthetic=aesthetic), batch_size=8
    )
    assert values(metrics, "clip_score").shape == (2,)
    assert metrics.filter(pl.col("metric") == "failed").is_empty()


def test_two_devices_find_what_one_finds(scored, clip_folder, aesthetic_folder):
    samples, folder, *_, metrics = scored
    folders = {"clip": clip_folder, "aesthetic": aesthetic_folder}
    with contextlib.closing(
        ProcessPool("evaluate", clip_score.load_networks, (folders,), ["cpu", "cpu"], print)
    ) as pool:
        assert clip_score.score(samples, folder, pool, batch_size=3).equals(metrics)
