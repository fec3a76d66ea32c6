"""Tables of images: from what a source lists to what goes on to training."""

import polars as pl

from training.tables.table import (
    BOX,
    IMAGE_ID,
    MODEL,
    SCORED_BOX,
    SCORED_TAG,
    TAG,
    UTC,
    Table,
    column,
)

IMAGES = (
    Table(
        "source_listing",
        "candidate",
        ("source", "source_id"),
        {
            "source": column(pl.String, "name of the source in foundry.toml"),
            "source_id": column(
                pl.String,
                "identity within the source: the relative path, odd bytes percent-encoded",
            ),
            "locator": column(pl.String, "where the bytes are, relative to the source"),
            "shard": column(pl.String, "partition, given when first listed and kept"),
            "bytes": column(pl.Int64, "size when listed"),
            "modified_ns": column(
                pl.Int64,
                "modification time when listed, ns since 1970; only a reason to read again",
            ),
            "gone_at": column(UTC, "when a listing first missed it; null while it is there"),
            "tags": column(pl.List(TAG), "the source's own tags, canonical form, with category"),
            "rating": column(
                pl.String, "general, sensitive, questionable, explicit; null when unknown"
            ),
            "favourites": column(pl.Int64, "how many people marked it; null when unknown"),
            "created_at": column(UTC, "when it was published; null when unknown"),
            "caption": column(pl.String, "the source's own sentence"),
            "split": column(pl.String, "the source's own split, honoured: train or validation"),
            "crop_box": column(BOX, "crop wished by the source, upright source pixels"),
        },
    ),
    Table(
        "raw_images",
        "accepted candidate",
        ("source", "source_id"),
        {
            "source": column(pl.String, "name of the source"),
            "source_id": column(pl.String, "identity within the source"),
            "image_id": IMAGE_ID,
            "locator": column(pl.String, "where the bytes are, relative to the source"),
            "height": column(pl.Int32, "upright height, px"),
            "width": column(pl.Int32, "upright width, px"),
            "stored_height": column(pl.Int32, "height as stored, px"),
            "stored_width": column(pl.Int32, "width as stored, px"),
            "orientation": column(pl.Int8, "EXIF orientation 1-8; 1 when absent or invalid"),
            "format": column(pl.String, "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or MPO"),
            "mode": column(pl.String, "Pillow mode as stored"),
            "bytes": column(pl.Int64, "file size"),
            "dpi": column(pl.Float64, "what the file says; null when it says nothing"),
            "pixel_digest": column(pl.String, "SHA-256 of size and upright 8-bit sRGB pixels"),
            "phash": column(pl.UInt64, "64-bit DCT perceptual hash of the upright image"),
            "phash_mirrored": column(pl.UInt64, "the same of its mirror image"),
            "brightness": column(pl.Float32, "mean luma, 0-1"),
            "contrast": column(pl.Float32, "standard deviation of luma, 0-1"),
            "sharpness": column(pl.Float32, "variance of the Laplacian of luma at 256 px"),
        },
    ),
    Table(
        "rejected_images",
        "candidate, image, sidecar or folder",
        (),
        {
            "stage": column(pl.String, "stage that could not use it"),
            "source": column(pl.String, "name of the source; null for an image"),
            "source_id": column(pl.String, "identity within the source; null for an image"),
            "image_id": column(pl.String, "SHA-256 of the bytes; null when they were never read"),
            "reason": column(pl.String, "one of the closed list of reasons"),
            "value": column(pl.String, "what was found; the path of a sidecar or folder"),
            "limit": column(pl.String, "what was allowed"),
            "detail": column(pl.String, "the decoder's words, one line"),
        },
    ),
    Table(
        "embeddings",
        "image x model",
        ("image_id", "model"),
        {
            "image_id": IMAGE_ID,
            "model": MODEL,
            "vector": column(
                pl.List(pl.Float32),
                "CLS of the vision model's last hidden state before its last norm",
                1e-3,
            ),
            "projection": column(
                pl.List(pl.Float32), "projected image features, L2-normalised", 1e-4
            ),
        },
    ),
    Table(
        "tags",
        "image x model",
        ("image_id", "model"),
        {
            "image_id": IMAGE_ID,
            "model": MODEL,
            "tags": column(
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
            "image_id": IMAGE_ID,
            "model": MODEL,
            "caption": column(pl.String, "one sentence; null: looked, none found"),
        },
    ),
    Table(
        "watermark_boxes",
        "image x model",
        ("image_id", "model"),
        {
            "image_id": IMAGE_ID,
            "model": MODEL,
            "boxes": column(
                pl.List(SCORED_BOX), "upright source pixels; empty: looked, none found", 0.5
            ),
        },
    ),
    Table(
        "duplicate_groups",
        "candidate in a group",
        ("source", "source_id"),
        {
            "group": column(pl.String, "the smallest image_id of the group"),
            "source": column(pl.String, "name of the source"),
            "source_id": column(pl.String, "identity within the source"),
            "image_id": IMAGE_ID,
            "kind": column(
                pl.String,
                "what ties it to the one kept: exact, pixels or near; `kept` for the kept one",
            ),
            "kept": column(pl.Boolean, "this one goes on"),
            "why": column(pl.String, "the rule that kept or dropped it"),
        },
    ),
    Table(
        "quality_pairs",
        "judgement",
        ("pair_id",),
        {
            "pair_id": column(pl.String, "identity of the judgement"),
            "a": column(pl.String, "image_id shown first"),
            "b": column(pl.String, "image_id shown second"),
            "outcome": column(pl.String, "a, b, tie, both_junk or skip"),
            "rater": column(pl.String, "who judged"),
            "origin": column(pl.String, "human, vlm, synthetic or scripted"),
            "created_at": column(UTC, "when"),
        },
    ),
    Table(
        "quality_model",
        "model",
        ("model",),
        {
            "model": column(pl.String, "`fitted` from this workspace's judgements, or `supplied`"),
            "file": column(pl.String, "safetensors with both heads, beside this table"),
            "num_pairs": column(pl.Int64, "judgements it was fitted on"),
            "cut_points": column(
                pl.List(pl.Float64), "eight ascending utilities that part scores 1-9", 1e-2
            ),
            "report": column(
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
            "image_id": IMAGE_ID,
            "utility": column(pl.Float32, "Bradley-Terry utility", 1e-2),
            "percentile": column(pl.Float32, "share of the cut points' pool below it, 0-1", 1e-2),
            "score": column(pl.Int8, "0 junk, 1-9 by frozen quantile cut points", 1),
            "junk_prob": column(pl.Float32, "probability of junk", 1e-2),
            "aesthetic": column(pl.Float32, "LAION aesthetic score, about 1-10", 1e-2),
            "brightness": column(pl.Float32, "as raw_images"),
            "contrast": column(pl.Float32, "as raw_images"),
            "sharpness": column(pl.Float32, "as raw_images"),
            "bytes_per_pixel": column(pl.Float32, "file size over upright pixels"),
        },
    ),
    Table(
        "tag_vocabulary",
        "tag",
        ("tag",),
        {
            "tag": column(pl.String, "canonical lower_snake name"),
            "tag_id": column(pl.Int32, "rank by name"),
            "category": column(pl.String, "general, artist, character, copyright, meta or rating"),
            "aliases": column(pl.List(pl.String), "names that mean it"),
            "num_images": column(pl.Int64, "images that carry it from any origin"),
            "num_source": column(pl.Int64, "images whose source says so"),
            "num_tagger": column(pl.Int64, "images whose tagger says so at the threshold"),
            "pieces": column(pl.List(pl.String), "what CLIP's tokenizer makes of it"),
        },
    ),
    Table(
        "selected_images",
        "image",
        ("image_id",),
        {
            "image_id": IMAGE_ID,
            "source": column(pl.String, "source of the candidate that stands for the image"),
            "source_id": column(pl.String, "its identity there"),
            "locator": column(pl.String, "where its bytes are, relative to the source"),
            "shard": column(pl.String, "its partition"),
            "height": column(pl.Int32, "upright height, px"),
            "width": column(pl.Int32, "upright width, px"),
            "kept": column(pl.Boolean, "goes on to training or validation"),
            "rule": column(pl.String, "the first rule that dropped it; null when kept"),
            "value": column(pl.String, "what the rule saw"),
            "limit": column(pl.String, "what the rule allows"),
            "split": column(pl.String, "train or validation; null when dropped"),
            "stable": column(pl.Boolean, "on the list of the stable training loss"),
            "cluster": column(pl.String, "duplicate group, or its own id: never parted by a split"),
            "score": column(pl.Int8, "quality 0-9", 1),
            "tags": column(pl.List(TAG), "canonical tags, sorted by name, of source and tagger"),
            "caption": column(
                pl.String,
                "the source's sentence, or several, a line each; null when it has none",
            ),
            "made_caption": column(
                pl.String,
                "a model's sentence, or several, a line each; null when there is none",
            ),
            "words": column(pl.List(pl.String), "quality, rating and date tags of the source"),
            "watermark": column(pl.Boolean, "a watermark box above the threshold"),
            "boxes": column(
                pl.List(SCORED_BOX),
                "watermark boxes above the threshold, upright source pixels",
                0.5,
            ),
            "flip": column(pl.Boolean, "mirror it when encoding"),
            "crop_box": column(BOX, "crop wished by the source"),
        },
    ),
)
