"""Encodes the images of a shard: place, crop, VAE, write. One call is one generation of one
shard.

Rows of an older generation that are what would be made now are copied, bit for bit, unless the
shard is encoded anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from training.buckets.geometry import Placement, Size
from training.config.workspace import EncodingConfig
from training.errors import DamageError
from training.latents.encoder import (
    EncodedGroup,
    EncodeJob,
    Group,
    KeptImage,
    MapGroups,
    Shown,
    finish,
    open_writer,
    place_image,
    placement_columns,
    placement_of,
)
from training.latents.files import LatentFile
from training.latents.generations import Generation
from training.manifests import Entry
from training.progress import report
from training.tables.schemas import TABLES

NUM_SHOWN = 6
"""Images of a shard that are decoded again, shown and measured: those with the smallest ids, a
fair sample."""
_NUM_MARKED = 2
"""Of them, where there are so many: the first with a watermark."""
_COPIED_ROWS = 256
_DEFINING = ("crop", "avoid_watermarks", "precision", "tile_above_px", "log_variance", "seed")
"""Keys of an encoding that decide what a row holds, beside its bucket and its VAE."""


@dataclass(kw_only=True)
class EncodedShard:
    """One generation of one shard, its files written but not yet committed."""

    frame: pl.DataFrame
    """Rows of the table `latents`."""
    files: tuple[Entry, ...]
    """Latent files, beside the table."""
    rejected: list[dict[str, object]]
    """Images that could not be decoded or came out non-finite."""
    num_copied: int = 0
    """Rows taken over from the generation before."""
    batch_size: int = 0
    """Images per batch in the end: smaller than asked for after running out of memory; 0 when
    nothing was encoded."""
    precision: str = ""
    """Arithmetic that was used; empty when nothing was encoded."""
    shown: list[Shown] = field(default_factory=list)
    """A sample of what was encoded."""


def encode_shard(
    images: Sequence[KeptImage], job: EncodeJob, map_groups: MapGroups
) -> EncodedShard:
    """Encode `images` bucket by bucket, in batches cut by position.

    Args:
        images: The shard's kept images that have a bucket.
        job: How, and where to.
        map_groups: Maps an `Encoder` over groups, in their order: the engine.

    Returns:
        Rows and files: one or more files per bucket and list, of copied and of encoded rows, each
        in the order of their ids. On out-of-memory the whole shard starts again at half the batch
        size, so that equal inputs give equal batches.

    Raises:
        ModelError: bf16 was asked for, and costs quality.
        DamageError: a file of the previous generation is damaged.
    """
    images = sorted(images, key=lambda item: (item.bucket, item.measured, item.image_id))
    copied, old_files = _copyable(images, job)
    size = job.encoding.batch_size
    while True:
        try:
            return _Attempt(job, copied, old_files, size).run(images, map_groups)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() or size == 1:
                raise
            size //= 2


def _copyable(
    images: Sequence[KeptImage], job: EncodeJob
) -> tuple[dict[str, dict[str, Any]], dict[str, LatentFile]]:
    """Rows by image_id that need not be encoded, and the files that hold them; damaged older
    generations are left."""
    rows: dict[str, dict[str, Any]] = {}
    files: dict[str, LatentFile] = {}
    for generation in () if job.previous is None else (job.previous, *job.older):
        try:
            found = reusable_rows(
                generation, [item for item in images if item.image_id not in rows], job.encoding
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
    previous: Generation, images: Sequence[KeptImage], encoding: EncodingConfig
) -> dict[str, dict[str, Any]]:
    """The rows of a generation that an encoding pass would make again, by image_id.

    Placements that are drawn by generation count whatever they are; those that are not must be what
    they would be now. The caller has compared versions, VAEs and `same_policy`.
    """
    rows = {row["image_id"]: row for row in previous.table().iter_rows(named=True)}
    found = {}
    for image in images:
        row = rows.get(image.image_id)
        if row is None:
            continue
        was, drawn = (
            placement_of(row),
            encoding.crop != "centre" and image.crop_box is None and not image.padded,
        )
        same = (was.original, was.bucket, was.flip) == (
            image.original,
            image.bucket,
            image.flip,
        )
        same &= image.resized in (None, was.resized)
        if same and (_is_padded(was) == image.padded):
            now = was if drawn else place_image(image, encoding, previous.number, None)
            if now == was:
                found[image.image_id] = row
    return found


def same_policy(config: Mapping[str, Any], encoding: Mapping[str, Any]) -> bool:
    """Whether two resolved `[encodings.*]` sections make equal rows, apart from buckets."""
    return all(config.get(name) == encoding.get(name) for name in _DEFINING)


def _is_padded(placement: Placement) -> bool:
    return (
        placement.resized.height < placement.bucket.height
        or placement.resized.width < placement.bucket.width
    )


class _Attempt:
    """One attempt at a whole shard with batches of one size."""

    def __init__(
        self,
        job: EncodeJob,
        copied: Mapping[str, dict[str, Any]],
        old_files: Mapping[str, LatentFile],
        size: int,
    ) -> None:
        self.job, self.copied, self.old_files, self.size = job, copied, old_files, size
        self.made = EncodedGroup()
        self.done = 0

    def run(self, images: Sequence[KeptImage], map_groups: MapGroups) -> EncodedShard:
        """Work off `images`, sorted by bucket, list and id."""
        fresh = [image for image in images if image.image_id not in self.copied]
        members: dict[tuple[Size, bool], list[KeptImage]] = {}
        for image in images:
            members.setdefault((image.bucket, image.measured), []).append(image)
        encoded = iter(map_groups(self._groups(members, fresh)))
        for (bucket, _), group in members.items():
            copied = [item.image_id for item in group if item.image_id in self.copied]
            self._copy(bucket, copied)
            if len(copied) < len(group):
                self._add(next(encoded), len(group) - len(copied), len(fresh))
        next(encoded, None)  # Ends the map.
        return EncodedShard(
            frame=pl.DataFrame(self.made.rows, schema=TABLES["latents"].schema),
            files=tuple(self.made.files),
            rejected=self.made.rejected,
            num_copied=len(self.copied),
            batch_size=self.size if fresh else 0,
            precision=self.made.precision,
            shown=self.made.shown,
        )

    def _groups(
        self, members: Mapping[tuple[Size, bool], list[KeptImage]], fresh: Sequence[KeptImage]
    ) -> list[Group]:
        """What is to be encoded, in the order of buckets and lists."""
        job = replace(self.job, previous=None, older=())
        showing = frozenset(self._sample(fresh))
        check: list[KeptImage] = []
        if fresh and job.encoding.precision == "bf16":
            check = [image for image in fresh if image.bucket == fresh[0].bucket][:4]
        groups: list[Group] = []
        for group in members.values():
            if left := [item for item in group if item.image_id not in self.copied]:
                groups.append(
                    Group(job=job, images=left, size=self.size, showing=showing, check=check)
                )
                check = []
        return groups

    def _add(self, made: EncodedGroup, num_images: int, total: int) -> None:
        """Take over what was made of a group."""
        self.made.rows += made.rows
        self.made.files += made.files
        self.made.rejected += made.rejected
        self.made.shown += made.shown
        self.made.precision = made.precision
        self.made.num_bytes += made.num_bytes
        self.done += num_images
        report("images", self.done, total, f"{self.made.num_bytes / 1e6:.1f} MB")

    def _sample(self, fresh: Sequence[KeptImage]) -> set[str]:
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
            writer = open_writer(self.job, bucket, dict(self.old_files[names[0]].metadata))
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
            files, rows = finish(writer, columns)
            self.made.files += files
            self.made.rows += rows
