"""Encodes the pictures of a shard: place, crop, VAE, write. One call is one generation of one
shard.

Rows of an older generation that are what would be made now are copied, bit for bit, unless the
shard is encoded anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from training.buckets.crops import CropPolicy, CropTarget, apply, place
from training.buckets.geometry import Box, Placement, Size
from training.config.workspace import DecodeConfig, EncodingConfig
from training.errors import DamageError
from training.images import figures
from training.images.decode_pool import DecodePool, ImageFile, Rejection
from training.images.saliency import importance
from training.latents.files import BucketWriter, LatentFile
from training.latents.generations import Generation
from training.manifests import Entry
from training.progress import report
from training.tables.schemas import TABLES
from training.tables.table import Reason

if TYPE_CHECKING:
    from training.models.vae import Vae

NUM_SHOWN = 6
"""Pictures of a shard that are decoded again, shown and measured: those with the smallest ids, a
fair sample."""
_NUM_MARKED = 2
"""Of them, where there are so many: the first with a watermark."""
_COPIED_ROWS = 256
_DEFINING = ("crop", "avoid_watermarks", "precision", "tile_above_px", "log_variance", "seed")
"""Keys of an encoding that decide what a row holds, beside its bucket and its VAE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
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


@dataclass(kw_only=True)
class EncodedShard:
    """One generation of one shard, its files written but not yet committed."""

    frame: pl.DataFrame
    """Rows of the table `latents`."""
    files: tuple[Entry, ...]
    """Latent files, beside the table."""
    rejected: list[dict[str, object]]
    """Pictures that could not be decoded or came out non-finite."""
    num_copied: int = 0
    """Rows taken over from the generation before."""
    batch_size: int = 0
    """Pictures per batch in the end: smaller than asked for after running out of memory; 0 when
    nothing was encoded."""
    precision: str = ""
    """Arithmetic that was used; empty when nothing was encoded."""
    shown: list[Shown] = field(default_factory=list)
    """A sample of what was encoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """What one generation of one shard is made from and goes to."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    generation: int
    """Number of this pass; keys the crops."""
    encoding: EncodingConfig
    """Crop policy, precision, batch size, file size."""
    decode: DecodeConfig
    """Limits of decoding."""
    vae_digest: str
    """Of the VAE's folder; stands in every latent file."""
    load_vae: Callable[[], "Vae"]
    """Called once, and not at all where nothing is to be encoded."""
    previous: Generation | None = None
    """Whose rows may be copied."""
    older: tuple[Generation, ...] = ()
    """The same of images that the previous one lacks, because they were missing then; the newest
    first."""
    show_watermarks: float = 1.0
    """Confidence from which a watermark box is drawn into the shown sources."""


def encode_shard(pictures: Sequence[Picture], job: EncodeJob) -> EncodedShard:
    """Encode `pictures` bucket by bucket, in batches cut by position.

    Args:
        pictures: The shard's kept images that have a bucket.
        job: How, and where to.

    Returns:
        Rows and files: one or more files per bucket and list, of copied and of encoded rows, each
        in the order of their ids. On out-of-memory the whole shard starts again at half the batch
        size, so that equal inputs give equal batches.

    Raises:
        ModelError: bf16 was asked for, and costs quality.
        DamageError: a file of the previous generation is damaged.
    """
    pictures = sorted(pictures, key=lambda item: (item.bucket, item.measured, item.image_id))
    copied, old_files = _copyable(pictures, job)
    fresh = [picture for picture in pictures if picture.image_id not in copied]
    if not fresh:
        return _Attempt(job, None, copied, old_files, 0).run(pictures)
    vae, size = job.load_vae(), job.encoding.batch_size
    while True:
        try:
            return _Attempt(job, vae, copied, old_files, size).run(pictures)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() or size == 1:
                raise
            size //= 2
        finally:
            vae.free_memory()  # before the next attempt, and for whoever gets the card when the shard is done


def _copyable(
    pictures: Sequence[Picture], job: EncodeJob
) -> tuple[dict[str, dict[str, Any]], dict[str, LatentFile]]:
    """Rows by image_id that need not be encoded, and the files that hold them; damaged older
    generations are left."""
    rows: dict[str, dict[str, Any]] = {}
    files: dict[str, LatentFile] = {}
    for generation in () if job.previous is None else (job.previous, *job.older):
        try:
            found = reusable_rows(
                generation, [item for item in pictures if item.image_id not in rows], job.encoding
            )
            opened = generation.open_files() if found else {}
        except DamageError:
            if generation is job.previous:
                raise
            continue
        rows |= found
        files |= opened
    return rows, files


