"""CLIP score and aesthetics against an independent computation with the same random weights."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from training.data.tables import TABLES
from training.errors import EvaluationError
from training.evaluation import clip_score, sampling, summary
from training.evaluation_config import SamplingConfig
from training.models.aesthetic import Aesthetic
from training.models.clip import Clip


@pytest.fixture(scope="module")
def scored(tmp_path_factory, clip_folder, aesthetic_folder):
    """Seven drawn pictures of two sizes, their table, folder and scores."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(1)
    rows = []
    for number in range(7):
        height, width = (32, 48) if number % 2 else (64, 40)
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = f"{number}.png"
        Image.fromarray(picture).save(folder / file)
        rows.append(
            {"prompt_id": f"p{number}", "text": ["red cat", "a dog", "tree"][number % 3], "negative": "",
             "group": "ab"[number % 2], "seed": number, "height": height, "width": width, "file": file, "sha256": ""}
        )  # fmt: skip
    samples = pl.DataFrame(rows, schema=TABLES["sample_images"].schema)
    clip, aesthetic = Clip.load(clip_folder, "cpu"), Aesthetic.load(aesthetic_folder, "cpu")
    return samples, folder, clip, aesthetic, clip_score.score(samples, folder, clip, aesthetic, batch_size=3)


def values(metrics, name):
    return metrics.filter(pl.col("metric") == name).sort("prompt_id")["value"].to_numpy()


def test_scores_equal_an_independent_computation(scored, clip_folder, aesthetic_folder):
    samples, folder, clip, _, metrics = scored
    model = CLIPModel.from_pretrained(clip_folder).eval()
    from safetensors.torch import load_file

    state = load_file(aesthetic_folder / "model.safetensors")
    for row, cosine, taste in zip(
        samples.iter_rows(named=True), values(metrics, "clip_score"), values(metrics, "aesthetic"), strict=True
    ):
        # One picture at a time: pixels by the adapter (proved elsewhere), all the rest by hand.
        pixels = clip.preprocess(np.asarray(Image.open(folder / row["file"])))[None]
        tokens = clip.tokenizer([row["text"]], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            picture = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            text = model.text_projection(model.text_model(tokens).pooler_output)[0]
            expected = torch.dot(picture, text) / (picture.norm() * text.norm())
            score = picture / picture.norm()
            for layer in (0, 2, 4, 6, 7):
                score = state[f"layers.{layer}.weight"] @ score + state[f"layers.{layer}.bias"]
        assert cosine == pytest.approx(expected.item(), abs=1e-6)
        assert taste == pytest.approx(score.item(), abs=1e-5)


def test_the_table_holds_scores_embeddings_and_the_summary(scored):
    samples, _, _, _, metrics = scored
    assert metrics.schema == TABLES["eval_metrics"].schema
    own = metrics.filter(pl.col("prompt_id").is_not_null())
    assert own["metric"].value_counts().sort("metric").rows() == [("aesthetic", 7), ("clip_score", 7), ("embedding", 7)]
    assert own.join(samples, on=["prompt_id", "group"]).height == own.height
    vectors = np.array(own.filter(pl.col("metric") == "embedding")["embedding"].to_list())
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(7), abs=1e-6)
    summed = dict(metrics.filter(pl.col("prompt_id").is_null()).select("metric", "value").iter_rows())
    expected = summary.summarise(values(own, "clip_score"), values(own, "aesthetic"))
    assert summed == pytest.approx(expected)


def test_the_order_and_the_batches_do_not_matter(scored):
    samples, folder, clip, aesthetic, metrics = scored
    again = clip_score.score(samples.reverse(), folder, clip, aesthetic, batch_size=2)
    for name in ("clip_score", "aesthetic"):
        assert values(again, name) == pytest.approx(values(metrics, name), abs=1e-5)


def test_a_missing_picture_is_named(scored):
    samples, folder, clip, aesthetic, _ = scored
    gone = samples.with_columns(file=pl.lit("gone.png"))
    with pytest.raises(EvaluationError, match=r"gone\.png cannot be read .*sample the checkpoint again"):
        clip_score.score(gone, folder, clip, aesthetic, batch_size=3)
    with pytest.raises(EvaluationError, match="holds no sample images"):
        clip_score.score(samples.clear(), folder, clip, aesthetic, batch_size=3)


def test_a_score_that_is_not_finite_is_an_error(scored):
    samples, folder, clip, aesthetic, _ = scored
    broken = Aesthetic(aesthetic.weight * float("nan"), aesthetic.bias, "cpu")
    with pytest.raises(EvaluationError, match="aesthetic is not finite for 7 pictures, such as prompt 'p0'"):
        clip_score.score(samples, folder, clip, broken, batch_size=3)


def test_sampled_pictures_are_scored_as_they_were_drawn(tiny_sdxl, clip_folder, aesthetic_folder, tmp_path):
    rows = [
        {"prompt_id": key, "text": key, "negative": "", "group": "g", "height": 32, "width": 32, "seed": 1}
        for key in ("a cat", "a dog")
    ]
    prompts = pl.DataFrame(rows, schema=TABLES["prompt_sets"].schema)
    config = dataclasses.replace(SamplingConfig(), num_steps=2)
    samples = sampling.sample_folder(tiny_sdxl, "run@1", prompts, config, tmp_path)
    clip, aesthetic = Clip.load(clip_folder, "cpu"), Aesthetic.load(aesthetic_folder, "cpu")
    assert clip_score.score(samples, tmp_path, clip, aesthetic, batch_size=8).height == 3 * 2 + len(summary.COLUMNS)
