"""What a fine-tune costs before it begins: storage by kind, GPU-hours by stage, days and money, and
how long to train.

hours = images / rate / 3600. docs/cost.md has the source of each default rate, for one H200 and one
CPU core; benchmarks on the card at hand replace them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import toml
from training.buckets.plans import VAE_FACTOR
from training.config.run import OptimizerConfig
from training.config.workspace import EncodingConfig
from training.errors import ConfigError
from training.estimates.gpus import find_gpu
from training.names import check_positive

DEFAULT_GPU = "H200"
"""The card that the default rates are for."""
OVERHEAD = 1.3
"""Storage, transfer and idle time on top of GPU hours: an assumption."""
STORE_DOLLARS_PER_GB_MONTH = 0.023
"""Object storage: list price of Amazon S3 Standard, https://aws.amazon.com/s3/pricing/."""
RATES_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Images per second of each stage on one card or one core; all but the training's are single
    passes."""

    gpu: str = DEFAULT_GPU
    """Card that the rates hold for, by its name in training/estimates/gpus.py."""
    embedding: float = 2700.0
    """CLIP ViT-L/14 at 224 px: 162 GFLOP at 45 % of peak."""
    tagging: float = 2800.0
    """A ViT-B/16 tagger at 448 px: 157 GFLOP at 45 % of peak."""
    watermarks: float = 400.0
    """OWLv2-B/16 at 960 px: 1,094 GFLOP at 45 % of peak."""
    encoding: float = 70.0
    """SDXL's VAE in bf16, with its decoding of images; roofline 93 to 109."""
    training: float = 20.0
    """SDXL's UNet and text encoder 1 at about a megapixel: 19.94 TFLOP a sample at 40 % of peak.
    A goal, not a measurement; bigASP v1 reached 8.75 on an H100 (70 on eight)."""
    generation: float = 1.0
    """SDXL, 30 steps with guidance."""
    mfu: float = 0.403
    """Model FLOPs utilization of the training at that rate: the rate of any other model follows
    from its FLOPs."""
    decoding: float = 90.0
    """Per core: a JPEG of 2 to 4 megapixels, decoded once for all annotators, scaled while it is
    decoded. Measured with libjpeg-turbo on one core, docs/cost.md."""
    resizing: float = 55.0
    """Per core: the same, decoded in full and resized to its bucket. Measured with
    torchvision on one core."""

    def __post_init__(self) -> None:
        find_gpu(self.gpu)
        values = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "gpu"
        }
        check_positive("rates", **values)
        if self.mfu > 1:
            raise ConfigError(f"rates.mfu={self.mfu} must be at most 1")

    def on(self, gpu: str) -> "Rates":
        """The rates on another card, by the ratio of what both can do at best: an estimate until it
        is measured.

        Raises:
            ConfigError: no data sheet of the card is known.
        """
        ratio = find_gpu(gpu).half / find_gpu(self.gpu).half
        per_card = ("embedding", "tagging", "watermarks", "encoding", "training", "generation")
        return dataclasses.replace(
            self, gpu=gpu.upper(), **{name: getattr(self, name) * ratio for name in per_card}
        )