def reusable_rows(
    previous: Generation, pictures: Sequence[Picture], encoding: EncodingConfig
) -> dict[str, dict[str, Any]]:
    """The rows of a generation that an encoding pass would make again, by image_id.

    Placements that are drawn by generation count whatever they are; those that are not must be what
    they would be now. The caller has compared versions, VAEs and `same_policy`.
    """
    rows = {row["image_id"]: row for row in previous.table().iter_rows(named=True)}
    found = {}
    for picture in pictures:
        row = rows.get(picture.image_id)
        if row is None:
            continue
        was, drawn = (
            placement_of(row),
            encoding.crop != "centre" and picture.crop_box is None and not picture.padded,
        )
        same = (was.original, was.bucket, was.flip) == (
            picture.original,
            picture.bucket,
            picture.flip,
        )
        same &= picture.resized in (None, was.resized)
        if same and (_is_padded(was) == picture.padded):
            now = was if drawn else _place(picture, encoding, previous.number, None)
            if now == was:
                found[picture.image_id] = row
    return found


def same_policy(config: Mapping[str, Any], encoding: Mapping[str, Any]) -> bool:
    """Whether two resolved `[encodings.*]` sections make equal rows, apart from buckets."""
    return all(config.get(name) == encoding.get(name) for name in _DEFINING)


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


def _is_padded(placement: Placement) -> bool:
    return (
        placement.resized.height < placement.bucket.height
        or placement.resized.width < placement.bucket.width
    )


def _place(
    picture: Picture, encoding: EncodingConfig, generation: int, pixels: np.ndarray | None
) -> Placement:
    """Where a picture goes in a generation; `pixels` only for crops that look at them."""
    looks = encoding.crop == "subject" and picture.crop_box is None and not picture.padded
    limit = encoding.avoid_watermarks
    return place(
        picture.original,
        picture.bucket,
        picture.image_id,
        CropPolicy(
            mode=encoding.crop,
            seed=encoding.seed,
            generation=generation,
            flip=picture.flip,
            upscale=encoding.buckets.allow_upscale,
        ),
        CropTarget(
            crop_box=picture.crop_box,
            padded=picture.padded,
            avoid=[box for box, confidence in picture.watermarks if limit and confidence >= limit],
            importance=importance(pixels) if looks and pixels is not None else None,
            resized=picture.resized,
        ),
    )


Crop = tuple[Picture, np.ndarray, Placement]


