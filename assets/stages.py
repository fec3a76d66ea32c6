"""The modules that declare stages, the only list of them: a new stage's module is added here. The order
of stages follows from what they read; this one counts among those that could change places."""

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
