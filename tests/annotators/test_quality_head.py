"""The quality model learns a planted taste, measures itself on images it never saw, and forgets
nothing on disk."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.annotators import quality_head
from training.annotators.quality_head import QualityModel, ScalarHead, fit_junk, fit_utility
from training.errors import DataError, ModelError

WIDTH = 32


@pytest.fixture(scope="module")
def world():
    """300 images with a planted utility, and 800 judgements of noisy raters, a tenth of them
    ties."""
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(300, WIDTH)).astype(np.float32)
    utility = 2 * embeddings[:, 0] - embeddings[:, 1]
    a = generator.integers(0, 200, 800)
    b = (a + generator.integers(1, 200, 800)) % 200  # images 200 to 299 are never judged
    wins = generator.random(800) < 1 / (1 + np.exp(-2 * (utility[a] - utility[b])))
    target = np.where(generator.random(800) < 0.1, 0.5, wins)
    return embeddings, utility, a, b, target


def fit(embeddings, a, b, target, seed=0):
    return fit_utility(
        embeddings[a],
        embeddings[b],
        target,
        ids_a=[f"i{n}" for n in a],
        ids_b=[f"i{n}" for n in b],
        seed=seed,
    )


@pytest.fixture(scope="module")
def fitted(world):
    embeddings, _, a, b, target = world
    return fit(embeddings, a, b, target)


def test_a_planted_taste_is_found_again(world, fitted):
    embeddings, utility, *_ = world
    head, report = fitted
    predicted = head(torch.from_numpy(embeddings[200:])).numpy()
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, utility[200:])]
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert report["num_pairs"] == 800
    assert report["held_out_accuracy"] > 0.75
    assert report["held_out_loss"] < 0.6


def test_the_report_by_hand(world, fitted):
    """Tau and accuracy belong together through the share of ties."""
    *_, a, b, target = world
    _, report = fitted
    held = [
        quality_head._held_out(f"i{x}", 0) or quality_head._held_out(f"i{y}", 0)
        for x, y in zip(a, b, strict=True)
    ]
    decisive = np.mean(target[held] != 0.5)
    assert report["num_held_out_pairs"] == sum(held)
    assert report["num_ties"] == (target == 0.5).sum()
    assert report["held_out_tau"] == pytest.approx(
        (2 * report["held_out_accuracy"] - 1) * decisive, abs=1e-6
    )


def test_equal_inputs_give_equal_bits_and_the_global_generator_decides_nothing(world, fitted):
    embeddings, _, a, b, target = world
    torch.manual_seed(123)
    again, report = fit(embeddings, a, b, target)
    assert report == fitted[1]
    assert all(
        torch.equal(x, y) for x, y in zip(again.parameters(), fitted[0].parameters(), strict=True)
    )
    other, _ = fit(embeddings, a, b, target, seed=1)
    assert not torch.equal(other.linear1.weight, again.linear1.weight)


def test_noise_is_not_mistaken_for_taste(world):
    embeddings, _, a, b, _ = world
    coins = np.random.default_rng(5).integers(0, 2, len(a)).astype(float)
    _, report = fit(embeddings, a, b, coins)
    # Split by pair instead of by image, memorised images would lift this well above chance.
    assert 0.4 < report["held_out_accuracy"] < 0.6
    assert report["held_out_loss"] > 0.68


def test_ties_pull_utilities_together(world):
    embeddings, _, a, b, target = world
    spread = fit(embeddings, a, b, target)[0](torch.from_numpy(embeddings)).std()
    mostly_ties = np.where(np.arange(len(a)) % 10 == 0, target, 0.5)
    assert fit(embeddings, a, b, mostly_ties)[0](torch.from_numpy(embeddings)).std() < spread / 2


def test_too_few_judgements_are_refused(world):
    embeddings, _, a, b, target = world
    with pytest.raises(DataError, match="19 judged pairs"):
        fit(embeddings, a[:19], b[:19], target[:19])
    with pytest.raises(DataError, match="0 of them not ties"):
        fit(embeddings, a, b, np.full(len(a), 0.5))


def test_without_a_held_out_image_there_is_a_head_but_no_measure(world, monkeypatch):
    embeddings, _, a, b, target = world
    monkeypatch.setattr(quality_head, "HELD_OUT_SHARE", 0.0)
    head, report = fit(embeddings, a[:40], b[:40], target[:40])
    assert report["held_out_accuracy"] is report["held_out_tau"] is report["held_out_loss"] is None
    assert head(torch.from_numpy(embeddings)).isfinite().all()


def test_rare_junk_is_found(world):
    embeddings, *_ = world
    is_junk = embeddings[:, 3] > 1.3
    assert 10 < is_junk.sum() < 60
    ids = [f"i{n}" for n in range(300)]
    head, report = fit_junk(embeddings, is_junk, ids=ids, seed=0)
    held = np.array([quality_head._held_out(image_id, 0) for image_id in ids])
    assert report["num_held_out_images"] == held.sum()
    assert report["num_junk"] == is_junk.sum()
    assert report["held_out_recall"] > 0.7
    assert report["held_out_precision"] > 0.4
    found = torch.sigmoid(head(torch.from_numpy(embeddings))).numpy() > 0.5
    assert (found & is_junk).sum() > 0.9 * is_junk.sum()
    with pytest.raises(DataError, match="0 of 300"):
        fit_junk(embeddings, np.zeros(300, bool), ids=ids, seed=0)


@pytest.mark.parametrize("with_junk", [True, False])
def test_a_saved_model_says_the_same(tmp_path, world, fitted, with_junk):
    embeddings, *_ = world
    torch.manual_seed(0)
    model = QualityModel(
        fitted[0], ScalarHead(WIDTH) if with_junk else None, [-1.0, 0.5, 2.0], "cpu"
    )
    model.save(tmp_path)
    again = QualityModel.load(tmp_path, "cpu")
    rows = again(embeddings[:50])
    assert rows == model(embeddings[:50])
    assert again.cuts == (-1.0, 0.5, 2.0)
    assert all((row.junk_probability is not None) == with_junk for row in rows)
    assert rows[0].utility == pytest.approx(
        float(fitted[0](torch.from_numpy(embeddings[:1]))), abs=1e-6
    )


def test_unusable_models_and_embeddings_name_the_rule(tmp_path, fitted):
    model = QualityModel(fitted[0], None, [0.0], "cpu")
    with pytest.raises(ModelError, match=r"width 32, not of shape \(1, 33\)"):
        model(np.zeros((1, 33), np.float32))
    with pytest.raises(ModelError, match="not ascending"):
        QualityModel(fitted[0], None, [1.0, 0.0], "cpu")
    with pytest.raises(ModelError, match="foundry run --select quality_model"):
        QualityModel.load(tmp_path, "cpu")
    model.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"cuts": None}))
    with pytest.raises(ModelError, match="cuts=None"):
        QualityModel.load(tmp_path, "cpu")
    save_file({"utility.linear1.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="another architecture"):
        QualityModel.read_heads(tmp_path / "model.safetensors", [0.0])
