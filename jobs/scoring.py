"""`foundry score`: scores folders of pictures that were made anywhere with the workspace's
networks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resources import devices
from resources.workspace.store import Store

if TYPE_CHECKING:
    from training.evaluation.external_images import Outcome


def score_folder(store: Store, folder: Path, prompts: Path, out: Path) -> Iterator["Outcome"]:
    """Score the pictures of each model in `folder`, see `training/evaluation/external_images.py`.

    Args:
        store: Whose networks, devices and `[evaluation.scoring]` are used.
        folder: A folder of pictures per model.
        prompts: CSV with a column `Prompts`, or a prompt file.
        out: Where the tables go.

    Yields:
        What became of each model, as it is done.

    Raises:
        EvaluationError: the CSV or a picture's name cannot be used.
        ModelError: weights are missing, or of another model.
    """
    from training.annotators.aesthetic import Aesthetic
    from training.annotators.clip import Clip
    from training.evaluation import external_images, scorers
    from training.evaluation.clip_score import Networks

    config, read = store.config.evaluation.scoring, external_images.read_prompts(prompts)
    models = external_images.find_models(folder, read)
    with devices.hold("evaluate", store.config.devices, store.home) as device:

        def load() -> Networks:
            return Networks(
                clip=Clip.load(store.models.path("clip"), device),
                aesthetic=Aesthetic.load(store.models.path("aesthetic"), device),
                scorers=scorers.load(
                    {name: store.models.path(name) for name in config.scorers}, device
                ),
            )

        yield from external_images.score_models(
            models,
            read,
            out,
            load,
            digests={
                name: store.models.digest(name) for name in ("clip", "aesthetic", *config.scorers)
            },
            decode=store.config.decode,
            batch_size=config.batch_size,
        )
