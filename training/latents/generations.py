"""Generations of latents: the encoding passes of one shard, each with a manifest and latent files of its own."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from training import commit, manifests
from training.buckets.geometry import Size
from training.errors import DamageError
from training.latents.files import BucketWriter, Codec, LatentFile
from training.names import GenerationName
from training.tables.schemas import TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One encoding pass over a shard, as committed."""

    folder: Path
    """`latents/<encoding>/<shard>`."""
    number: int
    """Higher is newer."""
    manifest: manifests.Manifest
    """Its commit."""

    @property
    def name(self) -> GenerationName:
        """`g0003`."""
        return GenerationName(self.number)

    def table(self) -> pl.DataFrame:
        """The rows of the table `latents`.

        Raises:
            DamageError: the Parquet file does not match the manifest.
        """
        entry = next(entry for entry in self.manifest.files if entry.name.endswith(".parquet"))
        manifests.check_entry(self.folder, entry)
        return manifests.read_parquet(self.folder / entry.name).select(
            list(TABLES["latents"].columns)
        )

    def open_files(self) -> dict[str, LatentFile]:
        """Its latent files by name, checked by size and header.

        Raises:
            DamageError: one of them is gone, cut or foreign.
        """
        entries = [entry for entry in self.manifest.files if entry.name.endswith(".safetensors")]
        return {entry.name: LatentFile(self.folder, entry) for entry in entries}


def write_without(generation: Generation, image_ids: Collection[str]) -> manifests.Manifest:
    """Write the files of a generation again that hold one of the images, without those; nothing is
    committed.

    Returns:
        Its manifest as it must become. Files that only the old one names may be deleted after that.

    Raises:
        DamageError: a file of it is gone or damaged.
    """
    table, folder = generation.table(), generation.folder
    listed = pl.col("image_id").is_in(list(image_ids))
    kept, stale = table.filter(~listed), set(table.filter(listed)["file"])
    entries: list[manifests.Entry] = []
    for entry in generation.manifest.files:
        if entry.name not in stale:
            entries += [] if entry.name.endswith(".parquet") else [entry]
            continue
        rows, file = (
            kept.filter(pl.col("file") == entry.name).sort("row"),
            LatentFile(folder, entry),
        )
        if rows.is_empty():
            continue
        metadata = {name: value for name, value in file.metadata.items() if name != "codec"}
        bucket = Size(*rows.select("bucket_height", "bucket_width").row(0))
        codec: Codec = "split-zstd" if file.metadata.get("codec") == "split-zstd" else "raw"
        writer = BucketWriter(
            folder=folder, generation=generation.number, bucket=bucket,
            max_bytes=4 * entry.bytes, codec=codec,
            metadata=metadata,
        )  # fmt: skip
        latents, log_variance = file.gather(rows["row"].to_list())
        for number, image_id in enumerate(rows["image_id"]):
            spread = None if log_variance is None else log_variance[number]
            writer.add_bits(image_id, latents[number], spread)
        writer.finish()
        entries += writer.entries
        places = pl.DataFrame(
            {"image_id": list(writer.places), "file": [f for f, _ in writer.places.values()],
             "row": [row for _, row in writer.places.values()]},
            schema={name: table.schema[name] for name in ("image_id", "file", "row")},
        )  # fmt: skip
        kept = kept.update(places, on="image_id")
    kept = TABLES["latents"].conform(kept)
    digests = commit.column_digests(kept)
    first = manifests.write_parquet(folder, str(generation.name), kept)
    return dataclasses.replace(
        generation.manifest,
        files=(first, *entries),
        rows=kept.height,
        columns=digests,
        digest=commit.logical_digest(digests, kept.height),
        report={**generation.manifest.report, "pictures": {}},
    )


def generations(folder: Path) -> list[int]:
    """Numbers of the committed generations of a shard's folder, oldest first; a missing folder has
    none."""
    if not folder.is_dir():
        return []
    names = (GenerationName.of_manifest(path.name) for path in folder.iterdir())
    return sorted(name.number for name in names if name)


def read_generation(folder: Path, number: int) -> Generation:
    """The committed generation `number`.

    Raises:
        DamageError: there is no such manifest, or it is damaged.
    """
    manifest = manifests.read_manifest(folder / GenerationName(number).manifest)
    if manifest is None:
        raise DamageError(f"{folder} has no generation {number}; it has {generations(folder)}")
    return Generation(folder=folder, number=number, manifest=manifest)
