"""Annotators: one decode per image feeds embeddings, tags and watermark boxes; captions come from
sidecars."""

import time
from collections.abc import Iterator
from importlib.metadata import entry_points

import dagster as dg
import polars as pl

from assets.metadata import partition_keys, shown
from assets.raw_images import image_files, thumbnails
from resources.engine.workers import Workers, WorkerSpec
from resources.graph import Per, Reads, Scope, Stage
from resources.warehouse import rebuild
from resources.workspace import kept_rows, reading
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.annotators.adapters import ClipEmbeddings, JoyTags, OwlWatermarks
from training.annotators.annotations import (
    AnnotatorPass,
    ImageBatch,
    failures,
    rows_of,
    schema,
)
from training.annotators.annotator import Annotator, Report
from training.commit import json_digest
from training.curation.captions import from_sources
from training.errors import DataError
from training.manifests import Manifest
from training.progress import track
from training.tables.schemas import rejections

ANNOTATORS: tuple[type[Annotator], ...] = (
    ClipEmbeddings, JoyTags, OwlWatermarks,
    *(point.load() for point in entry_points(group="diffusion_foundry.annotators")),
)  # fmt: skip
"""Every network that looks at images; a line here makes it a stage. Packages beside this one add
theirs by an entry point."""
IMAGES = Reads("raw_images", ("image_id", "source", "source_id", "locator"), Per.SHARD)


NETWORKS = {annotator.stage_name(): annotator for annotator in ANNOTATORS}
"""Annotators by the name of their stage."""
AnnotateWorkers = Workers[ImageBatch, pl.DataFrame]


