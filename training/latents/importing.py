"""Latents of another trainer become a first generation: whose each file is, and whether it is what
it says.

Every file is compared with the image's own placement; a few are decoded and compared with the
images themselves.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from training.buckets.crops import CropPolicy, CropTarget, apply, place
from training.buckets.geometry import Placement
from training.config.workspace import DecodeConfig, EncodingConfig
from training.errors import ConfigError, DataError
from training.images.decode_pool import DecodePool, Rejection
from training.latents import exchange as formats
from training.latents.encoder import KeptImage, placement_columns
from training.latents.exchange import Foreign, Refusal
from training.latents.files import MAX_RECONSTRUCTION_ERROR, BucketWriter
from training.manifests import Entry
from training.tables.schemas import TABLES

if TYPE_CHECKING:
    from training.models.vae import Vae

Format = Literal["kohya", "bigasp"]

NUM_CHECKED = 4
"""Imported images that are decoded and compared with their sources."""


def find_files(folder: Path, kind: Format, index: Path | None) -> dict[str, Path]:
    """Files by the image that they are of: its source_id, or that without its suffix.

    Args:
        folder: Searched with all that is below it.
        kind: Format of the files.
        index: CSV with columns `file` (relative to `folder`) and `source_id`; without it kohya's
            file names tell.

    Raises:
        ConfigError: no such folder, bigASP's files without an index, or an index that cannot be
            read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")
    if index is not None:
        return {
            source_id: folder / file
            for file, source_id in _indexed(index)
            if (folder / file).is_file()
        }
    if kind == "bigasp":
        raise ConfigError(
            "bigASP's files are named by a database: --index CSV with columns file,source_id must say whose"
        )
    found = {}
    for path in sorted(folder.rglob("*")):
        stem = formats.kohya_stem(path.relative_to(folder).as_posix())
        if path.is_file() and stem is not None:
            found[stem] = path
    return found


@dataclass(kw_only=True)
class LatentImport:
    """An import under way: what it reads by, and what became of the kept images so far."""

    files: Mapping[str, Path]
    """As `find_files` returns them."""
    kind: Format
    """Format of the files."""
    encoding: EncodingConfig
    """What the files become."""
    vae: "Vae"
    """The encoding's; its scaling is taken for the files'."""
    vae_digest: str
    """Of the VAE's folder; stands in every latent file."""
    num_images: int = 0
    """Taken over."""
    refused: Counter[str] = field(default_factory=Counter)
    """The others, by reason."""
    _checked: list[tuple[KeptImage, Placement, np.ndarray]] = field(
        default_factory=list, init=False
    )

    def shard(
        self, folder: Path, pictures: Sequence[KeptImage], names: Mapping[str, str]
    ) -> tuple[pl.DataFrame, tuple[Entry, ...]]:
        """Write the latent files of one shard, uncommitted; images without a usable file are
        counted by reason.

        Args:
            folder: `latents/<encoding>/<shard>`.
            images: The shard's kept images that have a bucket.
            names: image_id -> source_id.

        Returns:
            Rows of the table `latents`, and the files.
        """
        rows: list[dict[str, Any]] = []
        entries: list[Entry] = []
        ordered = sorted(pictures, key=lambda item: (item.bucket, item.measured, item.image_id))
        for (bucket, _), members in groupby(ordered, key=lambda item: (item.bucket, item.measured)):
            writer = BucketWriter(
                folder=folder, generation=1, bucket=bucket, max_bytes=self.encoding.max_file_bytes,
                codec=self.encoding.codec,
                metadata={"scaling_factor": repr(self.vae.scaling_factor), "vae": self.vae_digest},
            )  # fmt: skip
            columns: dict[str, dict[str, Any]] = {}
            for image in members:
                taken = self._take(image, names[image.image_id])
                if isinstance(taken, Refusal):
                    self.refused[taken] += 1
                    continue
                foreign, placement = taken
                writer.add(image.image_id, foreign.latents, None)
                columns[image.image_id] = {**placement_columns(placement), "encoded_in": 1}
                if len(self._checked) < NUM_CHECKED:
                    self._checked.append((image, placement, foreign.latents))
            writer.finish()
            entries += writer.entries
            for image_id, (file, row) in writer.places.items():
                rows.append({"image_id": image_id, "file": file, "row": row, **columns[image_id]})
        self.num_images += len(rows)
        return pl.DataFrame(rows, schema=TABLES["latents"].schema), tuple(entries)

    def check(self, decode: DecodeConfig) -> float:
        """Decode the first few and compare them with their images.

        Returns:
            Mean absolute difference, 0-255; 0 where no image could be read.

        Raises:
            DataError: nothing was taken over; or they differ by more than latents and their own
                crops do, being of another VAE, another scale or other images.
        """
        import torch

        if not self._checked:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.most_common())
            raise DataError(
                f"none of {len(self.files)} files fits an image ({reasons}): nothing was imported"
            )
        errors = []
        with DecodePool(decode) as pool:
            found = pool.pixels(
                [image.file for image, _, _ in self._checked],
                [image.image_id for image, _, _ in self._checked],
            )
            for (_, placement, values), source in zip(self._checked, found, strict=True):
                if not isinstance(source, Rejection):
                    decoded = self.vae.decode(torch.from_numpy(values)[None])[0]
                    errors.append(
                        float(np.abs(apply(source, placement).astype(np.int16) - decoded).mean())
                    )
        error = float(np.mean(errors)) if errors else 0.0
        if error > MAX_RECONSTRUCTION_ERROR:
            raise DataError(
                f"{len(errors)} imported images differ from what their latents decode to by {error:.1f} of 255, "
                f"limit {MAX_RECONSTRUCTION_ERROR:g}: the files are of another VAE, another scale or other images; "
                "nothing was imported"
            )
        return error

    def _take(self, image: KeptImage, source_id: str) -> tuple[Foreign, Placement] | Refusal:
        """The latents of an image and the placement that made them, or why not."""
        path = self.files.get(source_id) or self.files.get(str(Path(source_id).with_suffix("")))
        if path is None:
            return Refusal.NO_FILE
        try:
            foreign = (
                formats.read_bigasp(path, image.original)
                if self.kind == "bigasp"
                else formats.read_kohya(path, self.vae.scaling_factor)
            )
        except DataError:
            return Refusal.UNREADABLE
        wanted = place(
            image.original,
            image.bucket,
            image.image_id,
            CropPolicy(mode="centre", seed=0, generation=1, flip=image.flip, upscale=True),
            CropTarget(padded=image.padded, resized=image.resized),
        )
        placement = formats.fit(foreign, wanted, self.vae.scale)
        return placement if isinstance(placement, Refusal) else (foreign, placement)


def _indexed(index: Path) -> list[tuple[str, str]]:
    """File and source_id of each line of a CSV."""
    try:
        with index.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--index {index} cannot be read: {error}") from None
    if not rows or not {"file", "source_id"} <= rows[0].keys():
        raise ConfigError(
            f"--index {index} must be a CSV with columns file and source_id and at least one row"
        )
    return [(row["file"], row["source_id"]) for row in rows]
