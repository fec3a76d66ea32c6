"""Is a model over-baked? Trained too long or too hard, its images grow more saturated, harder in
contrast and full of fine grain, beyond both the base's images and the training images; and a
data set with letter boxes shows in uniform borders.
"""

from collections.abc import Mapping, Sequence

import numpy as np

MEASURES = ("saturation", "contrast", "detail")
BORDER = "uniform_border"
ALL = (*MEASURES, BORDER)
"""What is measured on each image, as metrics of `eval_metrics`."""
ALARM_INDEX = 0.5
"""Over-baked index above which the alarm is raised."""
UNITS = {"saturation": 0.3, "contrast": 0.15}
"""Excess over both references, as a share of the larger, that makes an index of 1: about what
colour x 1.4 and contrast x 1.25 (Pillow's ImageEnhance) leave after clipping, see
tests/evaluation/test_overbaked.py."""
_FAINT = 0.05
"""Least level that an excess is a share of, so that a trace of colour in a monochrome set is no
excess."""
_NUM_CELLS = 32
"""Along the shorter side, of the coarse image whose saturation and contrast are measured: grain
averages out of it."""
ALARM_BORDERS = 0.1
"""By how much the share of images with uniform borders may exceed the base's and the training
images'."""
MAX_TRAINING_IMAGES = 256
"""Training images measured at most."""
_LUMA = np.array([299, 587, 114], dtype=np.float32) / 255_000
_TOLERANCE = 12
_MIN_BAND = 0.02
_UNIFORM_SHARE, _EDGE_SHARE = 0.98, 0.5
Levels = Mapping[str, np.ndarray]
"""Measure -> `(N,)`, one value per image."""


def measure(image: np.ndarray) -> dict[str, float]:
    """The measures of one image.

    `saturation` is the mean of the largest minus the smallest of R, G, B and `contrast` the
    standard deviation of luma, both of a coarse image: means of square blocks, 32 to 63 along the
    shorter side (of shorter ones the pixels). `detail` is the root mean square of luma minus the
    mean of its four neighbours, at the image's own size; all of levels 0-1. `uniform_border` is 1
    for a letter box, else 0.

    Args:
        image: `(H, W, 3)` uint8.
    """
    luma = image.astype(np.float32) @ _LUMA  # (H, W)
    coarse = _blocks(image, max(1, min(luma.shape) // _NUM_CELLS))
    spread = coarse.max(axis=2) - coarse.min(axis=2)
    detail = 0.0
    if min(luma.shape) > 2:
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        fine = luma[1:-1, 1:-1] - around / 4
        detail = float(np.sqrt(np.square(fine).mean(dtype=np.float64)))
    return {
        "saturation": float(spread.mean(dtype=np.float64)) / 255,
        "contrast": float((coarse @ _LUMA).std(dtype=np.float64)),
        "detail": detail,
        BORDER: float(has_uniform_border(image)),
    }


def _blocks(image: np.ndarray, side: int) -> np.ndarray:
    """Means of square blocks of `side` pixels, `(H / side, W / side, 3)` fp32; those at the far
    edges may be cut."""
    sums: np.ndarray = image.astype(np.float32)
    for axis in (0, 1):
        starts = np.arange(0, image.shape[axis], side)
        counts = np.diff(starts, append=image.shape[axis]).astype(np.float32)
        sums = np.add.reduceat(sums, starts, axis=axis) / counts.reshape(
            (-1, 1, 1) if axis == 0 else (1, -1, 1)
        )
    return sums


def has_uniform_border(image: np.ndarray) -> bool:
    """Whether an image has a letter box: bands of one colour along two opposite sides, each ending
    in a straight edge.

    A band is at least 2 % of the side and 2 pixels deep, 98 % of the pixels of each of its lines
    are within 12 levels of its colour, and of the line behind it at least half are not: a plain
    background around something ends otherwise.
    """
    columns = image.transpose(1, 0, 2)
    return any(_has_band(side) and _has_band(side[::-1]) for side in (image, columns))


def _has_band(image: np.ndarray) -> bool:
    """Whether the first lines of `(lines, pixels, 3)` are a band."""
    depth = max(2, int(np.ceil(_MIN_BAND * len(image))))
    colour = np.median(image[0], axis=0)
    for number, line in enumerate(image):
        off = float((np.abs(line - colour).max(axis=1) > _TOLERANCE).mean())
        if off > 1 - _UNIFORM_SHARE:
            return number >= depth and off >= _EDGE_SHARE
    return False


def collect(measures: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Measures of images, one after the other, as arrays."""
    return {name: np.array([one[name] for one in measures], dtype=np.float64) for name in ALL}


def index(own: Levels, base: Levels, training: Levels) -> float:
    """The over-baked index of a checkpoint.

    For saturation and contrast: how far the mean over its images lies above the larger of the
    base's and the training images' means, as a share of it, in `UNITS`, 0 where it does not lie
    above; then the geometric mean of the two. A model may well take on the look of its training
    set, keep that of its base, or lie between.

    Args:
        own: Of the checkpoint's images.
        base: Of the base's images of the same prompts.
        training: Of training images at the size that they were trained at; at least one.

    Returns:
        0 or more: 0 unless both measures exceed both references.
    """
    product = 1.0
    for name, unit in UNITS.items():
        reference = max(float(base[name].mean()), float(training[name].mean()))
        excess = max(0.0, float(own[name].mean()) - reference) / max(reference, _FAINT)
        product *= excess / unit
    return float(product ** (1 / len(UNITS)))


def summarise(own: Levels, base: Levels | None, training: Levels | None) -> dict[str, float]:
    """Means of the measures and the share of letter boxes, of a checkpoint, its base and training
    images.

    Returns:
        `saturation_mean`, … and `border_share`; the same with `_base` and `_train` for those that
        are there; and `overbaked_index` where both are.
    """
    found: dict[str, float] = {}
    for suffix, levels in (("", own), ("_base", base), ("_train", training)):
        if levels is not None and len(levels[BORDER]):
            found |= {f"{name}_mean{suffix}": float(levels[name].mean()) for name in MEASURES}
            found[f"border_share{suffix}"] = float(levels[BORDER].mean())
    if base is not None and training is not None and len(base[BORDER]) and len(training[BORDER]):
        found["overbaked_index"] = index(own, base, training)
    return found


def alarms(summary: Mapping[str, float]) -> list[str]:
    """What is alarming in a checkpoint's summary, in words; empty for nothing.

    The rule: an over-baked index above 0.5; or a share of letter boxes more than 0.1 above both the
    base's and the training images'.
    """
    found = []
    if (value := summary.get("overbaked_index", 0.0)) > ALARM_INDEX:
        found.append(f"over-baked index {value:.2f} is above {ALARM_INDEX}")
    references = [
        summary[name] for name in ("border_share_base", "border_share_train") if name in summary
    ]
    if references and (share := summary["border_share"]) > max(references) + ALARM_BORDERS:
        found.append(
            f"{share:.0%} of the images have uniform borders, {max(references):.0%} of the references"
        )
    return found


def last_before_alarm(summaries: Sequence[tuple[str, Mapping[str, float]]]) -> str | None:
    """Name the last checkpoint before the first that raises an alarm.

    Args:
        summaries: Checkpoint and its summary, in the order of training.

    Returns:
        The last checkpoint of all without an alarm; None where the first raises one, or there is
        none.
    """
    last = None
    for checkpoint, summary in summaries:
        if alarms(summary):
            break
        last = checkpoint
    return last
