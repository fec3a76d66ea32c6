"""The modules that declare stages: whoever adds one adds its module here, after what it reads."""

from assets import (
    annotations,
    base_model,
    bucket_assignments,
    checkpoints,
    duplicates,
    eval_metrics,
    latents,
    prompt_sets,
    prompt_statistics,
    quality,
    raw_images,
    release,
    sample_images,
    selection,
    tags,
    training_set,
    verdicts,
)

MODULES = (
    raw_images, annotations, duplicates, quality, tags, selection, bucket_assignments, latents, training_set,
    base_model, prompt_statistics, checkpoints, prompt_sets, sample_images, eval_metrics, verdicts, release,
)  # fmt: skip
