"""`sample_images`: what a checkpoint draws for the fixed prompts, each image from its own
seed."""

import contextlib
from pathlib import Path

import dagster as dg
import polars as pl

from assets.metadata import materialize
from resources.engine.workers import Workers, WorkerSpec
from resources.graph import Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.errors import DataError, PipelineError
from training.images import figures
from training.models.base_model import config_folder
from training.names import CheckpointName
from training.progress import report
from training.runs.retention import reading
from training.runs.run_folder import READY
from training.sampling.image_files import read_image
from training.sampling.prompt_reading import read_set, remarks
from training.sampling.sampling_inputs import input_digests

NUM_SHOWN = 16
WANTED_BY = "evaluation"
"""Under which a checkpoint is kept until its images are drawn."""


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the checkpoint's weights, averaged ones and LoRAs where they are used, and of the
    prompts."""
    manifest = store.manifest("prompt_sets", store.config.evaluation.prompt_set)
    prompts = manifest.digest if manifest else "absent"
    try:
        further = input_digests(
            store.checkpoints.folder(key), store.config.evaluation.sampling, store.home
        )
        return {"checkpoint": store.checkpoints.digest(key), "prompts": prompts, **further}
    except PipelineError:
        if not CheckpointName.parse(key).is_external:
            raise
        return {
            "checkpoint": "absent",
            "prompts": prompts,
        }  # whoever draws it says why; all others can be judged


@Stage(
    version=2,
    scope=Scope.CHECKPOINT,
    group="evaluate",
    kinds=("pytorch", "huggingface"),
    follows=(Reads("checkpoints"), Reads("base_model"), Reads("prompt_sets")),
    config=lambda config, key: config.evaluation.sampling,
    settings="evaluation.sampling",
    others=_inputs,
)
def sample_images(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per prompt: the image that this checkpoint drew, from a seed that never changes."""

    def make(key: str) -> Made:
        from training.models.text_encoders import load_tokenizer
        from training.sampling.prompt_encoding import cut_prompts
        from training.sampling.sampling import sample_folder

        prompts, sampling = prompts_of(store), store.config.evaluation.sampling
        odd = remarks(prompts, read_set(prompts, sampling))
        folder, model = store.paths.sample_folder(key), store.checkpoints.folder(key)
        # A checkpoint of a run that is still training is not to be removed while it is read.
        kept = reading(model) if (model / READY).is_file() else contextlib.nullcontext()
        with kept:
            cut = cut_prompts(prompts, load_tokenizer(config_folder(model) / "tokenizer"), sampling)
            frame = sample_folder(
                model, key, prompts, sampling, folder, home=store.home, map_batches=workers.map,
                progress=lambda done, total: report("sample images", done, total),
            )  # fmt: skip
        failed = frame["file"].null_count()
        return Made(
            frame=frame,
            rows_in=prompts.height,
            report={
                "pictures": {"pictures": sheet(folder, frame)},
                "numbers": {"images that are not finite": failed} if failed else {},
                "tables": {
                    "prompts longer than what is read": cut,
                    "prompts read otherwise than they look": odd,
                },
            },
        )

    from training.sampling.sampling import ImageSampler

    spec = WorkerSpec(make=ImageSampler, kind="evaluate")
    with Workers(spec, store.config.devices, store.home, say=context.log.info) as workers:
        result = materialize(context, store, sample_images, make)
    for key in context.partition_keys:
        store.checkpoints.let_go(key, WANTED_BY)
    return result


def prompts_of(store: Store) -> pl.DataFrame:
    """The prompt set of the workspace's evaluation.

    Raises:
        DataError: there is none of that name, it is not committed yet, or no prompt could be made
            for it.
    """
    name = store.config.evaluation.prompt_set
    if store.manifest("prompt_sets", name) is None:
        known = ", ".join(sorted(store.config.prompt_sets)) or "none"
        raise DataError(
            f"evaluation.prompt_set = {name!r} is not committed; [prompt_sets] has: {known}"
        )
    prompts = store.read("prompt_sets", parts=[name])
    if prompts.is_empty():
        raise DataError(
            f"prompt set {name!r} is empty: no held-out image has a caption or tags of its own; write a "
            "prompt file, or give it groups"
        )
    return prompts


def sheet(folder: Path, frame: pl.DataFrame) -> str:
    """A contact sheet of the first images, captioned with their prompts."""
    shown = frame.filter(pl.col("file").is_not_null()).head(NUM_SHOWN)
    return figures.contact_sheet(
        [read_image(folder / file) for file in shown["file"]], shown["text"].to_list()
    )