class _Attempt:
    """One attempt at a whole shard with batches of one size."""

    def __init__(
        self,
        job: EncodeJob,
        vae: "Vae | None",
        copied: Mapping[str, dict[str, Any]],
        old_files: Mapping[str, LatentFile],
        size: int,
    ) -> None:
        self.job, self.vae, self.copied, self.old_files, self.size = (
            job,
            vae,
            copied,
            old_files,
            size,
        )
        self.rows: list[dict[str, Any]] = []
        self.files: list[Entry] = []
        self.rejected: list[dict[str, object]] = []
        self.shown: list[Shown] = []
        self.sources: dict[str, np.ndarray] = {}
        self.done = self.num_bytes = 0

    def run(self, pictures: Sequence[Picture]) -> EncodedShard:
        """Work off `pictures`, sorted by bucket, list and id."""
        fresh = [picture for picture in pictures if picture.image_id not in self.copied]
        self.total = len(fresh)
        self.showing = self._sample(fresh)
        groups: dict[tuple[Size, bool], list[Picture]] = {}
        for picture in pictures:
            groups.setdefault((picture.bucket, picture.measured), []).append(picture)
        if self.vae is not None and self.job.encoding.precision == "bf16":
            self._check_precision(fresh)
        with DecodePool(self.job.decode) as pool:
            crops = self._crops(pool, fresh)
            for (bucket, _), group in groups.items():
                self._copy(
                    bucket,
                    [picture.image_id for picture in group if picture.image_id in self.copied],
                )
                self._encode(
                    bucket, sum(picture.image_id not in self.copied for picture in group), crops
                )
            next(crops, None)
        return EncodedShard(
            frame=pl.DataFrame(self.rows, schema=TABLES["latents"].schema),
            files=tuple(self.files),
            rejected=self.rejected,
            num_copied=len(self.copied),
            batch_size=self.size,
            precision="" if self.vae is None else self.vae.precision,
            shown=self.shown,
        )

    def _sample(self, fresh: Sequence[Picture]) -> set[str]:
        """Ids of those to show."""
        sure = self.job.show_watermarks
        marked = [
            item.image_id
            for item in fresh
            if any(confidence >= sure for _, confidence in item.watermarks)
        ]
        first = sorted(marked)[:_NUM_MARKED]
        others = sorted(item.image_id for item in fresh if item.image_id not in first)
        return {*first, *others[: NUM_SHOWN - len(first)]}

    def _crops(self, pool: DecodePool, fresh: Sequence[Picture]) -> Iterator[Crop | None]:
        """The bucket-sized crop of every picture in order; None for one that was rejected."""
        decoded = pool.pixels([item.file for item in fresh], [item.image_id for item in fresh])
        for picture, pixels in zip(fresh, decoded, strict=True):
            if isinstance(pixels, Rejection):
                self.rejected.append({**asdict(pixels), "image_id": picture.image_id})
                yield None
                continue
            placement = _place(picture, self.job.encoding, self.job.generation, pixels)
            if picture.image_id in self.showing:
                self.sources[picture.image_id] = figures.placed_source(
                    pixels,
                    placement,
                    [box for box, sure in picture.watermarks if sure >= self.job.show_watermarks],
                )
            yield picture, apply(pixels, placement), placement

    def _check_precision(self, fresh: Sequence[Picture]) -> None:
        """Refuse bf16 where the first pictures of the shard lose by it."""
        assert self.vae is not None
        first = [picture for picture in fresh if picture.bucket == fresh[0].bucket][:4]
        with DecodePool(self.job.decode) as pool:
            pixels = pool.pixels([item.file for item in first], [item.image_id for item in first])
            crops = [
                apply(item, _place(picture, self.job.encoding, self.job.generation, item))
                for picture, item in zip(first, pixels, strict=True)
                if not isinstance(item, Rejection)
            ]
        if crops:
            self.vae.check_bf16(crops)

    def _writer(self, bucket: Size, metadata: Mapping[str, str]) -> BucketWriter:
        return BucketWriter(
            folder=self.job.folder,
            generation=self.job.generation,
            bucket=bucket,
            max_bytes=self.job.encoding.max_file_bytes,
            codec=self.job.encoding.codec,
            metadata=metadata,
        )

    def _finish(self, writer: BucketWriter, columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what the writer still holds, and a row of the table for each of its images."""
        writer.finish()
        self.files.extend(writer.entries)
        for image_id, (file, row) in writer.places.items():
            self.rows.append({"image_id": image_id, "file": file, "row": row, **columns[image_id]})

    def _copy(self, bucket: Size, image_ids: Sequence[str]) -> None:
        """Copy rows of one bucket; those with and without log-variance go to files of their own."""
        by_file: dict[str, list[str]] = {}
        for image_id in image_ids:
            by_file.setdefault(self.copied[image_id]["file"], []).append(image_id)
        for with_spread in (True, False):
            names = [
                name for name in by_file if self.old_files[name].has_log_variance == with_spread
            ]
            if not names:
                continue
            writer = self._writer(bucket, dict(self.old_files[names[0]].metadata))
            columns: dict[str, dict[str, Any]] = {}
            for name in names:
                for start in range(0, len(by_file[name]), _COPIED_ROWS):
                    part = by_file[name][start : start + _COPIED_ROWS]
                    means, spreads = self.old_files[name].gather(
                        [self.copied[image_id]["row"] for image_id in part]
                    )
                    for number, image_id in enumerate(part):
                        writer.add_bits(
                            image_id, means[number], None if spreads is None else spreads[number]
                        )
                        row = self.copied[image_id]
                        columns[image_id] = {
                            **placement_columns(placement_of(row)),
                            "encoded_in": row["encoded_in"],
                        }
            self._finish(writer, columns)

    def _encode(self, bucket: Size, count: int, crops: Iterator[Crop | None]) -> None:
        """Encode the next `count` crops, all of one bucket; non-finite pictures are rejected, not
        raised."""
        if not count:
            return
        import torch

        assert self.vae is not None
        factor = repr(self.vae.scaling_factor)
        writer = self._writer(bucket, {"scaling_factor": factor, "vae": self.job.vae_digest})
        columns: dict[str, dict[str, Any]] = {}
        for start in range(0, count, self.size):
            wanted = [next(crops) for _ in range(min(self.size, count - start))]
            batch = [item for item in wanted if item is not None]
            pixels = [crop for _, crop, _ in batch]
            encoded = (
                self.vae(pixels, with_log_variance=self.job.encoding.log_variance) if batch else []
            )
            for (picture, crop, placement), row in zip(batch, encoded, strict=True):
                if not row.finite:
                    self.rejected.append(
                        {"image_id": picture.image_id, "reason": Reason.NON_FINITE_LATENTS}
                    )
                    continue
                writer.add(picture.image_id, row.latents, row.log_variance)
                columns[picture.image_id] = {
                    **placement_columns(placement),
                    "encoded_in": self.job.generation,
                }
                if picture.image_id in self.showing:
                    decoded = self.vae.decode(torch.from_numpy(row.latents)[None])[0]
                    source = self.sources.pop(picture.image_id)
                    self.shown.append(
                        Shown(image_id=picture.image_id, source=source, crop=crop, decoded=decoded)
                    )
                self.num_bytes += row.latents.size * 2 * (1 if row.log_variance is None else 2)
            self.done += min(self.size, count - start)
            report("pictures", self.done, self.total, f"{self.num_bytes / 1e6:.1f} MB")
        self._finish(writer, columns)
