"""Whole tables, rewritten in seconds: duplicates, vocabulary, quality model, selection."""

import dagster as dg

JOB = dg.define_asset_job(
    "curate",
    selection=dg.AssetSelection.assets(
        "duplicate_groups", "tag_vocabulary", "quality_pairs", "quality_model", "selected_images"
    ),
    description="Rewrite the tables that say which pictures go on and why.",
)
