"""The one `Definitions`: every asset, check, job, schedule and sensor of the code location `foundry`."""

import dagster as dg

from assets import (
    annotations,
    base_model,
    bucket_assignments,
    checkpoints,
    checks,
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
from jobs import annotate, curate, encode, evaluate, schedules, sensors, train
from resources.handles import io_manager, store_resource

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
"""Every stage by the name of its asset, each after all that it reads: the order of `foundry run`."""

defs = dg.Definitions(
    assets=dg.load_assets_from_modules(
        [
            raw_images,
            annotations,
            duplicates,
            quality,
            tags,
            selection,
            bucket_assignments,
            latents,
            training_set,
            base_model,
            prompt_statistics,
            checkpoints,
            prompt_sets,
            sample_images,
            eval_metrics,
            verdicts,
            release,
        ]
    ),
    asset_checks=checks.ALL,
    jobs=[annotate.JOB, curate.JOB, encode.JOB, encode.REENCODE_JOB, train.JOB, evaluate.JOB],
    schedules=schedules.ALL,
    sensors=sensors.ALL,
    resources={"store": store_resource, "io_manager": io_manager},
    executor=dg.in_process_executor,
)
