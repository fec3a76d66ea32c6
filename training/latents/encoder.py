"""Encodes groups of images of one bucket: place, crop, VAE, write. A worker of the engine, and the
types that say what it is given and what it returns."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from training.buckets.crops import CropPolicy, CropTarget, apply, place
from training.buckets.geometry import Box, Placement, Size
from training.config.workspace import DecodeConfig, EncodingConfig
from training.images import figures
from training.images.decode_pool import DecodePool, ImageFile, Rejection
from training.images.saliency import importance
from training.latents.files import BucketWriter
from training.latents.generations import Generation
from training.manifests import Entry
from training.tables.table import Reason

if TYPE_CHECKING:
    from training.models.vae import Vae


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """A kept image with what its crop follows from."""

    image_id: str
    file: ImageFile
    original: Size
    bucket: Size
    flip: bool
    crop_box: Box | None
    padded: bool = False
    """Padded to its bucket instead of cropped."""
    resized: Size | None = None
    """What it is resized to; None for the smallest size that covers its bucket."""
    measured: bool = False
    """On the validation or the stable list: in latent files of their own, so that a trainer that
    fetches files can measure before the others have arrived."""
    watermarks: tuple[tuple[Box, float], ...] = ()
    """Boxes in upright source pixels, with confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One of the sample, uint8 `(H, W, 3)` each."""

    image_id: str
    source: np.ndarray
    """Small, with the crop and the watermarks drawn in."""
    crop: np.ndarray
    """What was encoded."""
    decoded: np.ndarray
    """What its latents decode to."""

    @property
    def error(self) -> float:
        """Mean absolute difference of crop and decoded latents, 0-255."""
        return float(np.abs(self.crop.astype(np.int16) - self.decoded).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSpec:
    """What a VAE is loaded from and for."""

    folder: Path
    """In diffusers layout."""
    precision: Literal["tf32", "fp32", "bf16"]
    """Arithmetic."""
    tile_above_px: int
    """See `EncodingConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """What one generation of one shard is made from and goes to."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    generation: int
    """Number of this pass; keys the crops."""
    encoding: EncodingConfig
    """Crop policy, precision, batch size, file size."""
    vae_digest: str
    """Of the VAE's folder; stands in every latent file."""
    vae: "VaeSpec"
    """Which one encodes; not loaded where nothing is to be encoded."""
    previous: Generation | None = None
    """Whose rows may be copied."""
    older: tuple[Generation, ...] = ()
    """The same of images that the previous one lacks, because they were missing then; the newest
    first."""
    show_watermarks: float = 1.0
    """Confidence from which a watermark box is drawn into the shown sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Images of one bucket and one list that are to be encoded, and how."""

    job: EncodeJob
    """Without what is copied."""
    images: Sequence[KeptImage]
    """In order."""
    size: int
    """Images per batch."""
    showing: frozenset[str]
    """Ids of those to show."""
    check: Sequence[KeptImage] = ()
    """Images that bf16 must not lose by, before any is encoded."""

    def __str__(self) -> str:
        height, width = self.images[0].bucket
        return f"{len(self.images)} images of {height}x{width} for {self.job.folder}"


@dataclass(kw_only=True)
class EncodedGroup:
    """What was made of a group, its files written but not yet committed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[Entry] = field(default_factory=list)
    rejected: list[dict[str, object]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    precision: str = ""
    num_bytes: int = 0


MapGroups = Callable[[Iterable[Group]], Iterable[EncodedGroup]]


class Encoder:
    """Encodes groups of images; a worker of the engine. Its VAE and its decoding processes stay for
    the next groups."""

    def __init__(self, decode: DecodeConfig, device: str) -> None:
        """Load nothing yet.

        Args:
            decode: Limits of decoding.
            device: Where the VAE runs.
        """
        self._device = device
        self._loaded: tuple[VaeSpec, Vae] | None = None
        self._pool = DecodePool(decode)
        self._pool.__enter__()

    def __call__(self, group: Group) -> EncodedGroup:
        """Encode a group and write its files."""
        vae = self._vae(group.job.vae)
        try:
            if group.check:
                self._check_precision(vae, group)
            return _GroupInWork(group, vae).run(self._crops(group))
        finally:
            vae.free_memory()  # For the next attempt, and for whoever gets the card next.

    def close(self) -> None:
        """Drop the VAE, and end the processes that decode."""
        self._loaded = None
        self._pool.__exit__(None, None, None)

    def load(self, spec: VaeSpec) -> "Vae":
        """Load a VAE."""
        from training.models.vae import Vae

        return Vae.load(
            spec.folder, self._device, precision=spec.precision, tile_above_px=spec.tile_above_px
        )

    def _vae(self, spec: VaeSpec) -> "Vae":
        if self._loaded is None or self._loaded[0] != spec:
            self._loaded = None  # Never two at a time.
            self._loaded = spec, self.load(spec)
        return self._loaded[1]

    def _crops(self, group: Group) -> Iterator["Crop | Rejection"]:
        """The bucket-sized crop of every image in order, or why there is none."""
        job = group.job
        pictures = group.images
        decoded = self._pool.pixels(
            [item.file for item in pictures], [item.image_id for item in pictures]
        )
        for image, pixels in zip(pictures, decoded, strict=True):
            if isinstance(pixels, Rejection):
                yield pixels
                continue
            placement = place_image(image, job.encoding, job.generation, pixels)
            source = None
            if image.image_id in group.showing:
                marked = [box for box, sure in image.watermarks if sure >= job.show_watermarks]
                source = figures.placed_source(pixels, placement, marked)
            yield Crop(image, apply(pixels, placement), placement, source)

    def _check_precision(self, vae: "Vae", group: Group) -> None:
        """Refuse bf16 where the first images of the shard lose by it."""
        first, job = group.check, group.job
        pixels = self._pool.pixels([item.file for item in first], [item.image_id for item in first])
        crops = [
            apply(item, place_image(image, job.encoding, job.generation, item))
            for image, item in zip(first, pixels, strict=True)
            if not isinstance(item, Rejection)
        ]
        if crops:
            vae.check_bf16(crops)


class Crop(NamedTuple):
    """An image as it is encoded."""

    image: KeptImage
    pixels: np.ndarray
    placement: Placement
    source: np.ndarray | None
    """Small, for one that is shown."""


class _GroupInWork:
    """One group while it is encoded."""

    def __init__(self, group: Group, vae: "Vae") -> None:
        self.group, self.vae = group, vae
        self.made = EncodedGroup(precision=vae.precision)

    def run(self, crops: Iterator[Crop | Rejection]) -> EncodedGroup:
        """Encode the crops in batches; non-finite images are rejected, not raised."""
        job, made = self.group.job, self.made
        metadata = {"scaling_factor": repr(self.vae.scaling_factor), "vae": job.vae_digest}
        writer = open_writer(job, self.group.images[0].bucket, metadata)
        columns: dict[str, dict[str, Any]] = {}
        pictures = iter(self.group.images)
        while answers := list(itertools.islice(crops, self.group.size)):
            batch: list[Crop] = []
            for answer, image in zip(answers, pictures, strict=False):
                if isinstance(answer, Rejection):
                    made.rejected.append({**asdict(answer), "image_id": image.image_id})
                else:
                    batch.append(answer)
            self._encode(batch, writer, columns)
        made.files, made.rows = finish(writer, columns)
        return made

    def _encode(
        self, batch: Sequence[Crop], writer: BucketWriter, columns: dict[str, dict[str, Any]]
    ) -> None:
        if not batch:
            return
        job, made = self.group.job, self.made
        encoded = self.vae(
            [crop.pixels for crop in batch], with_log_variance=job.encoding.log_variance
        )
        for crop, row in zip(batch, encoded, strict=True):
            image_id = crop.image.image_id
            if not row.finite:
                made.rejected.append({"image_id": image_id, "reason": Reason.NON_FINITE_LATENTS})
                continue
            writer.add(image_id, row.latents, row.log_variance)
            columns[image_id] = {
                **placement_columns(crop.placement),
                "encoded_in": job.generation,
            }
            if crop.source is not None:
                made.shown.append(self._shown(crop, row.latents))
            made.num_bytes += row.latents.size * 2 * (1 if row.log_variance is None else 2)

    def _shown(self, crop: Crop, latents: np.ndarray) -> Shown:
        import torch

        assert crop.source is not None
        decoded = self.vae.decode(torch.from_numpy(latents)[None])[0]
        return Shown(
            image_id=crop.image.image_id, source=crop.source, crop=crop.pixels, decoded=decoded
        )


def placement_of(row: Mapping[str, Any]) -> Placement:
    """The placement that a row of the table `latents` records."""
    return Placement(
        original=Size(row["original_height"], row["original_width"]),
        resized=Size(row["resized_height"], row["resized_width"]),
        crop_top=row["crop_top"],
        crop_left=row["crop_left"],
        bucket=Size(row["bucket_height"], row["bucket_width"]),
        flip=row["flip"],
        pad_top=row["pad_top"],
        pad_left=row["pad_left"],
    )


def placement_columns(placement: Placement) -> dict[str, Any]:
    """The columns of the table `latents` that record a placement."""
    return {
        "bucket_height": placement.bucket.height,
        "bucket_width": placement.bucket.width,
        "original_height": placement.original.height,
        "original_width": placement.original.width,
        "resized_height": placement.resized.height,
        "resized_width": placement.resized.width,
        "crop_top": placement.crop_top,
        "crop_left": placement.crop_left,
        "pad_top": placement.pad_top,
        "pad_left": placement.pad_left,
        "flip": placement.flip,
    }


def place_image(
    image: KeptImage, encoding: EncodingConfig, generation: int, pixels: np.ndarray | None
) -> Placement:
    """Where an image goes in a generation; `pixels` only for crops that look at them."""
    looks = encoding.crop == "subject" and image.crop_box is None and not image.padded
    limit = encoding.avoid_watermarks
    return place(
        image.original,
        image.bucket,
        image.image_id,
        CropPolicy(
            mode=encoding.crop,
            seed=encoding.seed,
            generation=generation,
            flip=image.flip,
            upscale=encoding.buckets.allow_upscale,
        ),
        CropTarget(
            crop_box=image.crop_box,
            padded=image.padded,
            avoid=[box for box, confidence in image.watermarks if limit and confidence >= limit],
            importance=importance(pixels) if looks and pixels is not None else None,
            resized=image.resized,
        ),
    )


def open_writer(job: EncodeJob, bucket: Size, metadata: Mapping[str, str]) -> BucketWriter:
    """A writer of a bucket's files of this generation."""
    return BucketWriter(
        folder=job.folder,
        generation=job.generation,
        bucket=bucket,
        max_bytes=job.encoding.max_file_bytes,
        codec=job.encoding.codec,
        metadata=metadata,
    )


def finish(
    writer: BucketWriter, columns: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Write what the writer still holds: all of its files, and a row of the table for each of its
    images."""
    writer.finish()
    rows = [
        {"image_id": image_id, "file": file, "row": row, **columns[image_id]}
        for image_id, (file, row) in writer.places.items()
    ]
    return list(writer.entries), rows
