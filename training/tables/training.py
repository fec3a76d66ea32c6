"""Tables of training and evaluation: from buckets to the release."""

import polars as pl

from training.tables.table import (
    IMAGE_ID,
    SCORED_BOX,
    TAG,
    Table,
    column,
)

TRAINING = (
    Table(
        "bucket_assignments",
        "kept image",
        ("image_id",),
        {
            "image_id": IMAGE_ID,
            "shard": column(pl.String, "its partition"),
            "height": column(pl.Int32, "upright source height, px"),
            "width": column(pl.Int32, "upright source width, px"),
            "bucket_height": column(pl.Int32, "training resolution, px"),
            "bucket_width": column(pl.Int32, "training resolution, px"),
            "resized_height": column(pl.Int32, "height after the resize, px"),
            "resized_width": column(pl.Int32, "width after the resize, px"),
            "slack_height": column(pl.Int32, "rows a crop may choose among"),
            "slack_width": column(pl.Int32, "columns a crop may choose among"),
            "padding_height": column(pl.Int32, "rows that fill the bucket up; 0 unless padded"),
            "padding_width": column(pl.Int32, "columns that fill the bucket up; 0 unless padded"),
            "padded": column(pl.Boolean, "fitted into its bucket whole, instead of cropped"),
            "area_kept": column(pl.Float64, "share of the image's area inside the crop"),
        },
    ),
    Table(
        "latents",
        "kept image",
        ("image_id",),
        {
            "image_id": IMAGE_ID,
            "file": column(pl.String, "latent file of this shard and generation"),
            "row": column(pl.Int32, "row in that file"),
            "bucket_height": column(pl.Int32, "px"),
            "bucket_width": column(pl.Int32, "px"),
            "original_height": column(pl.Int32, "upright source, px"),
            "original_width": column(pl.Int32, "upright source, px"),
            "resized_height": column(pl.Int32, "px"),
            "resized_width": column(pl.Int32, "px"),
            "crop_top": column(pl.Int32, "px of the resized image"),
            "crop_left": column(pl.Int32, "px of the resized image"),
            "pad_top": column(pl.Int32, "rows of padding above the resized image"),
            "pad_left": column(pl.Int32, "columns of padding on its left, before the mirroring"),
            "flip": column(pl.Boolean, "mirrored after the crop"),
            "encoded_in": column(
                pl.Int32, "generation that encoded it; an older one's row is copied as it is"
            ),
        },
        has_generations=True,
    ),
    Table(
        "training_set",
        "sample",
        ("image_id",),
        {
            "image_id": IMAGE_ID,
            "shard": column(pl.String, "partition of its latents"),
            "height": column(pl.Int32, "upright source height, px"),
            "width": column(pl.Int32, "upright source width, px"),
            "bucket_height": column(pl.Int32, "px"),
            "bucket_width": column(pl.Int32, "px"),
            "score": column(pl.Int8, "quality 1-9"),
            "tags": column(pl.List(TAG), "canonical tags, sorted by name"),
            "caption": column(
                pl.String,
                "the source's sentence, or several, a line each; null when it has none",
            ),
            "made_caption": column(
                pl.String,
                "a model's sentence, or several, a line each; null when there is none",
            ),
            "words": column(pl.List(pl.String), "quality, rating and date tags"),
            "boxes": column(pl.List(SCORED_BOX), "watermark boxes, upright source pixels"),
            "split": column(
                pl.String,
                "train or validation; forgotten in a set of a run that saw an image that was forgotten since",
            ),
            "stable": column(pl.Boolean, "on the list of the stable training loss"),
        },
    ),
    Table(
        "base_model",
        "model",
        ("name",),
        {
            "name": column(pl.String, "name under [models]"),
            "checkpoint": column(pl.String, "base.<digest8>@0"),
            "family": column(pl.String, "sdxl or sd1"),
            "digest": column(pl.String, "SHA-256 over names and contents"),
            "num_parameters": column(pl.Int64, "of UNet and text encoders"),
            "prediction_type": column(pl.String, "epsilon or v_prediction"),
            "parents": column(pl.List(pl.String), "digests it was made from"),
        },
    ),
    Table(
        "prompt_statistics",
        "statistic x key",
        ("statistic", "key"),
        {
            "statistic": column(
                pl.String,
                "num_tags, num_tokens, num_chunks, num_truncated, tag, kind, caption or spelling",
            ),
            "key": column(pl.String, "value or tag"),
            "count": column(pl.Int64, "prompts"),
        },
    ),
    Table(
        "checkpoints",
        "checkpoint",
        ("checkpoint",),
        {
            "checkpoint": column(pl.String, "<run>@<samples_seen>"),
            "run": column(pl.String, "training run"),
            "samples_seen": column(pl.Int64, "the clock"),
            "folder": column(pl.String, "folder under the run's checkpoints/"),
            "digest": column(pl.String, "SHA-256 over the weights"),
            "training_set": column(pl.String, "fingerprint of the set it was trained on"),
            "validation_loss": column(
                pl.Float64, "plain loss when it was saved; null before the first", 1e-4
            ),
        },
    ),
    Table(
        "prompt_sets",
        "prompt",
        ("prompt_id",),
        {
            "prompt_id": column(pl.String, "identity within the set"),
            "text": column(pl.String, "prompt"),
            "negative": column(pl.String, "negative prompt; empty string for none"),
            "group": column(pl.String, "label under which it is reported"),
            "height": column(pl.Int32, "px"),
            "width": column(pl.Int32, "px"),
            "seed": column(pl.Int64, "from SHA-256 of prompt_id: inserting one moves no other"),
        },
    ),
    Table(
        "sample_images",
        "sample image",
        ("prompt_id",),
        {
            "prompt_id": column(pl.String, "prompt of the set"),
            "text": column(pl.String, "prompt"),
            "negative": column(pl.String, "negative prompt"),
            "group": column(pl.String, "label of the prompt"),
            "seed": column(pl.Int64, "seed of its own generator"),
            "height": column(pl.Int32, "px"),
            "width": column(pl.Int32, "px"),
            "file": column(
                pl.String,
                "PNG under sample_images/<checkpoint>/; null where the image is not finite",
            ),
            "sha256": column(pl.String, "of the decoded pixels", 0.0),
        },
    ),
    Table(
        "eval_metrics",
        "sample image x metric, and summary",
        ("prompt_id", "metric"),
        {
            "prompt_id": column(pl.String, "prompt of the set; null in a summary row"),
            "group": column(pl.String, "label of the prompt; null in a summary row"),
            "metric": column(
                pl.String,
                "clip_score, aesthetic, a further scorer, saturation, contrast, detail, uniform_border, "
                "train_similarity, embedding or failed; or a column of the summary (docs/scores.md)",
            ),
            "value": column(pl.Float64, "the number; null in `embedding` and `failed` rows", 1e-3),
            "embedding": column(
                pl.List(pl.Float32),
                "projected features of the image, in `embedding` rows",
                1e-4,
            ),
            "image_id": column(
                pl.String,
                "the training image nearest to the image, in `train_similarity` rows",
                0.0,
            ),
            "reason": column(pl.String, "why the image could not be scored, in `failed` rows"),
        },
    ),
    Table(
        "verdicts",
        "metric x group",
        ("metric", "group"),
        {
            "metric": column(pl.String, "clip_score or aesthetic"),
            "group": column(
                pl.String,
                "prompts compared: a label, `all`, or `held-out half` for the best of many",
            ),
            "a": column(pl.String, "checkpoint compared against"),
            "b": column(pl.String, "checkpoint judged"),
            "num_prompts": column(pl.Int64, "pairs"),
            "mean_a": column(pl.Float64, "mean of a", 1e-3),
            "mean_b": column(pl.Float64, "mean of b", 1e-3),
            "difference": column(pl.Float64, "mean of b - a", 1e-3),
            "low": column(pl.Float64, "lower end of the 95 % t interval", 1e-3),
            "high": column(pl.Float64, "upper end", 1e-3),
            "p_value": column(pl.Float64, "two-sided paired t, before Holm", 1e-2),
            "p_holm": column(pl.Float64, "after Holm over the metrics of the group", 1e-2),
            "margin": column(pl.Float64, "difference that matters in practice"),
            "win_rate": column(pl.Float64, "share of prompts where b scores higher", 0.05),
            "verdict": column(pl.String, "better, worse, same, unclear or too_few_prompts"),
            "num_needed": column(
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
            "file": column(pl.String, "path inside the release folder"),
            "about": column(pl.String, "what it is"),
            "bytes": column(pl.Int64, "size"),
            "sha256": column(pl.String, "of the content"),
        },
    ),
)
