"""The schema of every table: columns, types, what they mean, and how far model outputs may differ.

`docs/tables.md` is generated from here; the store refuses a frame that does not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import polars as pl

from training.errors import DataError
from training.names import RESERVED

BOX = pl.Struct(dict.fromkeys(("y0", "x0", "y1", "x1"), pl.Float64))
SCORED_BOX = pl.Struct(dict.fromkeys(("y0", "x0", "y1", "x1", "confidence"), pl.Float64))
TAG = pl.Struct({"name": pl.String, "category": pl.String})
SCORED_TAG = pl.Struct({"name": pl.String, "probability": pl.Float32})
UTC = pl.Datetime("us", "UTC")


class Reason(StrEnum):
    """Why an image, or what lies beside it, is not used. A closed list: `rejected_images.reason`
    holds nothing else."""

    GONE = "gone"
    NOT_A_FILE = "not_a_file"
    LINK_NOT_FOLLOWED = "link_not_followed"
    UNREADABLE = "unreadable"
    EMPTY_FILE = "empty_file"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    MODE_NOT_ALLOWED = "mode_not_allowed"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TRUNCATED = "truncated"
    DECODE_FAILED = "decode_failed"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_CRASHED = "decode_crashed"
    OUT_OF_MEMORY = "out_of_memory"
    ANIMATED = "animated"
    FORGOTTEN = "forgotten"
    CHANGED_WHILE_READ = "changed_while_read"
    NO_BUCKET = "no_bucket"
    SMALLER_THAN_BUCKET = "smaller_than_bucket"
    NON_FINITE_LATENTS = "non_finite_latents"
    ANNOTATION_FAILED = "annotation_failed"
    SIDECAR_UNMATCHED = "sidecar_unmatched"
    SIDECAR_UNREADABLE = "sidecar_unreadable"
    SIDECAR_MALFORMED = "sidecar_malformed"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its type, one line of meaning, and the absolute tolerance of a model's output."""

    dtype: pl.DataType | type[pl.DataType]
    about: str
    tolerance: float | None = None
    """None: equal inputs give equal values on every machine. Else the largest allowed
    difference."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table: what a row is, what identifies it, and its columns in order."""

    name: str
    row: str
    key: tuple[str, ...]
    columns: Mapping[str, Column]

    @property
    def schema(self) -> pl.Schema:
        """Polars schema in column order."""
        return pl.Schema({name: column.dtype for name, column in self.columns.items()})

    def empty(self) -> pl.DataFrame:
        """A frame of no rows."""
        return pl.DataFrame(schema=self.schema)

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Order columns, check types and keys, and sort by key: equal content becomes equal bytes.

        Raises:
            DataError: a column is missing, unknown or of another type, or a key repeats.
        """
        missing = [name for name in self.columns if name not in frame.columns]
        unknown = [name for name in frame.columns if name not in self.columns]
        if missing or unknown:
            raise DataError(f"table {self.name}: columns missing {missing}, unknown {unknown}")
        frame = frame.select(list(self.columns))
        for name, column in self.columns.items():
            if frame.schema[name] != column.dtype:
                raise DataError(
                    f"table {self.name}: column {name} is {frame.schema[name]}, must be {column.dtype}"
                )
        if self.key:
            frame = frame.sort(self.key, nulls_last=True)
            keys = frame.select(self.key)
            same = (
                keys.slice(1)
                .select(
                    pl.all_horizontal(
                        pl.col(name).eq_missing(keys[name].slice(0, max(len(keys) - 1, 0)))
                        for name in self.key
                    )
                )
                .to_series()
            )
            if same.any():
                twice = keys.row(same.arg_max() or 0)
                raise DataError(
                    f"table {self.name}: key {self.key} = {twice} appears more than once"
                )
        return frame.rechunk()


def _c(
    dtype: pl.DataType | type[pl.DataType], about: str, tolerance: float | None = None
) -> Column:
    return Column(dtype, about, tolerance)


_IMAGE_ID = _c(pl.String, "SHA-256 of the file's bytes")
_MODEL = _c(pl.String, "who says so: a name from [models], or `sidecar`")

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "source_listing",
            "candidate",
            ("source", "source_id"),
            {
                "source": _c(pl.String, "name of the source in foundry.toml"),
                "source_id": _c(
                    pl.String,
                    "identity within the source: the relative path, odd bytes percent-encoded",
                ),
                "locator": _c(pl.String, "where the bytes are, relative to the source"),
                "shard": _c(pl.String, "partition, given when first listed and kept"),
                "bytes": _c(pl.Int64, "size when listed"),
                "modified_ns": _c(
                    pl.Int64,
                    "modification time when listed, ns since 1970; only a reason to read again",
                ),
                "gone_at": _c(UTC, "when a listing first missed it; null while it is there"),
                "tags": _c(pl.List(TAG), "the source's own tags, canonical form, with category"),
                "rating": _c(
                    pl.String, "general, sensitive, questionable, explicit; null when unknown"
                ),
                "favourites": _c(pl.Int64, "how many people marked it; null when unknown"),
                "created_at": _c(UTC, "when it was published; null when unknown"),
                "caption": _c(pl.String, "the source's own sentence"),
                "split": _c(pl.String, "the source's own split, honoured: train or validation"),
                "crop_box": _c(BOX, "crop wished by the source, upright source pixels"),
            },
        ),
        Table(
            "raw_images",
            "accepted candidate",
            ("source", "source_id"),
            {
                "source": _c(pl.String, "name of the source"),
                "source_id": _c(pl.String, "identity within the source"),
                "image_id": _IMAGE_ID,
                "locator": _c(pl.String, "where the bytes are, relative to the source"),
                "height": _c(pl.Int32, "upright height, px"),
                "width": _c(pl.Int32, "upright width, px"),
                "stored_height": _c(pl.Int32, "height as stored, px"),
                "stored_width": _c(pl.Int32, "width as stored, px"),
                "orientation": _c(pl.Int8, "EXIF orientation 1-8; 1 when absent or invalid"),
                "format": _c(pl.String, "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or MPO"),
                "mode": _c(pl.String, "Pillow mode as stored"),
                "bytes": _c(pl.Int64, "file size"),
                "dpi": _c(pl.Float64, "what the file says; null when it says nothing"),
                "pixel_digest": _c(pl.String, "SHA-256 of size and upright 8-bit sRGB pixels"),
                "phash": _c(pl.UInt64, "64-bit DCT perceptual hash of the upright picture"),
                "phash_mirrored": _c(pl.UInt64, "the same of its mirror image"),
                "brightness": _c(pl.Float32, "mean luma, 0-1"),
                "contrast": _c(pl.Float32, "standard deviation of luma, 0-1"),
                "sharpness": _c(pl.Float32, "variance of the Laplacian of luma at 256 px"),
            },
        ),
        Table(
            "rejected_images",
            "candidate, image, sidecar or folder",
            (),
            {
                "stage": _c(pl.String, "stage that could not use it"),
                "source": _c(pl.String, "name of the source; null for an image"),
                "source_id": _c(pl.String, "identity within the source; null for an image"),
                "image_id": _c(pl.String, "SHA-256 of the bytes; null when they were never read"),
                "reason": _c(pl.String, "one of the closed list of reasons"),
                "value": _c(pl.String, "what was found; the path of a sidecar or folder"),
                "limit": _c(pl.String, "what was allowed"),
                "detail": _c(pl.String, "the decoder's words, one line"),
            },
        ),
        Table(
            "embeddings",
            "image x model",
            ("image_id", "model"),
            {
                "image_id": _IMAGE_ID,
                "model": _MODEL,
                "vector": _c(
                    pl.List(pl.Float32),
                    "CLS of the vision model's last hidden state before its last norm",
                    1e-3,
                ),
                "projection": _c(
                    pl.List(pl.Float32), "projected image features, L2-normalised", 1e-4
                ),
            },
        ),
        Table(
            "tags",
            "image x model",
            ("image_id", "model"),
            {
                "image_id": _IMAGE_ID,
                "model": _MODEL,
                "tags": _c(
                    pl.List(SCORED_TAG),
                    "names above the floor with probability, sorted by name",
                    1e-3,
                ),
            },
        ),
        Table(
            "captions",
            "image x model",
            ("image_id", "model"),
            {
                "image_id": _IMAGE_ID,
                "model": _MODEL,
                "caption": _c(pl.String, "one sentence; null: looked, none found"),
            },
        ),
        Table(
            "watermark_boxes",
            "image x model",
            ("image_id", "model"),
            {
                "image_id": _IMAGE_ID,
                "model": _MODEL,
                "boxes": _c(
                    pl.List(SCORED_BOX), "upright source pixels; empty: looked, none found", 0.5
                ),
            },
        ),
        Table(
            "duplicate_groups",
            "candidate in a group",
            ("source", "source_id"),
            {
                "group": _c(pl.String, "the smallest image_id of the group"),
                "source": _c(pl.String, "name of the source"),
                "source_id": _c(pl.String, "identity within the source"),
                "image_id": _IMAGE_ID,
                "kind": _c(
                    pl.String,
                    "what ties it to the one kept: exact, pixels or near; `kept` for the kept one",
                ),
                "kept": _c(pl.Boolean, "this one goes on"),
                "why": _c(pl.String, "the rule that kept or dropped it"),
            },
        ),
        Table(
            "quality_pairs",
            "judgement",
            ("pair_id",),
            {
                "pair_id": _c(pl.String, "identity of the judgement"),
                "a": _c(pl.String, "image_id shown first"),
                "b": _c(pl.String, "image_id shown second"),
                "outcome": _c(pl.String, "a, b, tie, both_junk or skip"),
                "rater": _c(pl.String, "who judged"),
                "origin": _c(pl.String, "human, vlm, synthetic or scripted"),
                "created_at": _c(UTC, "when"),
            },
        ),
        Table(
            "quality_model",
            "model",
            ("model",),
            {
                "model": _c(pl.String, "`fitted` from this workspace's judgements, or `supplied`"),
                "file": _c(pl.String, "safetensors with both heads, beside this table"),
                "num_pairs": _c(pl.Int64, "judgements it was fitted on"),
                "cut_points": _c(
                    pl.List(pl.Float64), "eight ascending utilities that part scores 1-9", 1e-2
                ),
                "report": _c(
                    pl.String,
                    "JSON: pair accuracy, Kendall tau, junk precision and recall on held-out images",
                ),
            },
        ),
        Table(
            "quality_scores",
            "image",
            ("image_id",),
            {
                "image_id": _IMAGE_ID,
                "utility": _c(pl.Float32, "Bradley-Terry utility", 1e-2),
                "percentile": _c(pl.Float32, "share of the cut points' pool below it, 0-1", 1e-2),
                "score": _c(pl.Int8, "0 junk, 1-9 by frozen quantile cut points", 1),
                "junk_prob": _c(pl.Float32, "probability of junk", 1e-2),
                "aesthetic": _c(pl.Float32, "LAION aesthetic score, about 1-10", 1e-2),
                "brightness": _c(pl.Float32, "as raw_images"),
                "contrast": _c(pl.Float32, "as raw_images"),
                "sharpness": _c(pl.Float32, "as raw_images"),
                "bytes_per_pixel": _c(pl.Float32, "file size over upright pixels"),
            },
        ),
        Table(
            "tag_vocabulary",
            "tag",
            ("tag",),
            {
                "tag": _c(pl.String, "canonical lower_snake name"),
                "tag_id": _c(pl.Int32, "rank by name"),
                "category": _c(pl.String, "general, artist, character, copyright, meta or rating"),
                "aliases": _c(pl.List(pl.String), "names that mean it"),
                "num_images": _c(pl.Int64, "images that carry it from any origin"),
                "num_source": _c(pl.Int64, "images whose source says so"),
                "num_tagger": _c(pl.Int64, "images whose tagger says so at the threshold"),
                "pieces": _c(pl.List(pl.String), "what CLIP's tokenizer makes of it"),
            },
        ),
        Table(
            "selected_images",
            "image",
            ("image_id",),
            {
                "image_id": _IMAGE_ID,
                "source": _c(pl.String, "source of the candidate that stands for the image"),
                "source_id": _c(pl.String, "its identity there"),
                "locator": _c(pl.String, "where its bytes are, relative to the source"),
                "shard": _c(pl.String, "its partition"),
                "height": _c(pl.Int32, "upright height, px"),
                "width": _c(pl.Int32, "upright width, px"),
                "kept": _c(pl.Boolean, "goes on to training or validation"),
                "rule": _c(pl.String, "the first rule that dropped it; null when kept"),
                "value": _c(pl.String, "what the rule saw"),
                "limit": _c(pl.String, "what the rule allows"),
                "split": _c(pl.String, "train or validation; null when dropped"),
                "stable": _c(pl.Boolean, "on the list of the stable training loss"),
                "cluster": _c(pl.String, "duplicate group, or its own id: never parted by a split"),
                "score": _c(pl.Int8, "quality 0-9", 1),
                "tags": _c(pl.List(TAG), "canonical tags, sorted by name, of source and tagger"),
                "caption": _c(
                    pl.String,
                    "the source's sentence, or several, a line each; null when it has none",
                ),
                "made_caption": _c(
                    pl.String,
                    "a model's sentence, or several, a line each; null when there is none",
                ),
                "words": _c(pl.List(pl.String), "quality, rating and date tags of the source"),
                "watermark": _c(pl.Boolean, "a watermark box above the threshold"),
                "boxes": _c(
                    pl.List(SCORED_BOX),
                    "watermark boxes above the threshold, upright source pixels",
                    0.5,
                ),
                "flip": _c(pl.Boolean, "mirror it when encoding"),
                "crop_box": _c(BOX, "crop wished by the source"),
            },
        ),
        Table(
            "bucket_assignments",
            "kept image",
            ("image_id",),
            {
                "image_id": _IMAGE_ID,
                "shard": _c(pl.String, "its partition"),
                "height": _c(pl.Int32, "upright source height, px"),
                "width": _c(pl.Int32, "upright source width, px"),
                "bucket_height": _c(pl.Int32, "training resolution, px"),
                "bucket_width": _c(pl.Int32, "training resolution, px"),
                "resized_height": _c(pl.Int32, "height after the resize, px"),
                "resized_width": _c(pl.Int32, "width after the resize, px"),
                "slack_height": _c(pl.Int32, "rows a crop may choose among"),
                "slack_width": _c(pl.Int32, "columns a crop may choose among"),
                "padding_height": _c(pl.Int32, "rows that fill the bucket up; 0 unless padded"),
                "padding_width": _c(pl.Int32, "columns that fill the bucket up; 0 unless padded"),
                "padded": _c(pl.Boolean, "fitted into its bucket whole, instead of cropped"),
                "area_kept": _c(pl.Float64, "share of the picture's area inside the crop"),
            },
        ),
        Table(
            "latents",
            "kept image",
            ("image_id",),
            {
                "image_id": _IMAGE_ID,
                "file": _c(pl.String, "latent file of this shard and generation"),
                "row": _c(pl.Int32, "row in that file"),
                "bucket_height": _c(pl.Int32, "px"),
                "bucket_width": _c(pl.Int32, "px"),
                "original_height": _c(pl.Int32, "upright source, px"),
                "original_width": _c(pl.Int32, "upright source, px"),
                "resized_height": _c(pl.Int32, "px"),
                "resized_width": _c(pl.Int32, "px"),
                "crop_top": _c(pl.Int32, "px of the resized image"),
                "crop_left": _c(pl.Int32, "px of the resized image"),
                "pad_top": _c(pl.Int32, "rows of padding above the resized image"),
                "pad_left": _c(pl.Int32, "columns of padding on its left, before the mirroring"),
                "flip": _c(pl.Boolean, "mirrored after the crop"),
                "encoded_in": _c(
                    pl.Int32, "generation that encoded it; an older one's row is copied as it is"
                ),
            },
        ),
        Table(
            "training_set",
            "sample",
            ("image_id",),
            {
                "image_id": _IMAGE_ID,
                "shard": _c(pl.String, "partition of its latents"),
                "height": _c(pl.Int32, "upright source height, px"),
                "width": _c(pl.Int32, "upright source width, px"),
                "bucket_height": _c(pl.Int32, "px"),
                "bucket_width": _c(pl.Int32, "px"),
                "score": _c(pl.Int8, "quality 1-9"),
                "tags": _c(pl.List(TAG), "canonical tags, sorted by name"),
                "caption": _c(
                    pl.String,
                    "the source's sentence, or several, a line each; null when it has none",
                ),
                "made_caption": _c(
                    pl.String,
                    "a model's sentence, or several, a line each; null when there is none",
                ),
                "words": _c(pl.List(pl.String), "quality, rating and date tags"),
                "boxes": _c(pl.List(SCORED_BOX), "watermark boxes, upright source pixels"),
                "split": _c(
                    pl.String,
                    "train or validation; forgotten in a set of a run that saw an image that was forgotten since",
                ),
                "stable": _c(pl.Boolean, "on the list of the stable training loss"),
            },
        ),
        Table(
            "base_model",
            "model",
            ("name",),
            {
                "name": _c(pl.String, "name under [models]"),
                "checkpoint": _c(pl.String, "base.<digest8>@0"),
                "family": _c(pl.String, "sdxl or sd1"),
                "digest": _c(pl.String, "SHA-256 over names and contents"),
                "num_parameters": _c(pl.Int64, "of UNet and text encoders"),
                "prediction_type": _c(pl.String, "epsilon or v_prediction"),
                "parents": _c(pl.List(pl.String), "digests it was made from"),
            },
        ),
        Table(
            "prompt_statistics",
            "statistic x key",
            ("statistic", "key"),
            {
                "statistic": _c(
                    pl.String,
                    "num_tags, num_tokens, num_chunks, num_truncated, tag, kind, caption or spelling",
                ),
                "key": _c(pl.String, "value or tag"),
                "count": _c(pl.Int64, "prompts"),
            },
        ),
        Table(
            "checkpoints",
            "checkpoint",
            ("checkpoint",),
            {
                "checkpoint": _c(pl.String, "<run>@<samples_seen>"),
                "run": _c(pl.String, "training run"),
                "samples_seen": _c(pl.Int64, "the clock"),
                "folder": _c(pl.String, "folder under the run's checkpoints/"),
                "digest": _c(pl.String, "SHA-256 over the weights"),
                "training_set": _c(pl.String, "fingerprint of the set it was trained on"),
                "validation_loss": _c(
                    pl.Float64, "plain loss when it was saved; null before the first", 1e-4
                ),
            },
        ),
        Table(
            "prompt_sets",
            "prompt",
            ("prompt_id",),
            {
                "prompt_id": _c(pl.String, "identity within the set"),
                "text": _c(pl.String, "prompt"),
                "negative": _c(pl.String, "negative prompt; empty string for none"),
                "group": _c(pl.String, "label under which it is reported"),
                "height": _c(pl.Int32, "px"),
                "width": _c(pl.Int32, "px"),
                "seed": _c(pl.Int64, "from SHA-256 of prompt_id: inserting one moves no other"),
            },
        ),
        Table(
            "sample_images",
            "sample image",
            ("prompt_id",),
            {
                "prompt_id": _c(pl.String, "prompt of the set"),
                "text": _c(pl.String, "prompt"),
                "negative": _c(pl.String, "negative prompt"),
                "group": _c(pl.String, "label of the prompt"),
                "seed": _c(pl.Int64, "seed of its own generator"),
                "height": _c(pl.Int32, "px"),
                "width": _c(pl.Int32, "px"),
                "file": _c(
                    pl.String,
                    "PNG under sample_images/<checkpoint>/; null where the picture is not finite",
                ),
                "sha256": _c(pl.String, "of the decoded pixels", 0.0),
            },
        ),
        Table(
            "eval_metrics",
            "sample image x metric, and summary",
            ("prompt_id", "metric"),
            {
                "prompt_id": _c(pl.String, "prompt of the set; null in a summary row"),
                "group": _c(pl.String, "label of the prompt; null in a summary row"),
                "metric": _c(
                    pl.String,
                    "clip_score, aesthetic, a further scorer, saturation, contrast, detail, uniform_border, "
                    "train_similarity, embedding or failed; or a column of the summary (docs/scores.md)",
                ),
                "value": _c(pl.Float64, "the number; null in `embedding` and `failed` rows", 1e-3),
                "embedding": _c(
                    pl.List(pl.Float32),
                    "projected features of the picture, in `embedding` rows",
                    1e-4,
                ),
                "image_id": _c(
                    pl.String,
                    "the training image nearest to the picture, in `train_similarity` rows",
                    0.0,
                ),
                "reason": _c(pl.String, "why the picture could not be scored, in `failed` rows"),
            },
        ),
        Table(
            "verdicts",
            "metric x group",
            ("metric", "group"),
            {
                "metric": _c(pl.String, "clip_score or aesthetic"),
                "group": _c(
                    pl.String,
                    "prompts compared: a label, `all`, or `held-out half` for the best of many",
                ),
                "a": _c(pl.String, "checkpoint compared against"),
                "b": _c(pl.String, "checkpoint judged"),
                "num_prompts": _c(pl.Int64, "pairs"),
                "mean_a": _c(pl.Float64, "mean of a", 1e-3),
                "mean_b": _c(pl.Float64, "mean of b", 1e-3),
                "difference": _c(pl.Float64, "mean of b - a", 1e-3),
                "low": _c(pl.Float64, "lower end of the 95 % t interval", 1e-3),
                "high": _c(pl.Float64, "upper end", 1e-3),
                "p_value": _c(pl.Float64, "two-sided paired t, before Holm", 1e-2),
                "p_holm": _c(pl.Float64, "after Holm over the metrics of the group", 1e-2),
                "margin": _c(pl.Float64, "difference that matters in practice"),
                "win_rate": _c(pl.Float64, "share of prompts where b scores higher", 0.05),
                "verdict": _c(pl.String, "better, worse, same, unclear or too_few_prompts"),
                "num_needed": _c(
                    pl.Int64,
                    "prompts that would decide, for the held-out half those of the whole set; null when decided",
                ),
            },
        ),
        Table(
            "release",
            "file",
            ("file",),
            {
                "file": _c(pl.String, "path inside the release folder"),
                "about": _c(pl.String, "what it is"),
                "bytes": _c(pl.Int64, "size"),
                "sha256": _c(pl.String, "of the content"),
            },
        ),
    )
}

for _name in ("embeddings", "tags", "captions", "watermark_boxes"):
    TABLES[f"kept_{_name}"] = Table(
        f"kept_{_name}", "image x model, of images that were missing from their shard", TABLES[_name].key,
        TABLES[_name].columns,
    )  # fmt: skip


def rejections(stage: str, rows: list[dict[str, object]]) -> pl.DataFrame:
    """Rows for `rejected_images`: each a dict with reason and any of source, source_id, image_id,
    value, limit, detail.

    Raises:
        DataError: a reason outside of the closed list.
    """
    table = TABLES["rejected_images"]
    for row in rows:
        if row["reason"] not in set(Reason):
            raise DataError(
                f"stage {stage}: reason {row['reason']!r} is not in the closed list {sorted(Reason)}"
            )
    full = [
        {
            name: str(value) if (value := {**row, "stage": stage}.get(name)) is not None else None
            for name in table.columns
        }
        for row in rows
    ]
    return pl.DataFrame(full, schema=table.schema) if full else table.empty()


PART_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bucket_assignments": ("encoding",),
    "latents": ("encoding", "shard"),
    "training_set": ("encoding",),
    "prompt_statistics": ("run",),
    "prompt_sets": ("prompt_set",),
    "sample_images": ("checkpoint", "run"),
    "eval_metrics": ("checkpoint", "run"),
    "release": ("run",),
}
"""Of tables whose keys recur from part to part: columns in SQL that tell a row's part."""


