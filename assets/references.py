"""What `eval_metrics` compares a checkpoint's images with: its base's images, and the set it
was trained on."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from assets.annotations import STAGES
from resources.graph import Stage
from resources.workspace.store import Store
from training.buckets import crops
from training.buckets.geometry import Size
from training.errors import ConfigError, DataError
from training.evaluation import overbaked
from training.evaluation.copies import Block
from training.evaluation.prompt_groups import counted
from training.evaluation.references import BaseImages, References, TrainingImages, sample
from training.images.decode_pool import DecodePool, ImageFile
from training.manifests import read_parquet
from training.names import CheckpointName
from training.runs.run_folder import INPUTS, RunInputs, read_inputs
from training.sampling.image_files import read_if_there, read_or_explain
from training.sources.source import Source

if TYPE_CHECKING:
    from training.evaluation.clip_score import Mapped

_ABSENT = "absent"
NUM_CLOSEST = 10
"""Images that are shown beside their nearest training image."""


def digests(store: Store, key: str) -> dict[str, str]:
    """Digests of what the images of checkpoint `key` are compared with; none for the base, which
    is what they are compared with and was trained on nothing here.

    The set is the run's own, by its fingerprint: images that come and go later do not make scores
    stale. Embeddings need no digest, they follow from the images and from CLIP.
    """
    base = store.checkpoints.base()
    if key == base:
        return {}
    manifest = store.manifest("sample_images", base) if base else None
    inputs = _inputs(store, key)
    return {
        "base_pictures": manifest.digest if manifest else _ABSENT,
        "training_set": inputs.fingerprint if inputs else _ABSENT,
    }


def gather(store: Store, stage: Stage, key: str, networks: "Mapped", batch_size: int) -> References:
    """All that is there of what checkpoint `key` is compared with; nothing for the base.

    Args:
        store: The workspace.
        stage: `eval_metrics`. What it has committed of the base's images is taken from there
            while it is current.
        key: The checkpoint.
        networks: Look at the base's images where nothing current is committed.
        batch_size: Images at a time.

    Raises:
        DataError: embeddings of its training images were made by another CLIP.
    """
    base = store.checkpoints.base()
    if key == base:
        return References()
    pictures = None
    if base is not None and store.manifest("sample_images", base) is not None:
        current = store.currency.is_current(stage, base)
        pictures = (
            _seen_before(store, base)
            if current
            else _base_images(store, base, networks, batch_size)
        )
    inputs = _inputs(store, key)
    return References(base=pictures, training=_training_images(store, key) if inputs else None)


def located(store: Store, images: pl.DataFrame) -> list[tuple[str, ImageFile]]:
    """Image id and what opens the image, of those `images` (image_id, shard) whose source is still there, by id."""
    shards = set(images["shard"].to_list()) & set(store.tables.parts("raw_images"))
    raw = store.read("raw_images", ["image_id", "source", "locator"], sorted(shards))
    rows = raw.join(images.select("image_id"), on="image_id", how="semi").unique(
        "image_id", keep="first"
    )
    sources: dict[str, Source] = {}
    for name in rows["source"].unique().to_list():
        try:
            sources[name] = store.paths.source(name)
        except (ConfigError, DataError):  # removed since the training: its images cannot be shown
            continue
    kept = rows.filter(pl.col("source").is_in(list(sources))).sort("image_id")
    return [
        (image_id, partial(sources[source].open, locator))
        for image_id, source, locator in kept.select("image_id", "source", "locator").iter_rows()
    ]


def training_images(store: Store, key: str) -> pl.DataFrame | None:
    """image_id, shard, split and bucket of the set that checkpoint `key` was trained on; None where
    there is none.

    What a user had forgotten is left out: it must not return as anybody's neighbour.
    """
    inputs = _inputs(store, key)
    if inputs is None:
        return None
    columns = ["image_id", "shard", "split", "bucket_height", "bucket_width"]
    images = read_parquet(inputs.training_set, columns)
    return images.filter(~pl.col("image_id").is_in(list(store.tables.forgotten())))


class Pair(NamedTuple):
    """An image and the training image nearest to it."""

    prompt_id: str
    similarity: float
    image_id: str
    picture: np.ndarray
    """`(H, W, 3)` uint8."""
    image: np.ndarray
    """`(H, W, 3)` uint8."""


def closest(store: Store, key: str, metrics: pl.DataFrame, samples: pl.DataFrame) -> list[Pair]:
    """The images nearest to a training image, nearest first; none for models that were not
    trained here, and without those whose training image is gone or that cannot be read themselves.

    Args:
        store: The workspace.
        key: The checkpoint.
        metrics: Its rows of table `eval_metrics`.
        samples: Its rows of table `sample_images`.
    """
    from training.evaluation.clip_score import SIMILARITY

    images = training_images(store, key)
    nearest = metrics.filter(pl.col("metric") == SIMILARITY).sort(
        "value", "prompt_id", descending=[True, False]
    )
    if images is None:
        return []
    rows = nearest.head(NUM_CLOSEST).select("prompt_id", "value", "image_id")
    files = dict(
        located(store, images.filter(pl.col("image_id").is_in(rows["image_id"].to_list())))
    )
    drawn = dict(samples.select("prompt_id", "file").iter_rows())
    chosen = [row for row in rows.iter_rows() if row[2] in files and row[0] in drawn]
    ids = [image_id for *_, image_id in chosen]
    with DecodePool(store.config.decode) as pool:
        pixels = list(pool.pixels([files[image_id] for image_id in ids], ids))
    folder = store.paths.sample_folder(key)
    return [
        Pair(prompt_id, value, image_id, picture, image)
        for (prompt_id, value, image_id), image in zip(chosen, pixels, strict=True)
        if isinstance(image, np.ndarray)
        and (picture := read_if_there(folder, drawn[prompt_id])) is not None
    ]


def _inputs(store: Store, key: str) -> RunInputs | None:
    """What the run of a checkpoint was made from; None for models that were not trained here."""
    folder = store.home / "runs" / CheckpointName.parse(key).run
    if not (folder / INPUTS).is_file():
        return None
    inputs = read_inputs(folder)
    return inputs if inputs.training_set.is_file() else None


def _seen_before(store: Store, base: str) -> BaseImages:
    """What the base's committed scores hold of its images: equal to the bit to another look at
    them."""
    rows = counted(
        store.read("eval_metrics", ["prompt_id", "metric", "value", "embedding"], [base])
    )
    of = {
        name: rows.filter(pl.col("metric") == name).sort("prompt_id")
        for name in ("embedding", *overbaked.ALL)
    }
    return BaseImages(
        embeddings=np.array(of["embedding"]["embedding"].to_list(), dtype=np.float32),
        levels={name: of[name]["value"].to_numpy() for name in overbaked.ALL},
    )


def _base_images(store: Store, base: str, networks: "Mapped", batch_size: int) -> BaseImages:
    from training.evaluation.clip_score import look

    samples = counted(store.read("sample_images", ["prompt_id", "text", "file"], [base]))
    pictures = (read_or_explain(store.paths.sample_folder(base), file) for file in samples["file"])
    seen = look(pictures, samples["text"].to_list(), networks, batch_size=batch_size)
    return BaseImages(
        embeddings=seen.embeddings,
        levels={name: seen.scores.get(name, np.empty(0)) for name in overbaked.ALL},
    )


def _training_images(store: Store, key: str) -> TrainingImages:
    images = training_images(store, key)
    assert images is not None
    return TrainingImages(
        images=images,
        embeddings_of=partial(_embeddings, store, store.models.digest("clip")),
        levels=_levels(store, images.filter(pl.col("split") == "train")),
    )


def _embeddings(store: Store, clip: str, images: pl.DataFrame) -> Iterator[Block]:
    """Embeddings of `images`, a shard at a time; those that are not finite are left out."""
    for shard in images["shard"].unique().sort().to_list():
        part = STAGES["embeddings"].part(shard)
        manifest = store.manifest("embeddings", part)
        if manifest is None:
            continue
        if manifest.models["clip"] != clip:
            raise DataError(
                f"embeddings {part} are of another CLIP: foundry run --select embeddings"
            )
        wanted = images.filter(pl.col("shard") == shard).select("image_id")
        rows = store.read("embeddings", ["image_id", "projection"], [part]).join(
            wanted, on="image_id", how="semi"
        )
        if rows.height:
            flat = rows["projection"].explode(empty_as_null=False, keep_nulls=False).to_numpy()
            vectors = flat.reshape(rows.height, -1)
            finite = np.isfinite(vectors).all(axis=1)
            yield rows["image_id"].filter(finite).to_list(), vectors[finite]


def _levels(store: Store, images: pl.DataFrame) -> overbaked.Levels:
    """Measures of training images at the size that they were trained at; unreadable ones are left
    out."""
    chosen = sample(images, overbaked.MAX_TRAINING_IMAGES)
    buckets = {
        row[0]: Size(*row[1:])
        for row in chosen.select("image_id", "bucket_height", "bucket_width").iter_rows()
    }
    files = located(store, chosen)
    measures = []
    with DecodePool(store.config.decode) as pool:
        ids = [image_id for image_id, _ in files]
        for image_id, pixels in zip(
            ids, pool.pixels([file for _, file in files], ids), strict=True
        ):
            if isinstance(pixels, np.ndarray):
                size = Size(*pixels.shape[:2])
                placement = crops.place(
                    size,
                    buckets[image_id],
                    image_id,
                    crops.CropPolicy(mode="centre", seed=0, generation=0, upscale=True),
                )
                measures.append(overbaked.measure(crops.apply(pixels, placement)))
    return overbaked.collect(measures)
