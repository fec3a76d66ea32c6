"""`latents`: every kept picture, placed in its bucket and encoded by the VAE, generation by generation."""

from functools import partial
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from assets.metadata import describe, materialize
from assets.partitions import encoding_shards
from assets.raw_images import image_path
from resources import devices
from resources.stages import Per, Reads, Scope, Stage
from resources.store import Made, Store
from training.data.geometry import Box, Size
from training.data.latent_files import generations
from training.data.tables import rejections
from training.evaluation import figures
from training.latents import EncodedShard, Picture, encode_shard

if TYPE_CHECKING:
    from training.models.vae import Vae

STAGE = Stage(
    name="latents",
    version=1,
    scope=Scope.ENCODING_SHARD,
    reads=(
        Reads(
            "bucket_assignments", ("image_id", "height", "width", "bucket_height", "bucket_width"), Per.ENCODING_ROWS
        ),
        Reads("selected_images", ("image_id", "source", "locator", "flip", "crop_box"), Per.ROWS),
    ),
    config=lambda config, key: config.encodings[key.partition("|")[0]],
    models=("base",),
)


@dg.asset(
    deps=["bucket_assignments", "selected_images"],
    partitions_def=encoding_shards,
    **describe(STAGE, "encode", "pytorch", "huggingface"),
)
def latents(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per kept image: where its latents lie, and exactly how it was placed."""

    def make(key: str) -> Made:
        encoding = store.config.encodings[STAGE.encoding(key)]
        pictures = _pictures(store, key)
        folder = store.table_folder("latents", key)
        generation = max(generations(folder), default=0) + 1
        with devices.hold("encode", store.config.devices, store.home) as device:
            shard = encode_shard(
                pictures, folder=folder, generation=generation, encoding=encoding, decode=store.config.decode,
                load_vae=partial(_load_vae, store, encoding.vae, device),
            )  # fmt: skip
        return Made(
            frame=shard.frame,
            rejected=rejections("latents", shard.rejected),
            rows_in=len(pictures),
            files=shard.files,
            report={"generation": f"g{generation:04d}", **_report(shard, generation)},
        )

    return materialize(context, store, STAGE, make)


def _load_vae(store: Store, name: str, device: str) -> "Vae":
    from training.models.vae import Vae

    return Vae.load(store.model_path("base") / "vae" if name == "base" else store.resource_path(name), device)


def _pictures(store: Store, key: str) -> list[Picture]:
    """The kept images of a shard that have a bucket."""
    assigned = store.read_slice(STAGE, "bucket_assignments", key)
    chosen = store.read_slice(STAGE, "selected_images", key)
    return [
        Picture(
            image_id=row["image_id"],
            path=image_path(store, row),
            original=Size(row["height"], row["width"]),
            bucket=Size(row["bucket_height"], row["bucket_width"]),
            flip=row["flip"],
            crop_box=None if row["crop_box"] is None else Box(**row["crop_box"]),
        )
        for row in assigned.join(chosen, on="image_id", how="inner").sort("image_id").iter_rows(named=True)
    ]


def _report(shard: EncodedShard, generation: int) -> dict[str, object]:
    """Numbers of the pass, and a few crops beside what their latents decode to."""
    if not shard.shown:
        return {"numbers": {"generation number": generation}}
    pairs = [picture for _, crop, decoded in shard.shown for picture in (crop, decoded)]
    captions = [text for image_id, _, _ in shard.shown for text in (f"{image_id[:6]} crop", "decoded")]
    return {
        "numbers": {
            "generation number": generation,
            "reconstruction error (of 255)": round(shard.mean_error, 3),
            "latent files": len(shard.files),
            "MB": round(sum(entry.bytes for entry in shard.files) / 1e6, 3),
        },
        "pictures": {"crop and decoded latents": figures.contact_sheet(pairs, captions)},
        "tables": {
            "buckets": shard.frame.group_by("bucket_height", "bucket_width")
            .len("images")
            .sort(pl.col("images"), descending=True)
            .to_dicts()
        },
    }
