"""Sizes and placements, height first: how an image is shrunk, cropped and mapped into its
bucket."""

from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height

    def __str__(self) -> str:
        """`height x width`, as tables and file names show it."""
        return f"{self.height}x{self.width}"


class Box(NamedTuple):
    """A rectangle `[y0, y1) x [x0, x1)` in pixels of the upright source."""

    y0: float
    x0: float
    y1: float
    x1: float


class Placement(NamedTuple):
    """How a source image became a bucket-sized image: resize to `resized`, then crop at the
    offset."""

    original: Size
    """Upright source size."""
    resized: Size
    """Size after the resize; covers the bucket."""
    crop_top: int
    """Rows cut off above, in pixels of the resized image."""
    crop_left: int
    """Columns cut off on the left, in pixels of the resized image."""
    bucket: Size
    """Size of the image that is encoded."""
    flip: bool
    """Mirrored left to right after the crop."""
    pad_top: int = 0
    """Rows of padding above, where the resized image is smaller than the bucket."""
    pad_left: int = 0
    """Columns of padding on the left, before the mirroring."""

    @property
    def padded(self) -> bool:
        """Whether the bucket is larger than the resized image in any dimension."""
        return self.resized.height < self.bucket.height or self.resized.width < self.bucket.width

    @property
    def seen_crop(self) -> tuple[int, int]:
        """Rows cut off above, and columns cut off on the left of the image as it is seen:
        mirrored, those that were cut off on the right before. Pixels of the resized image."""
        overhang = max(self.resized.width - self.bucket.width, 0)
        return self.crop_top, overhang - self.crop_left if self.flip else self.crop_left
