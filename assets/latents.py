"""`latents`: every kept image, placed in its bucket and encoded by the VAE, generation by
generation."""

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.raw_images import image_files
from resources.engine.workers import Workers, WorkerSpec
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace import generations
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import progress, toml
from training.buckets.geometry import Box, Size
from training.buckets.plans import follows_image
from training.errors import DamageError
from training.images import figures
from training.latents.encoder import EncodeJob, Encoder, KeptImage, VaeSpec
from training.latents.encoding import EncodedShard, encode_shard, same_policy
from training.latents.generations import Generation, read_generation
from training.latents.generations import generations as numbers_of
from training.manifests import Manifest
from training.names import GenerationName, OwnedPart, ShardKey
from training.tables.schemas import rejections


def _watermarks_read(store: Store, key: str) -> Mapping[str, str]:
    """Boxes decide latents only where crops avoid them: elsewhere new boxes make nothing stale."""
    if not store.config.encodings[latents.encoding(key)].avoid_watermarks:
        return {}
    digest = store.slices.digest(latents, _BOXES, key)
    return {_BOXES.label: digest or "none"}


def _read_by_some(store: Store, key: str) -> Mapping[str, str]:
    """What only some encodings read: boxes, and sizes of images where these follow from no
    bucket."""
    found = dict(_watermarks_read(store, key))
    if follows_image(store.config.encodings[latents.encoding(key)].buckets):
        found[_SIZES.label] = store.slices.digest(latents, _SIZES, key) or "none"
    return found


_BOXES = Reads("watermark_boxes", ("image_id", "boxes"), Per.SHARD)
_SIZES = Reads(
    "bucket_assignments", ("image_id", "resized_height", "resized_width"), Per.ENCODING_ROWS
)


