"""The folded head equals the five layers it was folded from."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from training.annotators import aesthetic
from training.annotators.aesthetic import Aesthetic, AestheticHead
from training.errors import ModelError


@pytest.fixture
def head():
    torch.manual_seed(0)
    return AestheticHead(24).eval()


def test_the_fold_equals_the_network(tmp_path, head):
    aesthetic.save(tmp_path, head)
    embeddings = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)
    units = torch.from_numpy(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    expected = head.double()(units.double()).detach().numpy()
    np.testing.assert_allclose(Aesthetic.load(tmp_path, "cpu")(embeddings), expected, atol=1e-6)


def test_the_published_names_and_shapes(head):
    shapes = {key: tuple(value.shape) for key, value in AestheticHead(768).state_dict().items()}
    assert shapes == {
        "layers.0.weight": (1024, 768), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024),
        "layers.2.bias": (128,), "layers.4.weight": (64, 128), "layers.4.bias": (64,),
        "layers.6.weight": (16, 64), "layers.6.bias": (16,), "layers.7.weight": (1, 16), "layers.7.bias": (1,),
    }  # fmt: skip


def test_the_length_of_an_embedding_does_not_matter_and_zero_gives_the_bias(tmp_path, head):
    aesthetic.save(tmp_path, head)
    model = Aesthetic.load(tmp_path, "cpu")
    vector = np.random.default_rng(1).normal(size=(1, 24)).astype(np.float32)
    assert model(vector) == pytest.approx(model(vector * 37), abs=1e-6)
    assert model(np.zeros((1, 24), np.float32)) == [pytest.approx(float(model.bias))]


def test_the_relu_variant_and_other_widths_are_refused(tmp_path, head):
    aesthetic.save(tmp_path, head)
    with pytest.raises(ModelError, match=r"width 24, not of shape \(2, 25\)"):
        Aesthetic.load(tmp_path, "cpu")(np.zeros((2, 25), np.float32))
    state = load_file(tmp_path / "model.safetensors")
    numbers = dict(zip((0, 2, 4, 6, 7), (0, 3, 6, 9, 11), strict=True))
    relu = {
        f"layers.{numbers[int(k.split('.')[1])]}.{k.split('.')[2]}": v.clone()
        for k, v in state.items()
    }
    save_file(relu, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="ReLU variant"):
        Aesthetic.load(tmp_path, "cpu")
    save_file(state | {"layers.4.weight": torch.zeros(64, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="do not follow each other"):
        Aesthetic.load(tmp_path, "cpu")