def part_values(table: str, part: str) -> dict[str, str | None]:
    """Values of a part's `PART_COLUMNS`; the run of a model without one is None.

    Args: table: Name of the table. part: Name of the part: a checkpoint, a run, an encoding,
        `<encoding>|<shard>`, or a prompt set.
    """
    names = PART_COLUMNS.get(table, ())
    if names == ("checkpoint", "run"):
        run = None if part.startswith(RESERVED) else part.rpartition("@")[0]
        return {"checkpoint": part, "run": run}
    return dict(zip(names, part.split("|"), strict=True)) if names else {}


def markdown() -> str:
    """`docs/tables.md`: every table with its columns."""
    lines = [
        "# Tables",
        "",
        "Made from `training/tables/schemas.py` by `python -m training.tables.schemas`. A tolerance marks outputs of",
        "models: equal inputs may differ by so much between machines; all else is equal everywhere.",
        "",
        f"Reasons in `rejected_images`, a closed list: {', '.join(f'`{reason}`' for reason in Reason)}.",
    ]
    for table in TABLES.values():
        key = ", ".join(f"`{name}`" for name in table.key) or "none"
        told = " and ".join(f"`{name}`" for name in PART_COLUMNS.get(table.name, ()))
        more = f" In SQL also {told}, first." if told else ""
        lines += ["", f"## {table.name}", "", f"One row per {table.row}. Key: {key}.{more}", ""]
        lines += ["| column | type | meaning | tolerance |", "| --- | --- | --- | --- |"]
        for name, column in table.columns.items():
            tolerance = "" if column.tolerance is None else f"{column.tolerance:g}"
            lines.append(
                f"| `{name}` | {str(column.dtype).replace('|', ' ')} | {column.about} | {tolerance} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