@Stage(
    version=2,
    scope=Scope.ENCODING_SHARD,
    group="encode",
    kinds=("pytorch", "huggingface"),
    reads=(
        Reads(
            "bucket_assignments",
            ("image_id", "height", "width", "bucket_height", "bucket_width", "padded"),
            Per.ENCODING_ROWS,
        ),
        Reads(
            "selected_images",
            ("image_id", "source", "locator", "flip", "crop_box", "split", "stable"),
            Per.ROWS,
        ),
    ),
    follows=(_BOXES, _SIZES),
    config=lambda config, key: config.encodings[ShardKey.parse(key).encoding],
    settings="encodings.{encoding}",
    models=("vae",),
    others=_read_by_some,
)
def latents(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per kept image: where its latents lie, and exactly how it was placed.

    In a run with the tag `foundry/reencode` a shard that is current is encoded anew, as the next
    generation.
    """
    tags = context.run.tags
    anew = generations.REENCODE_TAG in tags
    deadline = float(tags.get(generations.DEADLINE_TAG, "inf"))

    def is_due(key: str) -> bool:
        if anew and time.time() > deadline:
            context.log.info(
                f"latents {key}: the time for re-encoding is over, this generation stays"
            )
        return anew and time.time() <= deadline

    def make(key: str) -> Made:
        encoding = store.config.encodings[latents.encoding(key)]
        chosen = pictures(store, key)
        folder = store.tables.folder("latents", key)
        number = max(numbers_of(folder), default=0) + 1
        say = context.log.info
        reusable = [] if anew else _reusable(store, key)
        with progress.told(say):
            began = time.monotonic()
            shard = encode_shard(
                chosen,
                EncodeJob(
                    folder=folder,
                    generation=number,
                    encoding=encoding,
                    vae_digest=store.models.vae_digest(latents.encoding(key)),
                    vae=VaeSpec(
                        folder=store.models.vae_folder(latents.encoding(key)),
                        precision=encoding.precision,
                        tile_above_px=encoding.tile_above_px,
                    ),
                    previous=reusable[0] if reusable else None,
                    older=tuple(reusable[1:]),
                    show_watermarks=store.config.selection.watermark_threshold,
                ),
                workers.map,
            )
            seconds = time.monotonic() - began
        return Made(
            frame=shard.frame,
            rejected=rejections("latents", shard.rejected),
            rows_in=len(chosen),
            files=shard.files,
            report={
                "generation": str(GenerationName(number)),
                **_report(shard, number, encoding.batch_size, seconds),
            },
        )

    spec = WorkerSpec(make=Encoder, arguments=(store.config.decode,), kind="encode", gives_way=anew)
    with Workers(spec, store.config.devices, store.home, say=context.log.info) as workers:
        result = materialize(context, store, latents, make, again=is_due)
    if anew:
        for key in context.partition_keys:
            removed, num_bytes = generations.collect(store, key)
            if removed:
                names = ", ".join(path.stem for path in removed)
                context.log.info(f"latents {key}: removed {names}, {num_bytes / 1e6:.1f} MB")
    return result


def _reusable(store: Store, key: str) -> list[Generation]:
    """The current generation, and older ones for images that were missing since, the newest first.

    Empty where the current one's rows are not what would be made now: by equal code, VAE and crop
    policy.
    """
    basis = store.currency.basis(latents, key)
    folder = store.tables.folder("latents", key)
    found: list[Generation] = []
    for number in reversed(numbers_of(folder)):
        try:
            generation = read_generation(folder, number)
        except DamageError:
            if not found:
                raise
            continue
        if basis is not None and _is_equal(store, key, generation.manifest, basis):
            found.append(generation)
        elif not found:
            break
    return found


def _is_equal(store: Store, key: str, manifest: Manifest, basis: Mapping[str, Any]) -> bool:
    return (
        manifest.version == latents.version
        and dict(manifest.models) == basis["models"]
        and same_policy(manifest.config, toml.dump(store.config.encodings[latents.encoding(key)]))
        and all(
            manifest.inputs.get(label) == digest
            for label, digest in _watermarks_read(store, key).items()
        )
    )


def pictures(store: Store, key: str) -> list[KeptImage]:
    """The kept images of a shard that have a bucket."""
    assigned = store.slices.read(latents, "bucket_assignments", key)
    chosen = store.slices.read(latents, "selected_images", key)
    marked, sizes = _boxes(store, key), _sizes(store, key)
    kept = assigned.join(chosen, on="image_id", how="inner").sort("image_id")
    return [
        KeptImage(
            image_id=row["image_id"],
            file=file,
            original=Size(row["height"], row["width"]),
            bucket=Size(row["bucket_height"], row["bucket_width"]),
            flip=row["flip"],
            crop_box=None if row["crop_box"] is None else Box(**row["crop_box"]),
            padded=row["padded"],
            resized=sizes.get(row["image_id"]),
            measured=row["split"] == "validation" or row["stable"],
            watermarks=marked.get(row["image_id"], ()),
        )
        for row, file in zip(kept.iter_rows(named=True), image_files(store, kept), strict=True)
    ]


def _sizes(store: Store, key: str) -> dict[str, Size]:
    """What images are resized to, by image_id; empty where an image's bucket says it."""
    encoding = latents.encoding(key)
    if not follows_image(store.config.encodings[encoding].buckets):
        return {}
    rows = store.read("bucket_assignments", _SIZES.columns, [encoding])
    return {image_id: Size(height, width) for image_id, height, width in rows.iter_rows()}


def _boxes(store: Store, key: str) -> dict[str, tuple[tuple[Box, float], ...]]:
    """Watermark boxes of the shard's images: to avoid, and to draw into the images that are
    shown."""
    shard = latents.shard(key)
    parts = [
        part for part in store.tables.parts("watermark_boxes") if OwnedPart.owner_of(part) == shard
    ]
    rows = store.read("watermark_boxes", ["image_id", "boxes"], parts).unique(
        "image_id", keep="first"
    )
    return {
        image_id: tuple(
            (Box(box["y0"], box["x0"], box["y1"], box["x1"]), box["confidence"]) for box in boxes
        )
        for image_id, boxes in rows.iter_rows()
    }


def _report(shard: EncodedShard, number: int, batch_size: int, seconds: float) -> dict[str, object]:
    """Numbers of the pass, what is in which bucket, and a few images: source with its crop, crop,
    decoded latents.

    Args:
        shard: What was made.
        number: Of the generation.
        batch_size: That was asked for.
        seconds: That it took.
    """
    numbers: dict[str, object] = {
        "generation number": number,
        "MB": round(sum(entry.bytes for entry in shard.files) / 1e6, 3),
        "latent files": len(shard.files),
        "copied from the generation before": shard.num_copied,
    }
    if shard.precision:
        fresh = shard.frame.height - shard.num_copied
        numbers |= {
            "precision": shard.precision,
            "batch size": shard.batch_size,
            "encoded per second": fresh / seconds,
        }
        if shard.batch_size < batch_size:
            numbers["started again, out of memory with batches of"] = batch_size
    buckets = (
        shard.frame.group_by("bucket_height", "bucket_width")
        .len("images")
        .sort(pl.col("images"), descending=True)
    )
    report: dict[str, object] = {"numbers": numbers, "tables": {"buckets": buckets.to_dicts()}}
    if shard.shown:
        shown = [image for item in shard.shown for image in (item.source, item.crop, item.decoded)]
        captions = [
            text
            for item in shard.shown
            for text in (f"{item.image_id[:6]} source", "crop", "decoded latents")
        ]
        numbers["reconstruction error (of 255)"] = round(
            sum(item.error for item in shard.shown) / len(shard.shown), 3
        )
        sheet = figures.contact_sheet(shown, captions, columns=6)
        report["pictures"] = {"source with crop and watermarks, crop, decoded latents": sheet}
    return report
