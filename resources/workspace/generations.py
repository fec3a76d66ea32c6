"""Generations of latents in a workspace: which there are, which are the oldest, and which no one
needs any more."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from resources.workspace.store import Store
from training.commit import sync_folder
from training.errors import DamageError
from training.latents.generations import generations
from training.latents.source import LatentSource
from training.manifests import Entry, read_manifest
from training.names import GenerationName, ShardKey
from training.progress import track
from training.runs import run_folder
from training.runs.event_log import has_finished
from training.runs.training_set import shards_of

REENCODE_TAG = "foundry/reencode"
"""Tag of a run that writes the next generation although the present one is current."""
DEADLINE_TAG = "foundry/reencode_until"
"""Second of the Unix clock after which such a run begins no shard."""
GRACE_S = 600.0
"""A generation stays for this long after the one that replaced it: a trainer may just be
choosing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One committed generation of one shard."""

    encoding: str
    shard: str
    generation: int
    current: bool
    """The shard's highest."""
    encoded_at: datetime
    """UTC."""
    images: int
    num_bytes: int
    """Of its latent files and its table."""

    @property
    def part(self) -> str:
        """The partition, `<encoding>|<shard>`."""
        return str(ShardKey(self.encoding, self.shard))


def listed(store: Store) -> list[Encoded]:
    """All committed generations, by encoding, shard and number; damaged manifests are left to
    `verify`."""
    found = []
    for part in store.tables.parts("latents"):
        encoding, shard = ShardKey.parse(part)
        folder = store.tables.folder("latents", part)
        numbers = generations(folder)
        for number in numbers:
            try:
                manifest = read_manifest(folder / GenerationName(number).manifest)
            except DamageError:
                continue
            assert manifest is not None
            found.append(
                Encoded(
                    encoding=encoding,
                    shard=shard,
                    generation=number,
                    current=number == numbers[-1],
                    encoded_at=datetime.strptime(
                        manifest.provenance["time"], "%Y-%m-%dT%H:%M:%SZ"
                    ).replace(tzinfo=UTC),
                    images=manifest.rows,
                    num_bytes=sum(entry.bytes for entry in manifest.files),
                )
            )
    return found


def table(store: Store) -> pl.DataFrame:
    """`listed` as the view `latent_generations` shows it."""
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "encoding": pl.String, "shard": pl.String, "generation": pl.Int32, "current": pl.Boolean,
        "encoded_at": pl.Datetime("us", "UTC"), "images": pl.Int64, "bytes": pl.Int64,
    }  # fmt: skip
    rows = [
        (
            item.encoding,
            item.shard,
            item.generation,
            item.current,
            item.encoded_at,
            item.images,
            item.num_bytes,
        )
        for item in listed(store)
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


def oldest(
    store: Store, encoding: str | None = None, *, num_shards: int = 0, min_age_s: float = 0.0
) -> list[Encoded]:
    """The current generations to encode anew, the oldest first.

    Args:
        store: The workspace.
        encoding: Only this one.
        num_shards: At most so many of each encoding; 0 for all.
        min_age_s: Younger ones stay.
    """
    now = datetime.now(UTC)
    known = set(store.config.encodings) if encoding is None else {encoding}
    chosen: list[Encoded] = []
    for name in sorted(known):
        old = [
            item
            for item in listed(store)
            if item.current
            and item.encoding == name
            and (now - item.encoded_at).total_seconds() >= min_age_s
        ]
        old.sort(key=lambda item: (item.encoded_at, item.generation, item.shard))
        chosen += old[: num_shards or None]
    return chosen


def collect(
    store: Store, part: str | None = None, *, min_age_s: float = GRACE_S
) -> tuple[list[Path], int]:
    """Remove generations that no one needs any more: manifest first, then content.

    Kept are the current one of each shard; what the current epoch or a kept checkpoint of an
    unfinished run reads; what such a run took along in a bundle, whose epochs are not known here;
    and what it would choose at its next epoch, because a newer generation may lack images of its
    set.

    Args:
        store: The workspace.
        part: Only this shard's.
        min_age_s: A generation stays for so long after it was replaced.

    Returns:
        The manifests removed, and the bytes.
    """
    needed = set(_needed(store))
    removed, total = [], 0
    found = listed(store)
    for item in track(found, "generations", len(found)):
        folder = store.tables.folder("latents", item.part)
        path = folder / f"g{item.generation:04d}.json"
        if item.current or path in needed or (part is not None and item.part != part):
            continue
        successor = min(number for number in generations(folder) if number > item.generation)
        if time.time() - (folder / GenerationName(successor).manifest).stat().st_mtime < min_age_s:
            continue
        manifest = read_manifest(path)
        assert manifest is not None
        others = (number for number in generations(folder) if number != item.generation)
        kept = {entry.name for number in others for entry in _files(folder, number)}
        path.unlink()
        sync_folder(folder)
        for entry in manifest.files:
            if entry.name not in kept:
                (folder / entry.name).unlink(missing_ok=True)
                total += entry.bytes
        removed.append(path)
    return removed, total


def _files(folder: Path, number: int) -> tuple[Entry, ...]:
    manifest = read_manifest(folder / GenerationName(number).manifest)
    return () if manifest is None else manifest.files


def _needed(store: Store) -> Iterator[Path]:
    """Manifests that an unfinished run reads, or would choose."""
    for path in sorted((store.home / "runs").glob(f"*/{run_folder.INPUTS}")):
        if has_finished(path.parent / run_folder.EVENTS):
            continue
        inputs = run_folder.read_inputs(path.parent)
        for pins in run_folder.pinned_latents(path.parent):
            for shard, pin in pins.items():
                yield inputs.latents / shard / GenerationName(pin["generation"]).manifest
        for shard, numbers in run_folder.bundled_latents(path.parent).items():
            yield from (
                inputs.latents / shard / GenerationName(number).manifest for number in numbers
            )
        samples = shards_of(inputs.training_set)
        source = LatentSource(inputs.latents, vae_digest=inputs.vae_digest)
        for (shard,), rows in samples.group_by("shard"):
            generation, _, _ = source.choose(str(shard), rows["image_id"].to_list())
            if generation is not None:
                yield generation.folder / generation.name.manifest
