"""The workspace's quality model: the supplied one while there are few judgements, else one that
finds the raters' taste; and the scores that it gives."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from training.annotators.quality_head import QualityModel
from training.config.workspace import QualityConfig
from training.curation import quality_model
from training.errors import ModelError

WIDTH = 16
CONFIG = QualityConfig(min_pairs=200)


@pytest.fixture(scope="module")
def world():
    """Embeddings with a planted utility, and judgements that follow it."""
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(240, WIDTH)).astype(np.float32)
    utility = vectors[:, 0] - 0.5 * vectors[:, 1]
    ids = [f"{number:03d}" for number in range(240)]
    a, b = generator.integers(0, 160, 600), generator.integers(160, 200, 600)
    pairs = pl.DataFrame(
        {
            "pair_id": [f"{number:04d}" for number in range(600)],
            "a": [ids[one] for one in a],
            "b": [ids[other] for other in b],
            "outcome": np.where(utility[a] > utility[b], "a", "b").tolist(),
        }
    )
    return pl.DataFrame({"image_id": ids, "vector": vectors.tolist()}), pairs, utility


@pytest.fixture(scope="module")
def supplied(tmp_path_factory, world):
    """Heads that another workspace fitted."""
    embeddings, pairs, _ = world
    folder = tmp_path_factory.mktemp("supplied")
    fitted = quality_model.fit(pairs, embeddings, CONFIG, supplied=folder)
    heads = folder / "heads.safetensors"
    fitted.save(heads)
    QualityModel.read_heads(heads, fitted.cut_points).save(folder)
    return folder


def test_enough_judgements_are_fitted_and_rank_images_that_nobody_judged(world, tmp_path):
    embeddings, pairs, utility = world
    fitted = quality_model.fit(pairs, embeddings, CONFIG, supplied=tmp_path)
    assert (fitted.origin, fitted.num_pairs) == ("fitted", 600)
    fitted.save(tmp_path / "heads.safetensors")
    model = quality_model.load(tmp_path / "heads.safetensors", fitted.cut_points)
    found, junk = quality_model.judge(model, embeddings)
    assert spearmanr(found[200:], utility[200:]).statistic > 0.8
    assert not junk.any()
    assert list(fitted.cut_points) == sorted(fitted.cut_points)


def test_few_judgements_take_the_supplied_heads(world, supplied):
    embeddings, pairs, _ = world
    few = quality_model.fit(pairs.head(199), embeddings, CONFIG, supplied=supplied)
    assert (few.origin, few.num_pairs) == ("supplied", 199)
    assert few.cut_points == pytest.approx(QualityModel.load(supplied, "cpu").cuts)


def test_judgements_on_missing_images_do_not_count(world, supplied):
    embeddings, pairs, _ = world
    left = embeddings.filter(pl.col("image_id") != pairs["a"][0])
    fitted = quality_model.fit(pairs, left, CONFIG, supplied=supplied)
    assert fitted.num_pairs == pairs.filter(pl.col("a") != pairs["a"][0]).height < 600


def test_embeddings_of_two_encoders_are_refused(world, tmp_path):
    _, pairs, _ = world
    mixed = pl.DataFrame({"image_id": ["a", "b"], "vector": [[0.0] * 4, [0.0] * 5]})
    with pytest.raises(ModelError, match=r"widths \[4, 5\]"):
        quality_model.fit(pairs, mixed, CONFIG, supplied=tmp_path)


def test_scores_and_bytes_per_pixel_by_hand():
    raw = pl.DataFrame(
        {
            "image_id": ["a", "b", "c"], "height": [100, 10, 50], "width": [200, 10, 50],
            "bytes": [10_000, 50, 2_500], "brightness": [0.5] * 3, "contrast": [0.1] * 3,
            "sharpness": [1.0] * 3,
        }
    )  # fmt: skip
    cuts = [float(cut) for cut in range(8)]  # scores 1 to 9 part at 0, 1, ... 7
    rows = quality_model.score_table(
        raw, np.array([-1.0, 3.5, 9.0]), np.array([0.0, 0.0, 0.9]), [5.0, 6.0, 7.0], cuts, CONFIG
    )
    assert rows["score"].to_list() == [1, 5, 0]
    assert rows["bytes_per_pixel"].to_list() == pytest.approx([0.5, 0.5, 1.0])
