"""Bucket plans: the training resolutions that images of all shapes are sorted into."""

from training.data.geometry import Size

PLAN_NAMES = ("bigasp_v1",)


def plan(name: str, scale: int = 1) -> tuple[Size, ...]:
    """The sizes of a named plan, sorted by height, each side divided by `scale`."""
    raise KeyError(name, scale, Size)
