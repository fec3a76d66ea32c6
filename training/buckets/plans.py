"""Bucket plans: named lists of training resolutions, each as its authors' tools make it. Pure integer arithmetic."""

import math
from typing import TYPE_CHECKING

from training.buckets.geometry import Size
from training.errors import ConfigError

if TYPE_CHECKING:  # config.py imports this module to check its options.
    from training.config.workspace import BucketConfig

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


def plan(config: "BucketConfig") -> tuple[Size, ...]:
    """The sizes of a plan, each side divided by `config.scale`, sorted by height and then width.

    Empty for `kohya` with `no_upscale`: there each picture has a size of its own, see `own_size`.

    Raises:
        ConfigError: no size fulfils the options, a side is not divisible, or a size stands twice.
    """
    full = _FULL[config.plan](config)
    if not full and not follows_picture(config):
        raise ConfigError(f"encodings.*.buckets: plan {config.plan!r} with these options has no size at all")
    for size in full:
        if min(size) <= 0 or any(side % (config.scale * VAE_FACTOR) for side in size):
            raise ConfigError(
                f"encodings.*.buckets: size {size} of plan {config.plan!r} must have positive sides that are multiples "
                f"of {VAE_FACTOR} px after division by scale={config.scale}"
            )
    if len(set(full)) != len(full):
        twice = next(size for size in full if full.count(size) > 1)
        raise ConfigError(f"encodings.*.buckets.sizes: {twice} stands twice")
    return tuple(sorted(Size(size.height // config.scale, size.width // config.scale) for size in full))


def follows_picture(config: "BucketConfig") -> bool:
    """Whether each picture gets a size of its own instead of one of a list."""
    return config.plan == "kohya" and bool(config.no_upscale)


def _band(config: "BucketConfig") -> list[Size]:
    """All sizes on SDXL's 64-pixel grid whose area lies in its band: 41."""
    full = [Size(height, width) for height in _SIDES for width in _SIDES]
    return [size for size in full if _AREA[0] <= size.area <= _AREA[1]]


def _sdxl_paper(config: "BucketConfig") -> list[Size]:
    """The 40 sizes of the SDXL report, arXiv:2307.01952, appendix I: the band but for one."""
    return [size for size in _band(config) if size != _NOT_IN_PAPER]


def _bigasp_v1(config: "BucketConfig") -> list[Size]:
    """The 26 of bigASP v1's page: width / height from 0.5 to 3 (fpgaminer/bigasp-training, encode-vaes.py)."""
    return [size for size in _band(config) if _BIGASP_ASPECT[0] <= size.aspect <= _BIGASP_ASPECT[1]]


def _kohya(config: "BucketConfig") -> list[Size]:
    """kohya's make_bucket_resolutions: the square, and for each side the longest other side within the area.

    Source: kohya-ss/sd-scripts, library/model_util.py.
    """
    if follows_picture(config):
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


def _arb(config: "BucketConfig") -> list[Size]:
    """NovelAI's buckets as naifu-diffusion generates them (data/buckets.py), which trained BPModel.

    From every width, the tallest size within the budget, and from every height the widest. The base size, which is
    smaller than the budget, comes in when the first walk passes it.
    """
    base, limit, step = Size(*config.value("base_res")), config.value("dim_limit"), config.value("divisible")
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


def _custom(config: "BucketConfig") -> list[Size]:
    return [Size(*size) for size in config.value("sizes")]


_FULL = {"sdxl_paper": _sdxl_paper, "bigasp_v1": _bigasp_v1, "kohya": _kohya, "arb": _arb, "custom": _custom}
