"""Bucket plans: named lists of training resolutions, each as its authors' tools make it. Pure
integer arithmetic."""

import math
from dataclasses import dataclass
from typing import Any

from training.buckets.geometry import Size
from training.errors import ConfigError
from training.names import check_fractions, check_positive

OPTIONS: dict[str, tuple[str, ...]] = {
    "sdxl_paper": (),
    "bigasp_v1": (),
    "kohya": ("area", "min_side", "max_side", "step", "no_upscale"),
    "arb": ("base_res", "max_size", "divisible", "max_ar_error", "min_dim", "dim_limit"),
    "custom": ("sizes",),
}
"""The plans, and the options that each of them has."""

VAE_FACTOR = 8
"""Pixels per latent along a side in SD 1.x and SDXL: every side is a multiple of it."""
_STEP = 64
_SIDES = range(512, 2048 + 1, _STEP)
_AREA = (946_176, 1_048_576)
_BIGASP_ASPECT = (0.5, 3.0)
_NOT_IN_PAPER = Size(1344, 704)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketConfig:
    """The training resolutions of an encoding. Sizes are height before width, pixels."""

    plan: str = "bigasp_v1"
    """Name of a bucket plan; `foundry buckets PLAN` prints it."""
    scale: int = 1
    """Every side of the plan is divided by this: 8 for the demo's tiny models."""
    allow_upscale: bool = False
    """Enlarge images that are smaller than every bucket, instead of rejecting them."""
    area: int | None = None
    """kohya: largest area, pixels; 1,048,576 unless given."""
    min_side: int | None = None
    """kohya: shortest side; 256."""
    max_side: int | None = None
    """kohya: longest side; 4096."""
    step: int | None = None
    """kohya: what sides are multiples of; 64."""
    no_upscale: bool | None = None
    """kohya: each image keeps its own size, cut to multiples of `step`, and only one beyond the
    area shrinks."""
    base_res: tuple[int, int] | None = None
    """arb: the square that joins the list; 768, 768."""
    max_size: tuple[int, int] | None = None
    """arb: no size has more pixels than this; 768, 1152."""
    divisible: int | None = None
    """arb: what sides grow by; 64."""
    max_ar_error: float | None = None
    """arb: largest difference of width / height between an image and its bucket; 4."""
    min_dim: int | None = None
    """arb: shortest side; 512."""
    dim_limit: int | None = None
    """arb: longest side; 1792."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """custom: the list."""

    def __post_init__(self) -> None:
        if self.plan not in OPTIONS:
            raise ConfigError(
                f"encodings.*.buckets.plan={self.plan!r} must be one of {sorted(OPTIONS)}"
            )
        check_positive("encodings.*.buckets", scale=self.scale)
        for option in (name for names in OPTIONS.values() for name in names):
            value = getattr(self, option)
            if value is None:
                continue
            if option not in OPTIONS[self.plan]:
                own = ", ".join(OPTIONS[self.plan]) or "none"
                raise ConfigError(
                    f"encodings.*.buckets.{option}={value} is no option of plan {self.plan!r} ({own})"
                )
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                check_positive("encodings.*.buckets", **{option: value})
        if self.plan == "custom" and not self.sizes:
            raise ConfigError(
                "encodings.*.buckets.sizes must list [height, width] pairs for plan 'custom'"
            )
        if self.no_upscale and self.allow_upscale:
            raise ConfigError(
                "encodings.*.buckets: no_upscale=true and allow_upscale=true exclude each other"
            )
        if self.no_upscale and self.value("step") % (self.scale * VAE_FACTOR):
            raise ConfigError(
                f"encodings.*.buckets.step={self.value('step')} must be a multiple of {VAE_FACTOR} px after division "
                f"by scale={self.scale}"
            )
        plan(self)

    def value(self, option: str) -> Any:
        """An option, or its default where it is not given."""
        given = getattr(self, option)
        return _BUCKET_DEFAULTS[option] if given is None else given


_BUCKET_DEFAULTS: dict[str, Any] = {
    "area": 1024 * 1024, "min_side": 256, "max_side": 4096, "step": 64, "no_upscale": False,
    "base_res": (768, 768), "max_size": (768, 1152), "divisible": 64, "max_ar_error": 4.0, "min_dim": 512,
    "dim_limit": 1792,
}  # fmt: skip
"""Kohaku XL Delta's settings of kohya's plan, and BPModel's of arb at 768."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpCropConfig:
    """Images that are padded to their bucket instead of cropped, so that nothing of them is
    lost."""

    share: float = 0.0
    """Share of the eligible images that are padded, chosen by image_id; the others are cropped as
    ever."""
    min_cut: float = 0.05
    """Eligible are images of whose area the crop would cut at least this share,"""
    except_tags: tuple[str, ...] = (
        "drawing",
        "illustration",
        "lineart",
        "sketch",
        "comic",
        "anime",
        "monochrome",
    )
    """and which have none of these tags: padding thins the lines of drawn images."""

    def __post_init__(self) -> None:
        check_fractions("encodings.*.up_crop", share=self.share, min_cut=self.min_cut)


