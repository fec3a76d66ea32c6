"""`foundry score`: scores folders of images that were made anywhere with the workspace's
networks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resources.engine.workers import Workers, WorkerSpec
from resources.workspace.store import Store

if TYPE_CHECKING:
    from training.evaluation.external_images import Outcome


def score_folder(store: Store, folder: Path, prompts: Path, out: Path) -> Iterator["Outcome"]:
    """Score the images of each model in `folder`, see `training/evaluation/external_images.py`.

    Args:
        store: Whose networks, devices and `[evaluation.scoring]` are used.
        folder: A folder of images per model.
        prompts: CSV with a column `Prompts`, or a prompt file.
        out: Where the tables go.

    Yields:
        What became of each model, as it is done.

    Raises:
        EvaluationError: the CSV or an image's name cannot be used.
        ModelError: weights are missing, or of another model.
    """
    from training.evaluation import external_images
    from training.evaluation.clip_score import load_networks

    config, read = store.config.evaluation.scoring, external_images.read_prompts(prompts)
    models = external_images.find_models(folder, read)
    names = ("clip", "aesthetic", *config.scorers)
    spec = WorkerSpec(
        make=load_networks, arguments=({name: store.models.path(name) for name in names},),
        kind="evaluate",
    )  # fmt: skip
    with Workers(spec, store.config.devices, store.home) as workers:
        yield from external_images.score_models(
            models,
            read,
            out,
            workers,
            digests={name: store.models.digest(name) for name in names},
            decode=store.config.decode,
            batch_size=config.batch_size,
        )
