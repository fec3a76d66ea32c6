"""Every stage by name, and the modules that hold their assets: what the graph is made of."""

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

STAGES = {
    stage.name: stage
    for stage in (
        raw_images.LISTING,
        raw_images.RAW_IMAGES,
        *annotations.STAGES.values(),
        duplicates.STAGE,
        quality.PAIRS,
        quality.MODEL,
        quality.SCORES,
        tags.STAGE,
        selection.STAGE,
        bucket_assignments.STAGE,
        latents.STAGE,
        training_set.STAGE,
        base_model.STAGE,
        prompt_statistics.STAGE,
        checkpoints.STAGE,
        prompt_sets.STAGE,
        sample_images.STAGE,
        eval_metrics.METRICS,
        verdicts.VERDICTS,
        release.STAGE,
    )
}
"""Every stage by the name of its asset, each after all that it reads: the order of `foundry
run`."""
