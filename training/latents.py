"""Encodes the pictures of a shard: place, crop, VAE, write. One call is one generation of one shard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from training.commit import Entry
from training.config import DecodeConfig, EncodingConfig
from training.data.crops import apply, place
from training.data.decode_pool import DecodePool, Rejection
from training.data.geometry import Box, Placement, Size
from training.data.latent_files import BucketWriter
from training.data.tables import TABLES, Reason
from training.progress import track

if TYPE_CHECKING:
    from training.models.vae import Vae

NUM_SHOWN = 4


@dataclass(kw_only=True)
class EncodedShard:
    """One generation of one shard, its files written but not yet committed."""

    frame: pl.DataFrame
    """Rows of the table `latents`."""
    files: tuple[Entry, ...]
    """Latent files, beside the table."""
    rejected: list[dict[str, object]]
    """Pictures that could not be decoded or came out non-finite."""
    shown: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    """A few: image_id, the crop that was encoded, its decoded latents; uint8 (H, W, 3)."""
    mean_error: float = 0.0
    """Mean absolute difference of crop and reconstruction over the shown, 0-255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A kept image with what its crop follows from."""

    image_id: str
    path: Path
    original: Size
    bucket: Size
    flip: bool
    crop_box: Box | None


def encode_shard(
    pictures: Sequence[Picture],
    *,
    folder: Path,
    generation: int,
    encoding: EncodingConfig,
    decode: DecodeConfig,
    load_vae: Callable[[], "Vae"],
) -> EncodedShard:
    """Encode `pictures` bucket by bucket, in batches cut by position within the bucket.

    Args:
        pictures: The shard's kept images.
        folder: Where latent files go: `latents/<encoding>/<shard>`.
        generation: Number of this pass; keys the crops.
        encoding: Crop policy, batch size, file size.
        decode: Limits of decoding.
        load_vae: Loads the VAE; called once, and not at all for an empty shard.

    Returns:
        Rows and files in the order of (bucket, image_id). On out-of-memory the whole shard starts again at half the
        batch size, so that equal inputs give equal batches.
    """
    groups: dict[Size, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda item: (item.bucket, item.image_id)):
        groups.setdefault(picture.bucket, []).append(picture)
    if not groups:
        return EncodedShard(frame=TABLES["latents"].empty(), files=(), rejected=[])
    vae, size = load_vae(), encoding.batch_size
    while True:
        try:
            return _encode(groups, folder, generation, encoding, decode, vae, size)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() or size == 1:
                raise
            size //= 2


def _encode(
    groups: Mapping[Size, list[Picture]],
    folder: Path,
    generation: int,
    encoding: EncodingConfig,
    decode: DecodeConfig,
    vae: "Vae",
    size: int,
) -> EncodedShard:
    """One attempt at a whole shard with batches of `size`."""
    rows: list[dict[str, Any]] = []
    files: list[Entry] = []
    rejected: list[dict[str, object]] = []
    result = EncodedShard(frame=TABLES["latents"].empty(), files=(), rejected=rejected)
    with DecodePool(decode) as pool:
        crops = track(_crops(groups, pool, encoding, generation, rejected), "pictures", sum(map(len, groups.values())))
        for bucket, pictures in groups.items():
            writer = BucketWriter(
                folder=folder, generation=generation, bucket=bucket, max_bytes=encoding.max_file_bytes
            )
            placements: dict[str, Placement] = {}
            for start in range(0, len(pictures), size):
                wanted = [next(crops) for _ in pictures[start : start + size]]
                batch = [item for item in wanted if item is not None]
                if batch:
                    _encode_batch(batch, vae, encoding, writer, placements, result)
            writer.finish()
            files.extend(writer.entries)
            rows.extend(_row(image_id, *writer.places[image_id], placements[image_id]) for image_id in writer.places)
        next(crops, None)
    result.frame = pl.DataFrame(rows, schema=TABLES["latents"].schema)
    result.files = tuple(files)
    result.mean_error = float(
        np.mean([np.abs(crop.astype(np.int16) - decoded).mean() for _, crop, decoded in result.shown] or [0.0])
    )
    return result


def _crops(
    groups: Mapping[Size, list[Picture]],
    pool: DecodePool,
    encoding: EncodingConfig,
    generation: int,
    rejected: list[dict[str, object]],
) -> Iterator[tuple[str, np.ndarray, Placement] | None]:
    """The bucket-sized crop of every picture in order; None for one that was rejected."""
    pictures = [picture for group in groups.values() for picture in group]
    decoded = pool.pixels([item.path for item in pictures], [item.image_id for item in pictures])
    for picture, pixels in zip(pictures, decoded, strict=True):
        if isinstance(pixels, Rejection):
            rejected.append({**asdict(pixels), "image_id": picture.image_id})
            yield None
            continue
        placement = place(
            picture.original, picture.bucket, mode=encoding.crop, seed=encoding.seed, generation=generation,
            image_id=picture.image_id, flip=picture.flip, crop_box=picture.crop_box,
        )  # fmt: skip
        yield picture.image_id, apply(pixels, placement), placement


def _encode_batch(
    batch: list[tuple[str, np.ndarray, Placement]],
    vae: "Vae",
    encoding: EncodingConfig,
    writer: BucketWriter,
    placements: dict[str, Placement],
    result: EncodedShard,
) -> None:
    """Encode one batch into the bucket's writer; non-finite pictures are rejected, not raised."""
    import torch

    encoded = vae([crop for _, crop, _ in batch], with_log_variance=encoding.log_variance)
    for (image_id, crop, placement), row in zip(batch, encoded, strict=True):
        if not row.finite:
            result.rejected.append({"image_id": image_id, "reason": Reason.NON_FINITE_LATENTS})
            continue
        writer.add(image_id, row.latents, row.log_variance)
        placements[image_id] = placement
        if len(result.shown) < NUM_SHOWN:
            result.shown.append((image_id, crop, vae.decode(torch.from_numpy(row.latents)[None])[0]))


def _row(image_id: str, file: str, row: int, placement: Placement) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "file": file,
        "row": row,
        "bucket_height": placement.bucket.height,
        "bucket_width": placement.bucket.width,
        "original_height": placement.original.height,
        "original_width": placement.original.width,
        "resized_height": placement.resized.height,
        "resized_width": placement.resized.width,
        "crop_top": placement.crop_top,
        "crop_left": placement.crop_left,
        "flip": placement.flip,
    }
