"""The bill against one that was worked out by hand from the rates of docs/cost.md, and the advice on
length against its sources."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from jobs.cli.app import app
from training.buckets.geometry import Size
from training.config.run import OptimizerConfig
from training.config.workspace import EncodingConfig
from training.errors import ConfigError
from training.estimates.cost import (
    Rates,
    Sizes,
    Workload,
    advise_length,
    count_steps,
    estimate_cost,
    latent_bytes,
    length_lines,
    read_rates,
    training_rate,
    warmup_lines,
)
from training.estimates.gpus import find_gpu
from training.latents.files import BucketWriter

# Images, samples, cards; TB of images, latents, tables, embeddings; hours of three annotators,
# encoding, training, evaluation; core-hours of decoding twice; all GPU-hours, days, dollars;
# dollars a month. As printed there.
TABLE = [
    (1.44e6, 30e6, 8, (1.44, 0.12, 0.0002, 0.002), (0.1, 0.1, 1.0, 5.7, 417, 83), (4, 7), (507, 2.6, 1500), 36),
    (10e6, 40e6, 8, (10, 0.83, 0.001, 0.015), (1, 1, 7, 40, 556, 83), (31, 51), (688, 3.6, 2100), 250),
    (100e6, 200e6, 64, (100, 8.3, 0.013, 0.15), (10, 10, 69, 397, 2778, 83), (309, 505), (3350, 2.2, 10_000), 2500),
    (1e9, 1e9, 256, (1000, 83, 0.13, 1.5), (103, 99, 694, 3968, 13_889, 83), (3086, 5051), (18_840, 3.1, 57e3), 25e3),
]  # fmt: skip


def bill(num_images, num_samples, num_gpus=8, rates=None, stored_bytes=None, **changes):
    work = Workload(num_images=int(num_images), num_samples=int(num_samples), **changes)
    return estimate_cost(
        work, rates or Rates(), num_gpus=num_gpus, dollars_per_hour=3.0, stored_bytes=stored_bytes
    )


@pytest.mark.parametrize("row", TABLE)
def test_the_published_table(row):
    images, samples, gpus, stored, hours, cores, totals, month = row
    compressed = latent_bytes(
        EncodingConfig(codec="split-zstd", log_variance=False)
    )  # as in that table
    cost = bill(images, samples, gpus, stored_bytes=Sizes(latents=compressed).of(int(images)))
    terabytes = [
        cost.stored_bytes[kind] / 1e12 for kind in ("raw", "latents", "tables", "embeddings")
    ]
    assert terabytes == pytest.approx(stored, rel=0.31)  # one digit of each is printed
    assert terabytes[:2] == pytest.approx(stored[:2], rel=0.01)
    assert list(cost.gpu_hours.values()) == pytest.approx(hours, rel=0.01, abs=0.5)
    assert list(cost.core_hours.values()) == pytest.approx(cores, rel=0.01, abs=0.5)
    assert cost.total_gpu_hours == pytest.approx(totals[0], rel=0.002)
    assert cost.days == pytest.approx(totals[1], abs=0.05)
    assert cost.gpu_dollars == pytest.approx(totals[2], rel=0.05)
    assert cost.store_dollars_per_month == pytest.approx(month, rel=0.01)
    assert cost.dollars == pytest.approx(cost.gpu_dollars * 1.3)


ENCODINGS = [
    EncodingConfig(),
    EncodingConfig(log_variance=False),
    EncodingConfig(codec="split-zstd"),
]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_latents_take_on_disk_what_the_bill_says(encoding, tmp_path):
    # 37 latents with the spectrum and deviations of SDXL's, and log-variances that vary as slowly,
    # in real files.
    size, rng, num_images = Size(1152, 896), np.random.default_rng(0), 37
    radius = np.hypot(np.fft.fftfreq(144)[:, None], np.fft.rfftfreq(112)[None])
    radius[0, 0] = np.inf
    writer = BucketWriter(
        folder=tmp_path,
        generation=1,
        bucket=size,
        codec=encoding.codec,
        max_bytes=encoding.max_file_bytes,
    )
    for number in range(num_images):
        white = rng.standard_normal((4, 144, 112))
        pink = np.fft.irfft2(np.fft.rfft2(white) / radius, s=white.shape[1:])
        latents = 0.9 * pink / pink.std() + 0.4 * rng.standard_normal(white.shape)
        log_variance = -18 + 3 * pink / pink.std()
        writer.add(f"{number:064d}", latents, log_variance if encoding.log_variance else None)
    writer.finish()
    taken = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert latent_bytes(encoding, size.area) * num_images == pytest.approx(taken, rel=0.05)


def test_the_bill_of_a_million_images_is_of_what_an_encoding_without_options_stores():
    # Two planes (mean, log-variance) of 4 x 128 x 128 bfloat16 at one megapixel.
    assert bill(1e6, 1e6).stored_bytes["latents"] == pytest.approx(
        1e6 * 2 * 4 * 128 * 128 * 2, rel=0.05
    )


def test_bigasps_own_rate_gives_bigasps_own_time():
    # 30 million samples at 8.75 images/s per card: 952 GPU-hours, five days on eight.
    cost = bill(1.44e6, 30e6, rates=Rates(training=8.75))
    assert cost.gpu_hours["training"] == pytest.approx(952, abs=0.5)
    assert cost.gpu_hours["training"] / 8 / 24 == pytest.approx(4.96, abs=0.01)


@given(images=st.integers(1, 10**9), factor=st.integers(2, 10), gpus=st.integers(1, 512))
def test_a_bill_is_linear(images, factor, gpus):
    one, more = (
        bill(images, images, gpus, num_generated=0),
        bill(images * factor, images * factor, gpus, num_generated=0),
    )
    assert more.total_gpu_hours == pytest.approx(one.total_gpu_hours * factor)
    assert bill(images, images, gpus * factor, num_generated=0).days == pytest.approx(
        one.days / factor
    )


def test_operations_of_a_model_give_its_rate():
    assert training_rate(Rates(), 19.94) == pytest.approx(20.0, abs=0.01)
    assert training_rate(Rates(), 19.94 / 2) == pytest.approx(40.0, abs=0.02)
    assert bill(1, 7200, training_tflop=19.94).gpu_hours["training"] == pytest.approx(0.1, abs=1e-4)


def test_another_card_is_scaled_by_what_it_can_do():
    rates = Rates().on("4090")
    assert rates.training == pytest.approx(20 * find_gpu("4090").half / find_gpu("H200").half)
    assert (rates.gpu, rates.decoding, rates.mfu) == ("4090", Rates().decoding, Rates().mfu)
    assert training_rate(rates, 19.94) == pytest.approx(rates.training, rel=1e-3)


def test_rates_of_a_benchmark_replace_defaults(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(
        json.dumps({"format": 1, "rates": {"gpu": "H100", "training": 17.5, "mfu": 0.35}})
    )
    rates = read_rates(path)
    assert (rates.training, rates.mfu, rates.gpu, rates.encoding) == (
        17.5,
        0.35,
        "H100",
        Rates().encoding,
    )


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"format": 2, "rates": {}}', '{"format": 1, "rates": null}',
        '{"format": 1, "rates": {"trainin": 1}}',
        '{"format": 1, "rates": {"training": 0}}', '{"format": 1, "rates": {"mfu": 1.5}}',
        '{"format": 1, "rates": {"gpu": "abacus"}}',
    ],
)  # fmt: skip
def test_files_that_hold_no_rates_are_refused(tmp_path, content):
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_rates(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rates(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("images", "low", "high"), [(75, 200, 300), (10, 200, 300), (2000, 50, 50), (15_000, 50, 50)]
)
def test_samples_per_image_are_those_of_the_guide(images, low, high):
    advice = advise_length(images)
    assert (advice.low, advice.high) == (low * images, high * images)


@given(st.integers(1, 19_000))
def test_larger_sets_see_each_image_less_and_take_longer(images):
    one, more = advise_length(images), advise_length(images + 500)
    assert more.low / (images + 500) <= one.low / images + 0.5
    assert more.low > one.low


@given(st.integers(1, 50), st.integers(1, 400), st.integers(1, 40))
def test_steps_are_counted_as_the_loop_makes_them(images, samples, batch):
    """The loop: an epoch in steps of the batch, the last with what is left, until the samples of
    the run are seen."""
    steps = seen = 0
    while seen < samples:
        left = images
        while left and seen < samples:
            taken = min(batch, left)
            left, seen, steps = left - taken, seen + taken, steps + 1
    assert count_steps(images, samples, batch) == steps


def test_a_warm_up_longer_than_the_run_says_which_rate_is_reached():
    config = OptimizerConfig(learning_rate=8e-4, warmup_samples=640)
    assert warmup_lines(config, 640) == []
    (line,) = warmup_lines(config, 64)
    assert "warmup_samples=640 exceeds num_samples=64" in line
    assert "rises to 8e-05 (10% of 0.0008) at most" in line


def test_advice_stands_beside_the_recipes_own_length():
    lines = length_lines(75, 19_725, 4)
    # 75 images in steps of 4 are 19 steps, the last of 3; 263 epochs of them.
    assert "263.0 per image and 4,997 steps" in lines[0]
    assert "15,000 to 22,500" in lines[0]
    assert len(lines) == 1
    assert "5,000 steps" in length_lines(75, 19_800, 4)[1]
    assert len(length_lines(1_440_000, 30_000_000, 2048)) == 1  # not a few thousand


def test_the_command_prints_a_bill_and_json():
    arguments = ["cost", "--images", "1440000", "--samples", "30000000", "--gpus", "8"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0
    assert "2.64 days on 8 x H200" in text.stdout
    found = json.loads(
        CliRunner().invoke(app, [*arguments, "--json", "--generated", "0", "--gpu", "h100"]).stdout
    )
    assert found["gpu_hours"]["evaluation"] == 0
    assert found["total_gpu_hours"] == pytest.approx(423.7, abs=0.1)
    assert found["gpu"] == "H100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--images"), (["--images", "5"], "--samples"), (["--images", "-1", "--samples", "5"], "cost.images=-1"),
        (["--images", "5", "--samples", "5", "--price", "0"], "cost.price=0"),
        (["--images", "5", "--samples", "5", "--gpu", "abacus"], "abacus"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_makes_no_bill(arguments, message):
    result = CliRunner().invoke(app, ["cost", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
