"""Is a model over-baked? Trained too long or too hard, its pictures grow more saturated, harder in contrast and full of
fine grain, beyond both the base's pictures and the training pictures; and a data set with letter boxes shows in uniform
borders.
"""

from collections.abc import Mapping, Sequence

import numpy as np

MEASURES = ("saturation", "contrast", "detail")
BORDER = "uniform_border"
ALL = (*MEASURES, BORDER)
"""What is measured on each picture, as metrics of `eval_metrics`."""
ALARM_INDEX = 0.5
"""Over-baked index from which the alarm is raised: half a standard deviation of training pictures on each measure."""
ALARM_BORDERS = 0.1
"""By how much the share of pictures with uniform borders may exceed the base's and the training pictures'."""
MAX_TRAINING_PICTURES = 256
"""Training pictures measured at most."""
_LUMA = np.array([299, 587, 114], dtype=np.float32) / 255_000
_TOLERANCE = 12
_MIN_BAND = 0.02
_UNIFORM_SHARE, _EDGE_SHARE = 0.98, 0.5
Levels = Mapping[str, np.ndarray]
"""Measure -> `(N,)`, one value per picture."""


def measure(picture: np.ndarray) -> dict[str, float]:
    """The measures of one picture, all at its own size.

    `saturation` is the mean over pixels of the largest minus the smallest of R, G, B; `contrast` the standard deviation
    of luma; `detail` the root mean square of luma minus the mean of its four neighbours; all of levels 0-1.
    `uniform_border` is 1 for a letter box, else 0.

    Args:
        picture: `(H, W, 3)` uint8.
    """
    luma = picture.astype(np.float32) @ _LUMA  # (H, W)
    spread = picture.max(axis=2) - picture.min(axis=2)
    detail = 0.0
    if min(luma.shape) > 2:
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        fine = luma[1:-1, 1:-1] - around / 4
        detail = float(np.sqrt(np.square(fine).mean(dtype=np.float64)))
    return {
        "saturation": float(spread.mean(dtype=np.float64)) / 255,
        "contrast": float(luma.std(dtype=np.float64)),
        "detail": detail,
        BORDER: float(has_uniform_border(picture)),
    }


def has_uniform_border(picture: np.ndarray) -> bool:
    """Whether a picture has a letter box: bands of one colour along two opposite sides, each ending in a straight edge.

    A band is at least 2 % of the side and 2 pixels deep, 98 % of the pixels of each of its lines are within 12 levels
    of its colour, and of the line behind it at least half are not: a plain background around something ends otherwise.
    """
    columns = picture.transpose(1, 0, 2)
    return any(_has_band(side) and _has_band(side[::-1]) for side in (picture, columns))


def _has_band(picture: np.ndarray) -> bool:
    """Whether the first lines of `(lines, pixels, 3)` are a band."""
    depth = max(2, int(np.ceil(_MIN_BAND * len(picture))))
    colour = np.median(picture[0], axis=0)
    for number, line in enumerate(picture):
        off = float((np.abs(line - colour).max(axis=1) > _TOLERANCE).mean())
        if off > 1 - _UNIFORM_SHARE:
            return number >= depth and off >= _EDGE_SHARE
    return False


def collect(measures: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Measures of pictures, one after the other, as arrays."""
    return {name: np.array([one[name] for one in measures], dtype=np.float64) for name in ALL}


def index(own: Levels, base: Levels, training: Levels) -> float:
    """The over-baked index of a checkpoint.

    For each measure: how far the mean over its pictures lies above the larger of the base's and the training pictures'
    means, in standard deviations (n - 1) of the training pictures, 0 where it does not lie above; then the mean over
    the three measures. 0 means that no measure exceeds both: a model may well take on the look of its training set.

    Args:
        own: Of the checkpoint's pictures.
        base: Of the base's pictures of the same prompts.
        training: Of training pictures at the size that they were trained at; at least two.

    Returns:
        0 or more; infinite where training pictures are all alike in a measure that is exceeded.
    """
    excesses = []
    for name in MEASURES:
        above = float(own[name].mean()) - max(float(base[name].mean()), float(training[name].mean()))
        spread = float(training[name].std(ddof=1))
        excesses.append(0.0 if above <= 0 else above / spread if spread else np.inf)
    return float(np.mean(excesses))


def summarise(own: Levels, base: Levels | None, training: Levels | None) -> dict[str, float]:
    """Means of the measures and the share of letter boxes, of a checkpoint, its base and training pictures.

    Returns:
        `saturation_mean`, … and `border_share`; the same with `_base` and `_train` for those that are there; and
        `overbaked_index` where both are.
    """
    found: dict[str, float] = {}
    for suffix, levels in (("", own), ("_base", base), ("_train", training)):
        if levels is not None and len(levels[BORDER]):
            found |= {f"{name}_mean{suffix}": float(levels[name].mean()) for name in MEASURES}
            found[f"border_share{suffix}"] = float(levels[BORDER].mean())
    if base is not None and training is not None and len(base[BORDER]) and len(training[BORDER]) > 1:
        found["overbaked_index"] = index(own, base, training)
    return found


def alarms(summary: Mapping[str, float]) -> list[str]:
    """What is alarming in a checkpoint's summary, in words; empty for nothing.

    The rule: an over-baked index above 0.5; or a share of letter boxes more than 0.1 above both the base's and the
    training pictures'.
    """
    found = []
    if (value := summary.get("overbaked_index", 0.0)) > ALARM_INDEX:
        found.append(f"over-baked index {value:.2f} is above {ALARM_INDEX}")
    references = [summary[name] for name in ("border_share_base", "border_share_train") if name in summary]
    if references and (share := summary["border_share"]) > max(references) + ALARM_BORDERS:
        found.append(f"{share:.0%} of the pictures have uniform borders, {max(references):.0%} of the references")
    return found


def last_before_alarm(summaries: Sequence[tuple[str, Mapping[str, float]]]) -> str | None:
    """Name the last checkpoint before the first that raises an alarm.

    Args:
        summaries: Checkpoint and its summary, in the order of training.

    Returns:
        The last checkpoint of all without an alarm; None where the first raises one, or there is none.
    """
    last = None
    for checkpoint, summary in summaries:
        if alarms(summary):
            break
        last = checkpoint
    return last