def plan(config: BucketConfig) -> tuple[Size, ...]:
    """The sizes of a plan, each side divided by `config.scale`, sorted by height and then width.

    Empty for `kohya` with `no_upscale`: there each image has a size of its own, see `own_size`.

    Raises:
        ConfigError: no size fulfils the options, a side is not divisible, or a size stands twice.
    """
    full = _FULL[config.plan](config)
    if not full and not follows_image(config):
        raise ConfigError(
            f"encodings.*.buckets: plan {config.plan!r} with these options has no size at all"
        )
    for size in full:
        if min(size) <= 0 or any(side % (config.scale * VAE_FACTOR) for side in size):
            raise ConfigError(
                f"encodings.*.buckets: size {size} of plan {config.plan!r} must have positive sides that are multiples "
                f"of {VAE_FACTOR} px after division by scale={config.scale}"
            )
    if len(set(full)) != len(full):
        twice = next(size for size in full if full.count(size) > 1)
        raise ConfigError(f"encodings.*.buckets.sizes: {twice} stands twice")
    return tuple(
        sorted(Size(size.height // config.scale, size.width // config.scale) for size in full)
    )


def follows_image(config: BucketConfig) -> bool:
    """Whether each image gets a size of its own instead of one of a list."""
    return config.plan == "kohya" and bool(config.no_upscale)


def _band(config: BucketConfig) -> list[Size]:
    """All sizes on SDXL's 64-pixel grid whose area lies in its band: 41."""
    full = [Size(height, width) for height in _SIDES for width in _SIDES]
    return [size for size in full if _AREA[0] <= size.area <= _AREA[1]]


def _sdxl_paper(config: BucketConfig) -> list[Size]:
    """The 40 sizes of the SDXL report, arXiv:2307.01952, appendix I: the band but for one."""
    return [size for size in _band(config) if size != _NOT_IN_PAPER]


def _bigasp_v1(config: BucketConfig) -> list[Size]:
    """The 26 of bigASP v1's page: width / height from 0.5 to 3 (fpgaminer/bigasp-training,
    encode-vaes.py)."""
    return [size for size in _band(config) if _BIGASP_ASPECT[0] <= size.aspect <= _BIGASP_ASPECT[1]]


def _kohya(config: BucketConfig) -> list[Size]:
    """kohya's make_bucket_resolutions: the square, and for each side the longest other side within
    the area.

    Source: kohya-ss/sd-scripts, library/model_util.py.
    """
    if follows_image(config):
        return []
    area, step = config.value("area"), config.value("step")
    low, high = config.value("min_side"), config.value("max_side")
    square = math.isqrt(area) // step * step
    found = {Size(square, square)} if square else set()
    for side in range(low, high + 1, step):
        other = min(high, area // side // step * step)
        if other >= low:
            found |= {Size(side, other), Size(other, side)}
    return sorted(found)


def _arb(config: BucketConfig) -> list[Size]:
    """NovelAI's buckets as naifu-diffusion generates them (data/buckets.py), which trained BPModel.

    From every width, the tallest size within the budget, and from every height the widest. The base
    size, which is smaller than the budget, comes in when the first walk passes it.
    """
    base, limit, step = (
        Size(*config.value("base_res")),
        config.value("dim_limit"),
        config.value("divisible"),
    )
    smallest, budget = config.value("min_dim"), Size(*config.value("max_size")).area
    found: set[Size] = set()
    for side in range(smallest, limit + 1, step):
        if side * smallest > budget:
            break
        other = smallest
        while side * (other + step) <= budget and other + step <= limit:
            if Size(other, side) == base:
                found.add(base)
            other += step
        found |= {Size(other, side), Size(side, other)}
    return sorted(found)


def _custom(config: BucketConfig) -> list[Size]:
    return [Size(*size) for size in config.value("sizes")]


_FULL = {
    "sdxl_paper": _sdxl_paper,
    "bigasp_v1": _bigasp_v1,
    "kohya": _kohya,
    "arb": _arb,
    "custom": _custom,
}
