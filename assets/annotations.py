"""Annotators: one decode per picture feeds embeddings, tags and watermark boxes; captions come from
sidecars."""

import time
from collections.abc import Iterator
from functools import partial

import dagster as dg
import polars as pl

from assets.metadata import partition_keys, shown
from assets.raw_images import image_files, thumbnails
from resources import devices, engine
from resources.graph import Per, Reads, Scope, Stage
from resources.warehouse import rebuild
from resources.workspace import kept_rows, reading
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.annotators.annotations import ROWS, Annotator, failures
from training.commit import json_digest
from training.curation.captions import from_sources
from training.errors import DataError
from training.images import figures
from training.manifests import Manifest
from training.progress import track
from training.tables.schemas import rejections

PICTURES = Reads("raw_images", ("image_id", "source", "source_id", "locator"), Per.SHARD)
_FILLED = {"embeddings": ["vector", "projection"], "tags": ["tags"], "watermark_boxes": ["boxes"]}


def annotations(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> Iterator[dg.MaterializeResult]:
    """Decode each picture once and show it to every annotator whose rows are stale."""
    wanted = [STAGES[asset.to_user_string()] for asset in sorted(context.selected_asset_keys)]
    digests: dict[str, dict[str, str]] = {stage.name: {} for stage in wanted}
    for key in partition_keys(context, store, wanted[0]):
        for stage, manifest in _bring_up_to_date(context, store, wanted, key):
            digests[stage.name][key] = manifest.digest
            context.add_asset_metadata(
                shown(manifest, store, partitioned=True), asset_key=stage.name, partition_key=key
            )
    rebuild(store)
    for stage in wanted:
        found = digests[stage.name]
        version = next(iter(found.values())) if len(found) == 1 else json_digest(found)
        yield dg.MaterializeResult(asset_key=stage.name, data_version=dg.DataVersion(version))


def _known(table: str) -> tuple[Reads, ...]:
    """Rows that a network wrote before: its own, and those of images that were missing."""
    return Reads(table, per=Per.SHARD), Reads(f"kept_{table}", per=Per.SHARD)


EMBEDDINGS = Stage(
    name="embeddings",
    description="One row per picture: what CLIP's vision tower sees, before and after its projection.",
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    kinds=("pytorch", "huggingface"),
    reads=(PICTURES,),
    also=_known("embeddings"),
    config=lambda config, key: {"batch_size": config.annotate.batch_size},
    settings="annotate",
    models=("clip",),
    model="clip",
)(annotations)
TAGS = Stage(
    name="tags",
    description="One row per picture: the tagger's names above a low floor. Thresholds come later.",
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    kinds=("pytorch",),
    reads=(PICTURES,),
    also=_known("tags"),
    config=lambda config, key: {"batch_size": config.annotate.batch_size},
    settings="annotate",
    models=("tagger",),
    model="tagger",
)(annotations)
WATERMARKS = Stage(
    name="watermark_boxes",
    description="One row per picture: boxes of `a watermark` by OWLv2; an empty list means none found.",
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    kinds=("pytorch", "huggingface"),
    reads=(PICTURES,),
    also=_known("watermark_boxes"),
    config=lambda config, key: config.annotate,
    settings="annotate",
    models=("detector",),
    model="detector",
)(annotations)
CAPTIONS = Stage(
    name="captions",
    description="One row per picture: the sentence its sidecar holds, or null.",
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    reads=(
        Reads("raw_images", ("image_id", "source", "source_id"), Per.SHARD),
        Reads("source_listing", ("source", "source_id", "caption"), Per.ROWS),
    ),
    model="sidecar",
)(annotations)
STAGES = {stage.name: stage for stage in (EMBEDDINGS, TAGS, WATERMARKS, CAPTIONS)}
NETWORKS = (EMBEDDINGS, TAGS, WATERMARKS)


def _bring_up_to_date(
    context: dg.AssetExecutionContext, store: Store, wanted: list[Stage], key: str
) -> list[tuple[Stage, Manifest]]:
    """Make the stale ones of the wanted tables for one shard, under one lock, in one pass over its
    pictures."""
    with store.writer.holding("annotations", key):
        bases = {stage.name: store.currency.basis(stage, key) for stage in wanted}
        if None in bases.values():
            raise DataError(
                f"annotations {key}: raw_images {key} is not committed yet; run that first"
            )
        stale = [stage for stage in wanted if not store.currency.is_current(stage, key)]
        for stage in stale:
            store.currency.begin(stage, key, bases[stage.name] or {})
        started = time.monotonic()
        made: dict[str, Made] = {}
        if networks := [stage for stage in stale if stage in NETWORKS]:
            with reading.at_work(*networks):
                made.update(_annotate(store, networks, key))
        if CAPTIONS in stale:
            with reading.at_work(CAPTIONS):
                made["captions"] = _captions(store, key)
        for stage in stale:
            basis = bases[stage.name]
            assert basis is not None
            manifest = store.writer.commit(
                stage, key, made[stage.name], basis, seconds=time.monotonic() - started
            )
            context.log.info(
                f"{stage.name} {key}: {manifest.rows} rows, digest {manifest.digest[:12]}"
            )
        store.writer.clear_partial("annotations", key)
        found = [(stage, store.manifest(stage.table, stage.part(key))) for stage in wanted]
        return [(stage, manifest) for stage, manifest in found if manifest is not None]


def _annotate(store: Store, stages: list[Stage], key: str) -> dict[str, Made]:
    """Run the networks of `stages` over a shard, batch by batch; finished batches survive a
    kill."""
    pictures = (
        store.slices.read(EMBEDDINGS, "raw_images", key)
        .unique("image_id", keep="first")
        .sort("image_id")
    )
    config = store.config
    models = {stage.model: store.models.path(stage.model) for stage in stages}
    known = {stage.name: kept_rows.known(store, stage, key) for stage in stages}
    done_before = set.intersection(*(set(rows["image_id"]) for rows in known.values()))
    fresh = pictures.filter(~pl.col("image_id").is_in(list(done_before)))
    work = list(zip(fresh["image_id"], image_files(store, fresh), strict=True))
    size = config.annotate.batch_size
    batches = [work[start : start + size] for start in range(0, len(work), size)]
    identity = json_digest(
        [[stage.name, store.currency.basis(stage, key)] for stage in stages]
        + [fresh["image_id"].to_list()]
    )
    worker = partial(Annotator, models, config.annotate, config.decode)
    with devices.hold("annotate", config.devices, store.home) as device:
        run = partial(engine.run, worker, (), devices=[device])
        done = store.writer.resume_batches("annotations", key, identity, batches, run)
        rows = pl.concat(list(track(done, "batches", len(batches)))) if batches else ROWS.to_frame()
    rejected = rejections("annotations", failures(rows))
    good = rows.filter(pl.col("failure").is_null())
    for stage in stages:
        kept_rows.keep(
            store, stage, key, known[stage.name].join(pictures, on="image_id", how="anti")
        )
    present = pictures.filter(pl.col("image_id").is_in(list(done_before))).select("image_id")
    return {
        stage.name: _made(
            store,
            stage,
            good,
            known[stage.name].join(present, on="image_id", how="semi"),
            rejected,
            pictures,
        )
        for stage in stages
    }


def _made(
    store: Store,
    stage: Stage,
    rows: pl.DataFrame,
    known: pl.DataFrame,
    rejected: pl.DataFrame,
    pictures: pl.DataFrame,
) -> Made:
    filled = _FILLED[stage.name]
    new = rows.select("image_id", pl.lit(stage.model).alias("model"), *filled)
    frame = pl.concat([new, known.select(new.columns)]).sort("image_id")
    return Made(
        frame=frame, rejected=rejected.with_columns(stage=pl.lit(stage.name)), rows_in=pictures.height,
        report=_report(store, stage, frame, pictures),
    )  # fmt: skip


def _report(
    store: Store, stage: Stage, frame: pl.DataFrame, pictures: pl.DataFrame
) -> dict[str, object]:
    """What each table shows of a shard."""
    if frame.is_empty():
        return {}
    if stage is TAGS:
        names = (
            frame["tags"]
            .explode()
            .drop_nulls()
            .struct.unnest()
            .filter(pl.col("probability") >= 0.4)["name"]
        )
        top = names.value_counts(sort=True, name="n").head(15)
        return {
            "tables": {
                "tags at 0.4": [{"tag": tag, "images": count} for tag, count in top.iter_rows()]
            }
        }
    if stage is WATERMARKS:
        sure = frame.filter(
            pl.col("boxes").list.eval(pl.element().struct.field("confidence") >= 0.3).list.any()
        )
        examples = sure.head(12).join(pictures, on="image_id", how="left")
        shown_pictures = {"watermarked": thumbnails(store, examples)} if examples.height else {}
        return {"numbers": {"with a box at 0.3": sure.height}, "pictures": shown_pictures}
    norms = frame["vector"].list.eval(pl.element() ** 2).list.sum().sqrt().to_list()
    return {
        "numbers": {
            "dimensions": len(frame["vector"][0]),
            "projected dimensions": len(frame["projection"][0]),
        },
        "pictures": {"norm of the vectors": figures.histogram(norms)},
    }


def _captions(store: Store, key: str) -> Made:
    """Captions of a shard as its sidecars have them."""
    raw = store.slices.read(CAPTIONS, "raw_images", key)
    frame = from_sources(store.slices.read(CAPTIONS, "source_listing", key), raw)
    return Made(
        frame=frame,
        rows_in=raw["image_id"].n_unique(),
        report={"numbers": {"with a caption": frame["caption"].count()}},
    )
