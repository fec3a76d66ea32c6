"""A training run as one folder for a machine that has neither Dagster nor MLflow, and its way back.

The folder holds config, training set, latents, base model or newest checkpoint, and `start.sh`; it
needs this package's wheel and what `requirements.txt` names. Its `runs/<run>` copied back over the
workspace's is the run, as if it had been trained there.
"""

import dataclasses
import importlib.metadata
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from training import commit
from training.config.run import EIGHT_BIT, RunConfig
from training.errors import ConfigError, DamageError, DataError
from training.latents.generations import Generation, read_generation
from training.latents.source import LatentSource
from training.models.base_model import config_folder
from training.models.trainables import trainable_of
from training.progress import track
from training.runs import run_folder
from training.runs.resumable import find_resumable
from training.runs.run_folder import RunInputs, checked_training_set
from training.runs.training_set import shards_of

PACKAGES = (
    "torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "polars", "pyarrow", "tomlkit",
    "fsspec", "zstandard", "pytorch-optimizer",
)  # fmt: skip
"""What training imports, and nothing else of what this project needs."""

_START = """#!/usr/bin/env bash
# Trains run {name}; started again, it goes on from its newest whole checkpoint. SIGTERM saves and stops.
#   one machine:   ./start.sh                      (GPUS=8 for another number of cards than {ranks})
#   n machines:    NODES=2 HEAD=head.example:29500 ./start.sh    on each; all must see this folder at the same path
set -euo pipefail
cd "$(dirname "$0")"
python -c 'import training' || {{ echo "install the wheel: pip install --no-deps diffusion_foundry-*.whl, and
pip install -r requirements.txt" >&2; exit 2; }}
exec python -m torch.distributed.run \\
  --nnodes "${{NODES:-1}}" --nproc-per-node "${{GPUS:-{ranks}}}" \\
  --rdzv-backend c10d --rdzv-endpoint "${{HEAD:-localhost:0}}" --rdzv-id {name} --shutdown-timeout 3600 \\
  -m training.loop.run runs/{name}
"""
_README = """# Training run {name}

Made by `foundry train --run {name} --bundle`. On the machine with the cards:

1. `pip install -r requirements.txt` and `pip install --no-deps diffusion_foundry-*.whl` (`make wheel` in the repository
   makes it); neither Dagster nor MLflow is needed.
2. `./start.sh` (its first lines say how for several machines).
3. Copy `runs/{name}` back over the workspace's folder of that name; `foundry train --run {name}` adopts it.
"""