def annotations(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> Iterator[dg.MaterializeResult]:
    """Decode each image once and show it to every annotator whose rows are stale."""
    config = store.config
    chosen = [STAGES[asset.to_user_string()] for asset in sorted(context.selected_asset_keys)]
    wanted = [stage for stage in chosen if stage.in_use(config)] or chosen
    digests: dict[str, dict[str, str]] = {stage.name: {} for stage in wanted}
    spec = WorkerSpec(
        make=AnnotatorPass, arguments=(config.annotate, config.decode), kind="annotate"
    )
    with Workers(spec, config.devices, store.home, say=context.log.info) as workers:
        for key in partition_keys(context, store, wanted[0]):
            for stage, manifest in _bring_up_to_date(context, store, workers, wanted, key):
                digests[stage.name][key] = manifest.digest
                context.add_asset_metadata(
                    shown(manifest, store, partitioned=True),
                    asset_key=stage.name,
                    partition_key=key,
                )
    rebuild(store)
    for stage in wanted:
        found = digests[stage.name]
        version = next(iter(found.values())) if len(found) == 1 else json_digest(found)
        yield dg.MaterializeResult(asset_key=stage.name, data_version=dg.DataVersion(version))


def _stage(annotator: type[Annotator]) -> Stage:
    before = tuple(
        Reads(table, per=Per.SHARD) for table in (annotator.table, f"kept_{annotator.table}")
    )
    return Stage(
        name=annotator.stage_name(),
        description=annotator.about(),
        table=annotator.table,
        version=annotator.version,
        scope=Scope.SHARD,
        group="annotate",
        kinds=annotator.kinds,
        reads=(IMAGES,),
        also=before,
        config=lambda config, key: {
            name: getattr(config.annotate, name) for name in annotator.settings
        },
        settings="annotate",
        models=(annotator.model,),
        model=annotator.model,
        in_use=lambda config: config.models.names(annotator.model),
    )(annotations)


ANNOTATED = tuple(map(_stage, ANNOTATORS))
CAPTIONS = Stage(
    name="captions",
    description="One row per image: the sentence its sidecar holds, or null.",
    version=1,
    scope=Scope.SHARD,
    group="annotate",
    reads=(
        Reads("raw_images", ("image_id", "source", "source_id"), Per.SHARD),
        Reads("source_listing", ("source", "source_id", "caption"), Per.ROWS),
    ),
    model="sidecar",
)(annotations)
STAGES = {stage.name: stage for stage in (*ANNOTATED, CAPTIONS)}


def _bring_up_to_date(
    context: dg.AssetExecutionContext,
    store: Store,
    workers: AnnotateWorkers,
    wanted: list[Stage],
    key: str,
) -> list[tuple[Stage, Manifest]]:
    """Make the stale ones of the wanted tables for one shard, under one lock, in one pass over its
    images."""
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
        if networks := [stage for stage in stale if stage.name in NETWORKS]:
            with reading.at_work(*networks):
                made.update(_annotate(store, workers, networks, key))
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


def _annotate(
    store: Store, workers: AnnotateWorkers, stages: list[Stage], key: str
) -> dict[str, Made]:
    """Run the networks of `stages` over a shard, batch by batch; finished batches survive a
    kill."""
    pictures = (
        store.slices.read(stages[0], "raw_images", key)
        .unique("image_id", keep="first")
        .sort("image_id")
    )
    config = store.config
    annotators = {NETWORKS[stage.name]: store.models.path(stage.model) for stage in stages}
    known = {stage.name: kept_rows.known(store, stage, key) for stage in stages}
    done_before = set.intersection(*(set(rows["image_id"]) for rows in known.values()))
    fresh = pictures.filter(~pl.col("image_id").is_in(list(done_before)))
    work = list(zip(fresh["image_id"], image_files(store, fresh), strict=True))
    size = config.annotate.batch_size
    batches = [
        ImageBatch(annotators=annotators, images=work[start : start + size])
        for start in range(0, len(work), size)
    ]
    identity = json_digest(
        [
            [[stage.name, store.currency.basis(stage, key)] for stage in stages],
            fresh["image_id"].to_list(),
            schema(annotators).names(),
        ]
    )
    done = store.writer.resume_batches("annotations", key, identity, batches, workers.map)
    rows = (
        pl.concat(list(track(done, "batches", len(batches))))
        if batches
        else schema(annotators).to_frame()
    )
    rejected = rejections("annotations", failures(rows))
    for stage in stages:
        kept_rows.keep(
            store, stage, key, known[stage.name].join(pictures, on="image_id", how="anti")
        )
    present = pictures.filter(pl.col("image_id").is_in(list(done_before))).select("image_id")
    return {
        stage.name: _made(
            store,
            stage,
            rows,
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
    annotator = NETWORKS[stage.name]
    new = rows_of(annotator, rows)
    frame = pl.concat([new, known.select(new.columns)]).sort("image_id")
    return Made(
        frame=frame, rejected=rejected.with_columns(stage=pl.lit(stage.name)), rows_in=pictures.height,
        report={} if frame.is_empty() else _shown(store, annotator.report(frame), pictures),
    )  # fmt: skip


def _shown(store: Store, report: Report, pictures: pl.DataFrame) -> dict[str, object]:
    """A report as a manifest holds it: its examples as thumbnails."""
    examples = {
        label: thumbnails(
            store, pl.DataFrame({"image_id": ids}).join(pictures, on="image_id", how="left")
        )
        for label, ids in report.examples.items()
    }
    found = {
        "numbers": dict(report.numbers),
        "tables": {label: list(rows) for label, rows in report.tables.items()},
        "pictures": {**report.plots, **examples},
    }
    return {name: values for name, values in found.items() if values}


def _captions(store: Store, key: str) -> Made:
    """Captions of a shard as its sidecars have them."""
    raw = store.slices.read(CAPTIONS, "raw_images", key)
    frame = from_sources(store.slices.read(CAPTIONS, "source_listing", key), raw)
    return Made(
        frame=frame,
        rows_in=raw["image_id"].n_unique(),
        report={"numbers": {"with a caption": frame["caption"].count()}},
    )
