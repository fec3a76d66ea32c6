"""Ingest: what there is (`source_listing`), and which of it is an image (`raw_images`)."""

from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

import dagster as dg
import numpy as np
import polars as pl

from assets.metadata import materialize
from assets.partitions import mirror
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace import missing
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.errors import DataError
from training.images import figures
from training.images.decode_pool import DecodePool, ImageFile
from training.images.measures import Facts
from training.progress import track
from training.sources import absence
from training.sources import source_listing as sources
from training.tables.schemas import TABLES, rejections
from training.tables.table import Reason


def _scan(store: Store, key: str) -> dict[str, str]:
    """Digests of what the sources hold now."""
    return {
        f"source:{source.name}": store.paths.source(source.name).fingerprint()
        for source in store.config.sources
    }


CANDIDATES = ("source", "source_id", "locator", "bytes", "modified_ns", "gone_at")


@Stage(
    version=2,
    scope=Scope.ALL,
    group="ingest",
    also=(Reads("source_listing"),),
    config=lambda config, key: {
        "sources": [source.name for source in config.sources],
        "shard_size": config.shard_size,
    },
    others=_scan,
)
def source_listing(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """Every candidate that the sources ever held, with its own metadata and its shard. Only grows.

    A source that has lost most of its files ends the run, unless people accepted exactly that:
    absence is not deletion.
    """

    def make(key: str) -> Made:
        found, unused = [], []
        for source in store.config.sources:
            listing = store.paths.source(source.name).list()
            found.append(listing.candidates)
            unused += [sources.rejection(source.name, problem) for problem in listing.problems]
        previous = store.read("source_listing")
        listed = (
            pl.concat(found) if found else TABLES["source_listing"].empty().drop("shard", "gone_at")
        )
        losses = absence.losses(previous, listed, [source.name for source in store.config.sources])
        missing.require_accepted(store, losses)
        merged = sources.merge_listing(
            previous, listed, shard_size=store.config.shard_size, now=datetime.now(UTC)
        )
        if merged.is_empty():
            folders = (
                ", ".join(str(store.paths.source_path(source)) for source in store.config.sources)
                or "none"
            )
            raise DataError(
                f"no image file in any source (looked in: {folders}); add images or another [[sources]]"
            )
        rejected = rejections("source_listing", unused)
        num_with_words = sources.num_with_words(listed, store.config.sources)
        num_unmatched = rejected.filter(pl.col("reason") == Reason.SIDECAR_UNMATCHED).height
        report = {
            "numbers": {
                "shards": merged["shard"].n_unique(),
                "gone": merged["gone_at"].is_not_null().sum(),
                "with words": num_with_words,
                "unmatched sidecars": num_unmatched,
                "sidecar problems": rejected.height - num_unmatched,
            },
            "tables": {"not used": unused[:20]},
            "notes": [
                *sources.notes(listed.height, num_with_words, rejected),
                *(f"accepted as missing: {loss}" for loss in losses),
            ],
        }
        return Made(
            frame=merged, rejected=rejected, rows_in=merged.height + rejected.height, report=report
        )

    result = materialize(context, store, source_listing, make)
    missing.settle(store)
    mirror(context.instance, store)
    return result


@Stage(
    version=2,
    scope=Scope.SHARD,
    group="ingest",
    reads=(Reads("source_listing", CANDIDATES, Per.ROWS),),
    config=lambda config, key: config.decode,
    settings="decode",
)
def raw_images(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per file that is an image. All others are in rejected_images, each with its
    reason."""

    def make(key: str) -> Made:
        candidates = store.slices.read(raw_images, "source_listing", key)
        accepted, rejected = read_candidates(store, candidates)
        frame = pl.DataFrame(accepted, schema=TABLES["raw_images"].schema)
        return Made(
            frame=frame,
            rejected=rejections("raw_images", rejected),
            rows_in=candidates.height,
            report={
                "numbers": {"turned upright": int((frame["orientation"] > 1).sum())},
                "pictures": _images(store, frame),
                "tables": {"rejected by reason": _counts(rejected)},
            },
        )

    return materialize(context, store, raw_images, make)


def read_candidates(
    store: Store, candidates: pl.DataFrame
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows of raw_images and rejections for the candidates of one shard: one of them each, in
    order."""
    accepted: list[dict[str, object]] = []
    rejected: list[dict[str, object]] = []
    forgotten = store.tables.forgotten()
    present = candidates.filter(pl.col("gone_at").is_null())
    for row in candidates.filter(pl.col("gone_at").is_not_null()).iter_rows(named=True):
        rejected.append(
            {**_identity(row), "reason": Reason.GONE, "value": row["gone_at"].isoformat()}
        )
    with DecodePool(store.config.decode) as pool:
        facts = track(pool.facts(image_files(store, present)), "images", present.height)
        for row, result in zip(present.iter_rows(named=True), facts, strict=True):
            if not isinstance(result, Facts):
                rejected.append({**_identity(row), **asdict(result)})
            elif result.image_id in forgotten:
                rejected.append(
                    {**_identity(row), "image_id": result.image_id, "reason": Reason.FORGOTTEN}
                )
            else:
                accepted.append({**_identity(row), "locator": row["locator"], **asdict(result)})
    return accepted, rejected


def image_files(store: Store, rows: pl.DataFrame) -> list[ImageFile]:
    """What opens the images of `rows` (source, locator), wherever their sources keep them.

    Raises:
        ConfigError, DataError: a source is missing.
    """
    opened = {name: store.paths.source(name) for name in rows["source"].unique().to_list()}
    return [
        partial(opened[source].open, locator)
        for source, locator in rows.select("source", "locator").iter_rows()
    ]


def _identity(row: dict[str, object]) -> dict[str, object]:
    return {"source": row["source"], "source_id": row["source_id"]}


def _counts(rejected: list[dict[str, object]]) -> list[dict[str, object]]:
    reasons = pl.Series([str(row["reason"]) for row in rejected], dtype=pl.String)
    return [
        {"reason": name, "count": count}
        for name, count in reasons.value_counts(sort=True, name="n").iter_rows()
    ]


def _images(store: Store, frame: pl.DataFrame) -> dict[str, str]:
    """A contact sheet of the first images and the distribution of their sizes."""
    if frame.is_empty():
        return {}
    megapixels = (frame["height"].cast(pl.Float64) * frame["width"] / 1e6).to_list()
    return {
        "thumbnails": thumbnails(store, frame.head(16)),
        "megapixels": figures.histogram(megapixels),
    }


def thumbnails(store: Store, rows: pl.DataFrame, captions: list[str] | None = None) -> str:
    """A contact sheet of the images of `rows` (source, locator) as Markdown; unreadable ones are
    left out."""
    captions = captions or [""] * rows.height
    shown, said = [], []
    with DecodePool(store.config.decode) as pool:
        for pixels, caption in zip(pool.pixels(image_files(store, rows)), captions, strict=True):
            if isinstance(pixels, np.ndarray):
                shown.append(np.asarray(figures.fit(pixels, 96, 96)))
                said.append(caption)
    return figures.contact_sheet(shown, said if any(said) else None)