def read_rates(path: Path) -> Rates:
    """Rates that a benchmark has measured; what it did not measure keeps its default.

    Raises:
        ConfigError: the file is none that a benchmark writes, or a rate in it is unknown or
            impossible.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if (
        not isinstance(values, dict)
        or values.get("format") != RATES_FORMAT
        or not isinstance(values.get("rates"), dict)
    ):
        raise ConfigError(
            f'{path} must be an object with "format": {RATES_FORMAT} and "rates", as benchmarks write it'
        )
    return toml.build(Rates, values["rates"], origin=path, prefix="rates.")


TYPICAL_PIXELS = 1_005_038
"""Mean training resolution, pixels, over the images of bigASP's buckets. five_finetunes.md section
1."""
_CHANNELS, _VALUE_BYTES = 4, 2
_STORED_SHARES = {"raw": (1.0, 1.0), "split-zstd": (0.664, 0.58)}
"""Codec -> what it leaves of the bytes of latents (docs/experiments.md) and of log-variances (the
demo's)."""


def latent_bytes(encoding: EncodingConfig, num_pixels: float = TYPICAL_PIXELS) -> float:
    """Bytes of one image's latents in one generation, as an encoding stores them.

    Args:
        encoding: Its codec, and whether log-variances are stored.
        num_pixels: Of the image's bucket.
    """
    mean, log_variance = _STORED_SHARES[encoding.codec]
    plane = num_pixels / VAE_FACTOR**2 * _CHANNELS * _VALUE_BYTES
    return plane * (mean + (log_variance if encoding.log_variance else 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes that an image takes, by kind."""

    raw: float = 1.0e6
    """The image as a file; bigASP's photographs."""
    latents: float = latent_bytes(EncodingConfig())
    """One generation, as an encoding without options stores it."""
    tables: float = 130.0
    """Rows of all tables but embeddings: Parquet of 1.5 million rows with 32 tags each takes 124
    a row."""
    embeddings: float = 1536.0
    """768 numbers of 16 bits."""

    def of(self, num_images: int) -> dict[str, float]:
        """Bytes that so many images take, by kind."""
        return {
            item.name: num_images * getattr(self, item.name) for item in dataclasses.fields(self)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be done."""

    num_images: int
    """Images that are annotated and encoded."""
    num_samples: int
    """Samples that are trained on."""
    num_generated: int = 300_000
    """Images that evaluations draw: ten times the 30,000 of FID-30k."""
    training_tflop: float | None = None
    """10^12 operations per sample, forward and backward; None for SDXL as `Rates.training` has
    it."""

    def __post_init__(self) -> None:
        check_positive("cost", images=self.num_images, samples=self.num_samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The bill."""

    gpu: str
    """Card."""
    num_gpus: int
    """Of them."""
    stored_bytes: Mapping[str, float]
    """By kind."""
    gpu_hours: Mapping[str, float]
    """By stage."""
    core_hours: Mapping[str, float]
    """By stage."""
    training_images_per_s: float
    """Per card."""
    days: float
    """All stages one after the other, each on all cards."""
    gpu_dollars: float
    """Rent of the cards while they work."""

    @property
    def total_gpu_hours(self) -> float:
        """Of all stages."""
        return sum(self.gpu_hours.values())

    @property
    def dollars(self) -> float:
        """With storage, transfer and idle time."""
        return self.gpu_dollars * OVERHEAD

    @property
    def store_dollars_per_month(self) -> float:
        """Keeping everything in an object store."""
        return sum(self.stored_bytes.values()) / 1e9 * STORE_DOLLARS_PER_GB_MONTH


def training_rate(rates: Rates, tflop: float | None) -> float:
    """Samples per second and card, from operations per sample where they are known.

    Args:
        rates: Of the card.
        tflop: 10^12 operations per sample; None for SDXL.
    """
    return (
        rates.training if tflop is None else rates.mfu * find_gpu(rates.gpu).half / (tflop * 1e12)
    )


def estimate_cost(
    work: Workload,
    rates: Rates,
    *,
    num_gpus: int,
    dollars_per_hour: float,
    stored_bytes: Mapping[str, float] | None,
) -> Cost:
    """The cost model of docs/cost.md.

    Args:
        work: What is to be done.
        rates: Of the card that does it.
        num_gpus: Cards, all busy in every stage.
        dollars_per_hour: Of one card.
        stored_bytes: What is stored by kind, where it is known; None for typical sizes.

    Raises:
        ConfigError: a count or price is not positive.
    """
    check_positive("cost", gpus=num_gpus, price=dollars_per_hour)
    images, training = work.num_images, training_rate(rates, work.training_tflop)
    gpu_seconds = {
        "embeddings": images / rates.embedding,
        "tags": images / rates.tagging,
        "watermark_boxes": images / rates.watermarks,
        "latents": images / rates.encoding,
        "training": work.num_samples / training,
        "evaluation": work.num_generated / rates.generation,
    }
    core_seconds = {
        "decoding for annotators": images / rates.decoding,
        "decoding for latents": images / rates.resizing,
    }
    total = sum(gpu_seconds.values()) / 3600
    return Cost(
        gpu=rates.gpu,
        num_gpus=num_gpus,
        stored_bytes=Sizes().of(images) if stored_bytes is None else stored_bytes,
        gpu_hours={stage: seconds / 3600 for stage, seconds in gpu_seconds.items()},
        core_hours={stage: seconds / 3600 for stage, seconds in core_seconds.items()},
        training_images_per_s=training,
        days=total / num_gpus / 24,
        gpu_dollars=total * dollars_per_hour,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthAdvice:
    """How long others train sets of a size."""

    low: int
    """Samples, at least."""
    high: int
    """Samples, at most."""
    reason: str
    """One line that names the source."""


_SMALL, _THOUSANDS, _LARGE = 75, 2_000, 20_000
QUALITY_TUNING_STEPS = 5_000
"""Optimizer steps that tuning on a few thousand very good images never exceeds. five_finetunes.md
section 4."""


def advise_length(num_images: int) -> LengthAdvice:
    """Samples that a set of `num_images` wants, by what practitioners report.

    Steps per image are counted at batch 1, so that they are samples per image: 200 to 300 at about
    75 images and about 50 at thousands, on a straight line of logarithms between. Beyond 20,000
    images only whole runs are published: bigASP saw each of its 1.44 million images 21 times,
    Kohaku XL Delta its 3.7 million once.

    Source: five_finetunes.md sections 1, 2 and 5.
    """
    if num_images >= _LARGE:
        reason = "published runs on more than 20,000 images see each 1 (Kohaku XL Delta) to 21 times (bigASP)"
        return LengthAdvice(low=num_images, high=21 * num_images, reason=reason)
    share = min(max(math.log(num_images / _SMALL) / math.log(_THOUSANDS / _SMALL), 0.0), 1.0)
    low, high = (round(num_images * start ** (1 - share) * 50**share) for start in (200, 300))
    reason = (
        f"{low / num_images:.0f} to {high / num_images:.0f} samples per image: "
        "200-300 at 75 images, 50 at thousands"
    )
    return LengthAdvice(low=low, high=high, reason=reason)


def count_steps(num_images: int, num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps of a run: the last step of an epoch takes what is left of it, be it the whole
    set."""
    epochs, rest = divmod(num_samples, num_images)
    return epochs * -(-num_images // global_batch_size) + -(-rest // global_batch_size)


def warmup_lines(optimizer: OptimizerConfig, num_samples: int) -> list[str]:
    """What people should know of a warm-up that is longer than the run: the rate that is
    reached."""
    if optimizer.warmup_samples <= num_samples:
        return []
    share = num_samples / optimizer.warmup_samples
    return [
        f"warm-up: warmup_samples={optimizer.warmup_samples:,} exceeds num_samples={num_samples:,}: the learning rate "
        f"rises to {optimizer.learning_rate * share:.3g} ({share:.0%} of {optimizer.learning_rate:.3g}) at most"
    ]


def length_lines(num_images: int, num_samples: int, global_batch_size: int) -> list[str]:
    """The advice beside a recipe's own length, for people.

    Args:
        num_images: That train.
        num_samples: The recipe's length.
        global_batch_size: Its samples per step.
    """
    advice, steps = (
        advise_length(num_images),
        count_steps(num_images, num_samples, global_batch_size),
    )
    lines = [
        f"length: {num_samples:,} samples are {num_samples / num_images:,.1f} per image and {steps:,} steps; advice "
        f"{advice.low:,}"
        + ("" if advice.low == advice.high else f" to {advice.high:,}")
        + f" ({advice.reason})"
    ]
    if num_images < _LARGE and steps > QUALITY_TUNING_STEPS:
        lines.append(
            f"length: quality-tuning on a few thousand very good images never takes more than "
            f"{QUALITY_TUNING_STEPS:,} steps (EMU)"
        )
    return lines


def as_json(cost: Cost) -> dict[str, Any]:
    """A bill as plain values."""
    totals = ("total_gpu_hours", "dollars", "store_dollars_per_month")
    return dataclasses.asdict(cost) | {name: getattr(cost, name) for name in totals}
