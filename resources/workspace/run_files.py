"""Where the files that a run is made from lie in its workspace now, whatever its `inputs.json`
says."""

import contextlib
from pathlib import Path
from typing import TypedDict

from resources.workspace.store import Store
from training.config.run import RunConfig
from training.errors import ConfigError


class OwnFiles(TypedDict):
    """What `repointed` and `adopt` look for in a workspace."""

    training_sets: Path
    latents: Path
    base_model: Path | None
    vae: Path | None


def own_files(store: Store, config: RunConfig) -> OwnFiles:
    """Where the inputs of a run with this config lie in its workspace."""
    base = vae = None
    with contextlib.suppress(
        ConfigError
    ):  # foundry.toml no longer names the model: a started run has its own
        base = store.paths.resource(store.config.models.base_named(config.base).path)
    if base is not None and config.encoding in store.config.encodings:
        vae = store.models.vae_of_run(config.encoding, config.base)
    return {
        "training_sets": store.tables.folder("training_set", config.encoding),
        "latents": store.home / "latents" / config.encoding,
        "base_model": base,
        "vae": vae,
    }
