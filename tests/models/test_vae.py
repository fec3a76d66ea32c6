"""Latents are the scaled posterior mean, draws from them have the VAE's spread, and one bad image
is one bad row."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

import demo
from training.errors import ModelError
from training.models.vae import Vae


@pytest.fixture(scope="module")
def vae(sdxl_folder):
    return Vae.load(sdxl_folder / "vae", "cpu")


@pytest.fixture(scope="module")
def shifted(sd1_folder, tmp_path_factory):
    """A VAE with every constant that later models write."""
    model = AutoencoderKL.from_pretrained(sd1_folder / "vae")
    model.register_to_config(
        scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    )
    folder = tmp_path_factory.mktemp("shifted")
    model.save_pretrained(folder)
    return Vae.load(folder, "cpu")


def test_latents_equal_diffusers_posterior_mean_scaled(vae, noise_image):
    images = [noise_image(32, 48, seed=n) for n in range(3)]
    rows = vae(images, with_log_variance=True)
    batch = VaeImageProcessor().preprocess(np.stack(images).astype(np.float32) / 255)
    with torch.inference_mode():
        posterior = vae.model.encode(batch).latent_dist
    for i, row in enumerate(rows):
        assert row.finite
        assert row.latents.shape == (4, 4, 6)
        np.testing.assert_allclose(row.latents, posterior.mode()[i].numpy() * 0.13025, atol=1e-6)
    assert vae(images)[0].log_variance is None


def test_a_draw_from_the_row_equals_a_scaled_draw_of_diffusers(vae, noise_image):
    image = noise_image(32, 32)
    (row,) = vae([image], with_log_variance=True)
    with torch.inference_mode():
        posterior = vae.model.encode(vae.preprocess([image])).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(7))[0].numpy() * 0.13025
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))[0].numpy()
    np.testing.assert_allclose(
        row.latents + np.exp(row.log_variance / 2) * noise, expected, atol=1e-6
    )


def test_shift_and_spread_of_each_channel_are_read_from_the_config(shifted, noise_image):
    image = noise_image(16, 16)
    (row,) = shifted([image], with_log_variance=True)
    with torch.inference_mode():
        posterior = shifted.model.encode(shifted.preprocess([image])).latent_dist
    raw, std = posterior.mode()[0].numpy(), np.array([1, 2, 3, 4]).reshape(4, 1, 1)
    mean = np.array([0.1, -0.2, 0.3, 0.4]).reshape(4, 1, 1)
    np.testing.assert_allclose(row.latents, (raw - mean) * 0.5 / std, atol=1e-6)
    np.testing.assert_allclose(
        np.exp(row.log_variance / 2), posterior.std[0].numpy() * 0.5 / std, rtol=1e-4
    )


@pytest.mark.parametrize("which", ["vae", "shifted"])
def test_decoding_undoes_the_scaling_and_equals_diffusers(request, which):
    adapter = request.getfixturevalue(which)
    raw = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = adapter.model.decode(raw).sample
    expected = (
        VaeImageProcessor().postprocess(decoded, output_type="pt").permute(0, 2, 3, 1).numpy() * 255
    )
    images = adapter.decode((raw - adapter.latents_mean) * adapter.factor)
    assert images.dtype == np.uint8
    assert images.shape == (2, 32, 48, 3)
    assert np.abs(images - expected).max() <= 0.5 + 1e-2


def test_one_bad_image_is_one_bad_row(vae, noise_image):
    images = [noise_image(32, 32, seed=n) for n in range(3)]
    batch = vae.preprocess(images)
    batch[1, 0, 3, 3] = float("nan")
    rows = vae.postprocess(*vae.forward(batch), with_log_variance=False)
    assert [row.finite for row in rows] == [True, False, True]
    np.testing.assert_allclose(rows[2].latents, vae(images[2:])[0].latents, atol=1e-6)
    latents = torch.zeros(2, 4, 2, 2)
    log_variance = torch.zeros(2, 4, 2, 2)
    log_variance[0, 0, 0, 0] = float("inf")
    assert [
        row.finite for row in vae.postprocess(latents, log_variance, with_log_variance=True)
    ] == [False, True]
    assert [
        row.finite for row in vae.postprocess(latents, log_variance, with_log_variance=False)
    ] == [True, True]


def test_non_finite_images_are_an_error_that_says_which(vae):
    latents = torch.zeros(3, 4, 2, 2)
    latents[2] = float("nan")
    with pytest.raises(ModelError, match=r"images \[2\] of a batch of 3"):
        vae.decode(latents)


def test_the_scale_is_the_networks(vae, noise_image):
    assert vae.scale == 8
    with pytest.raises(AssertionError):
        vae.preprocess([noise_image(31, 32)])


def test_a_vae_without_scaling_factor_is_refused(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder / "vae", tmp_path / "vae")
    config = (
        (folder / "config.json")
        .read_text()
        .replace('"scaling_factor": 0.13025', '"scaling_factor": 0')
    )
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="scaling_factor=0"):
        Vae.load(folder, "cpu")
    with pytest.raises(ModelError, match="hf download madebyollin"):
        Vae.load(tmp_path, "cpu")


def test_large_images_are_encoded_in_tiles_that_agree_with_the_whole(sdxl_folder, noise_image):
    whole, tiled = (
        Vae.load(sdxl_folder / "vae", "cpu"),
        Vae.load(sdxl_folder / "vae", "cpu", tile_above_px=64 * 64),
    )
    tiled.model.tile_sample_min_size, tiled.model.tile_latent_min_size = 64, 8
    small, large = (
        noise_image(64, 64),
        np.kron(noise_image(12, 16), np.ones((8, 8, 1), dtype=np.uint8)),
    )
    np.testing.assert_array_equal(tiled([small])[0].latents, whole([small])[0].latents)
    a, b = whole([large])[0].latents, tiled([large])[0].latents
    assert a.shape == b.shape == (4, 12, 16)
    assert not np.array_equal(a, b)  # group norms see the tile only
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8


def test_bf16_rounds_and_is_refused_where_it_costs_quality(sdxl_folder, noise_image):
    images = [noise_image(32, 32, seed=n) for n in range(2)]
    exact, rounded = (
        Vae.load(sdxl_folder / "vae", "cpu", precision=name) for name in ("tf32", "bf16")
    )
    assert exact.precision == "fp32"  # a CPU has no TF32, and what was used is recorded
    a, b = exact(images)[0].latents, rounded(images)[0].latents
    assert b.dtype == np.float32
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.05)
    trained = Vae.load(
        Path(demo.__file__).parent / "models" / "base" / "vae", "cpu", precision="bf16"
    )
    shapes = [
        np.kron(
            np.random.default_rng(n).integers(0, 255, (4, 4, 3), np.uint8),
            np.ones((16, 16, 1), np.uint8),
        )
        for n in (0, 1)
    ]
    trained.check_bf16(shapes)
    assert trained.precision == "bf16"
    # A constant that the next layer takes away again: harmless in fp32, and all that is left of
    # bf16's eight bits.
    encoder, quant = trained.model.encoder.conv_out, trained.model.quant_conv
    with torch.no_grad():
        encoder.bias += 1000
        quant.bias -= quant.weight[:, :, 0, 0].sum(dim=1) * 1000
    with pytest.raises(ModelError, match=r'VAE in bf16: .* limit .*precision = "tf32"'):
        trained.check_bf16(shapes)