def write_bundle(run: Path, target: Path) -> int:
    """Write a run with all that it needs into a new folder, all or nothing.

    Args:
        run: The run's folder, with its inputs; a run that was stopped goes on in the bundle where
            it stands.
        target: Must not exist, or be empty.

    Returns:
        Its size, bytes.

    Raises:
        ConfigError: the target is in the way, or the run is being trained or has finished.
        DataError: images of the set have no latents.
        DamageError: a file that the run reads is gone.
        WorkspaceError: the disk is full; nothing is left behind.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--bundle {target} exists already; name a new folder")
    config, inputs = run_folder.read_config(run), run_folder.read_inputs(run)
    resumable, _ = find_resumable(run)
    with commit.atomic_folder(target) as folder:
        copied = folder / "runs" / inputs.run
        moved = dataclasses.replace(
            inputs,
            training_set=_copy(inputs.training_set, folder / "tables" / "training_set"),
            vocabulary=_copy(inputs.vocabulary, copied),
            latents=folder / "latents" / config.encoding,
            base_model=folder / "models" / inputs.base_model.name,
            vae=None if inputs.vae is None else folder / "vae",
        )
        _copy(run / run_folder.CONFIG, copied)
        run_folder.write_inputs(copied, moved)
        if resumable is None or trainable_of(config).needs_base:
            for part in {inputs.base_model, config_folder(inputs.base_model)}:
                _copy(part, moved.base_model.parent)
            if inputs.vae is not None:
                _copy(inputs.vae, folder, "vae")
        if resumable is not None:
            _copy(run / run_folder.EVENTS, copied)
            _copy(run / run_folder.EPOCHS, copied)
            _copy(resumable, copied / run_folder.CHECKPOINTS)
        if not config.latents_url:
            _copy_latents(inputs, run_folder.pinned_latents(copied), moved.latents)
        (folder / "README.md").write_text(_README.format(name=inputs.run))
        (folder / "requirements.txt").write_text(_requirements(config))
        start = folder / "start.sh"
        start.write_text(_START.format(name=shlex.quote(inputs.run), ranks=config.num_processes))
        start.chmod(0o755)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _copy(source: Path, folder: Path, name: str = "") -> Path:
    """Copy a file or folder into a folder, which is made where missing; nothing where there is no
    source."""
    target = folder / (name or source.name)
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)
    return target


def _copy_latents(
    inputs: RunInputs, pins: Iterable[Mapping[str, Mapping[str, Any]]], target: Path
) -> None:
    """Copy of each shard the generations that the run's epochs have pinned, and the one that the
    next epoch would pin.

    Raises:
        DataError: no generation holds all images of the set.
        DamageError: a generation or a file of one is gone.
    """
    pinned = defaultdict[str, set[int]](set)
    for pin in pins:
        for shard, chosen in pin.items():
            pinned[shard].add(chosen["generation"])
    source = LatentSource(inputs.latents, vae_digest=inputs.vae_digest)
    samples = shards_of(checked_training_set(inputs))
    shards = samples.group_by("shard", maintain_order=True)
    for (shard,), rows in track(shards, "shards of latents", samples["shard"].n_unique()):
        generation, missing, notes = source.choose(str(shard), rows["image_id"].to_list())
        if generation is None:
            raise DataError(
                f"{missing} images of shard {shard} have no latents in {inputs.latents}"
                f"{''.join('; ' + note for note in notes[:3])}: run `foundry run --select latents` before the run is "
                "bundled"
            )
        for number in sorted(pinned[str(shard)] | {generation.number}):
            _copy_generation(read_generation(generation.folder, number), target / str(shard))


def _copy_generation(generation: Generation, target: Path) -> None:
    """Copy a generation of a shard, its manifest last.

    Raises:
        DamageError: a file of it is gone.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (
        *(entry.name for entry in generation.manifest.files),
        generation.name.manifest,
    ):
        try:
            shutil.copyfile(generation.folder / name, target / name)
        except FileNotFoundError:
            raise DamageError(
                f"{generation.folder / name} is missing, which generation {generation.number} names and the run reads"
            ) from None


def _requirements(config: RunConfig) -> str:
    """The packages that the run imports, without local tags: pinned to the versions that are
    installed here.

    Raises:
        ConfigError: `latents_url` is of a protocol that fsspec does not know.
    """
    names = [*PACKAGES, *_optional_packages(config)]
    return "".join(f"{name}{_pin(name)}\n" for name in names)


def _optional_packages(config: RunConfig) -> list[str]:
    """What only the options of a run need: its 8-bit optimizer, and where its latents are fetched
    from."""
    found = ["bitsandbytes"] if config.optimizer.name in EIGHT_BIT else []
    for url in config.latents_url.split("::"):
        protocol = fsspec.core.split_protocol(url)[0]
        if protocol is None:
            continue
        if protocol not in known_implementations:
            raise ConfigError(
                f"latents_url={config.latents_url!r}: fsspec knows no protocol {protocol!r}"
            )
        found += _packages_of(known_implementations[protocol]["class"])
    return found


def _packages_of(filesystem: str) -> list[str]:
    """What a class of fsspec's file systems needs beside fsspec: the extra of fsspec for it, else
    its own package."""
    extras = importlib.metadata.metadata("fsspec").get_all("Provides-Extra") or []
    if extra := [
        name for name in extras if known_implementations.get(name, {}).get("class") == filesystem
    ]:
        return [f"fsspec[{extra[0]}]"]
    module = filesystem.partition(".")[0]
    return [] if module == "fsspec" else [module.replace("_", "-")]


def _pin(name: str) -> str:
    """`==version` of a package; nothing where it is not installed here."""
    try:
        return f"=={importlib.metadata.version(name.partition('[')[0]).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return ""
