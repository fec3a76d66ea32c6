"""A run's folder: the names in it, what its launcher writes for the trainer, and which checkpoints
are complete.

Free of torch, because the launcher, the sensors and the trainer share it.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import commit, manifests, toml
from training.config import older_runs
from training.config.run import RunConfig
from training.errors import ConfigError, DamageError, DataError
from training.names import check_run_name
from training.records import read_record, write_record

FORMAT = 1
CONFIG = "config.toml"
INPUTS = "inputs.json"
VOCABULARY = "vocabulary.parquet"
EVENTS = "events.jsonl"
LOCK = "trainer.lock"
OUTPUT = "trainer.log"
EPOCHS = "epochs"
BUNDLED = "bundled.json"
"""Where the run was taken to: it is not trained here until it comes back."""
FETCHED = "latents"
"""Latent files that came from `latents_url`."""
CHECKPOINTS = "checkpoints"
READY = "READY.json"
STATE = "state"
_YOUNGER = frozenset({"tag_vocabulary", "vae", "vae_digest", "num_left_out"})
"""Keys of `inputs.json` that files of older versions lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """`inputs.json`: what a run is made from. Paths inside the workspace are stored relative to the
    run's folder, so that both can be moved together; others as they are."""

    run: str
    """Name of the run."""
    training_set: Path
    """Parquet file of the frozen set."""
    training_set_sha256: str
    """Of that file."""
    fingerprint: str
    """The set's name for its content; stands in every checkpoint."""
    vocabulary: Path
    """Categories and aliases of the set's tags, in the run's own folder."""
    vocabulary_sha256: str
    """Of that file."""
    latents: Path
    """`latents/<encoding>`: a folder per shard."""
    base_model: Path
    """Diffusers folder that an unstarted run begins from."""
    base_digest: str
    """`weights.model_digest` of that folder."""
    vae: Path | None = None
    """VAE that the latents were encoded with, where it is not the base model's own: checkpoints
    carry it."""
    vae_digest: str = ""
    """`weights.model_digest` of the VAE that the latents must have been encoded with; empty in
    files of older versions, whose latents are taken as they are."""
    tag_vocabulary: str = ""
    """Digest of the workspace's table that `vocabulary` was taken from; empty in files of older
    versions."""
    num_left_out: int = 0
    """Forgotten images of the set that the run was told to go on without; more of them stop it."""

    def __post_init__(self) -> None:
        check_run_name(self.run)


def write_inputs(folder: Path, inputs: RunInputs) -> None:
    """Write `inputs.json`; workspace and run folder can then be moved together."""
    values: dict[str, Any] = {}
    workspace = folder.parents[1]
    for item in dataclasses.fields(inputs):
        value = getattr(inputs, item.name)
        if isinstance(value, Path):
            value = (
                os.path.relpath(value, folder) if value.is_relative_to(workspace) else str(value)
            )
        values[item.name] = value
    write_record(folder / INPUTS, FORMAT, values)


def read_inputs(folder: Path) -> RunInputs:
    """Read `inputs.json`; relative paths are taken from the run's folder.

    Raises:
        ConfigError: it is missing, of another format, or lacks a key.
    """
    path = folder / INPUTS
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: start the run with `foundry train`") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    types = {item.name: item.type for item in dataclasses.fields(RunInputs)}
    names = set(values) - {"format"}
    if values.get("format") != FORMAT or names | _YOUNGER != set(types):
        raise ConfigError(
            f"{path}: format {values.get('format')!r} with keys {sorted(values)}, must be format {FORMAT} with "
            f"{sorted(types)}"
        )
    for name in names:
        if types[name] in (Path, Path | None) and values[name] is not None:
            values[name] = Path(os.path.normpath(folder / values[name]))
    return RunInputs(**{name: values[name] for name in names})


def checked_training_set(inputs: RunInputs) -> Path:
    """The file of the frozen set, checked against the digest in `inputs.json`.

    Raises:
        DamageError: it is gone or changed.
    """
    path = inputs.training_set
    found = commit.sha256_file(path) if path.is_file() else "no such file"
    if found != inputs.training_set_sha256:
        raise DamageError(
            f"training set {path}: {found[:16]}, inputs.json says SHA-256 {inputs.training_set_sha256[:16]}"
        )
    return path


def repointed(
    inputs: RunInputs,
    *,
    training_sets: Path,
    latents: Path,
    base_model: Path | None,
    vae: Path | None,
) -> RunInputs:
    """The inputs of a run with the workspace's own files in place of those that are no longer where
    they were: it came back from a bundle, or the workspace was moved.

    Args:
        inputs: As they were written.
        training_sets: The workspace's folder of frozen sets.
        latents: Its `latents/<encoding>`.
        base_model: The model that the run's `base` names; None where foundry.toml no longer has it.
        vae: Its encoding's VAE, where that is not the base model's own.
    """
    if not inputs.training_set.exists():
        inputs = _with_set(inputs, training_sets)
    here = {
        "training_set": inputs.training_set,
        "latents": latents,
        "base_model": base_model,
        "vae": None if inputs.vae is None else vae,
    }
    lost = {
        name: path
        for name, path in here.items()
        if path is not None and not getattr(inputs, name).exists()
    }
    return dataclasses.replace(inputs, **lost)  # type: ignore[arg-type]


def _with_set(inputs: RunInputs, training_sets: Path) -> RunInputs:
    """The inputs with the run's set as it is here: under its name, or under what `forgotten_stem`
    makes of it, because images were forgotten while the run was elsewhere."""
    found = training_sets / inputs.training_set.name
    forgotten = sorted(training_sets.glob(f"{forgotten_stem(found)}-*.parquet"))
    if found.is_file() or not forgotten:
        return dataclasses.replace(inputs, training_set=found)
    return dataclasses.replace(
        inputs, training_set=forgotten[0], training_set_sha256=commit.sha256_file(forgotten[0])
    )


def forgotten_stem(training_set: Path) -> str:
    """What the name of a frozen set begins with after images of it were forgotten:
    `sdxl-1a2b3c4d.forgotten`."""
    return training_set.stem.partition(".forgotten-")[0] + ".forgotten"


def adopt(
    run: Path, *, training_sets: Path, latents: Path, base_model: Path | None, vae: Path | None
) -> bool:
    """Write the inputs of a run as `repointed` has them.

    Returns:
        Whether anything had to be changed.

    Raises:
        DataError: the run was trained on a set that this workspace does not have.
    """
    before = read_inputs(run)
    inputs = repointed(
        before, training_sets=training_sets, latents=latents, base_model=base_model, vae=vae
    )
    if not inputs.training_set.is_file():
        raise DataError(
            f"run {inputs.run} was trained on set {inputs.fingerprint[:16]}, which is not in this workspace: "
            f"{inputs.training_set} is missing"
        )
    if inputs != before:
        write_inputs(run, inputs)
    return inputs != before


def is_away(folder: Path) -> bool:
    """Whether a bundle of the run was written and nothing of it has come back since."""
    path = folder / BUNDLED
    if not path.exists():
        return False
    events = folder / EVENTS
    return bool(
        json.loads(path.read_bytes())["event_bytes"]
        == (events.stat().st_size if events.exists() else 0)
    )


def bundled_latents(folder: Path) -> dict[str, list[int]]:
    """Generations of latents, by shard, that were taken along with the bundle of a run; none where
    there is none."""
    path = folder / BUNDLED
    return dict(json.loads(path.read_bytes()).get("latents", {})) if path.exists() else {}


def read_config(folder: Path) -> RunConfig:
    """Read `config.toml`; a run of an older version goes on as it began.

    Raises:
        ConfigError: it is missing, or a key or value cannot be used.
    """
    path = folder / CONFIG
    return older_runs.build(toml.load(path), origin=path)


def checkpoint_folder(folder: Path, samples_seen: int) -> Path:
    """Where the checkpoint of a run at a clock lies."""
    return folder / CHECKPOINTS / f"samples_{samples_seen:09d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """`READY.json`: the last file of a checkpoint; a folder without one is no checkpoint."""

    run: str
    checkpoint: str
    """`<run>@<samples_seen>`."""
    samples_seen: int
    files: tuple[manifests.Entry, ...]
    """Weights, configs and tokenizers: the diffusers folder, and `ema/` where there is one."""
    state_files: tuple[manifests.Entry, ...]
    """What a resume needs besides; removed when the checkpoint is no longer among the last."""
    digest: str
    """SHA-256 over names and digests of the weights among `files`, the averaged ones aside."""
    fingerprint: str
    """Of the training set."""
    base_digest: str
    """Of the model that the run began from."""
    validation_loss: float | None
    """The last plain validation loss; None before the first, and where that was not finite."""
    config: dict[str, Any]
    """The resolved RunConfig."""
    validation_owed: bool = False
    """Whether a stop request dropped the validation of this checkpoint, so that a resume begins
    with it."""


def write_ready(folder: Path, ready: Ready) -> None:
    """Write `READY.json`, which makes the folder a checkpoint."""
    write_record(folder / READY, FORMAT, dataclasses.asdict(ready))


def read_ready(folder: Path) -> Ready:
    """Read `READY.json` of a checkpoint.

    Raises:
        DamageError: it is missing, unreadable or of another format.
    """

    def build(values: dict[str, Any]) -> Ready:
        entries = {
            key: tuple(manifests.Entry(**item) for item in values[key])
            for key in ("files", "state_files")
        }
        return Ready(**{**values, **entries})

    subject, damaged = f"checkpoint {folder}", f"{{subject}}: {READY} is damaged ({{error}})"
    try:
        return read_record(folder / READY, FORMAT, build, subject=subject, damaged=damaged)
    except FileNotFoundError:
        raise DamageError(f"{subject} has no {READY}: it was not finished") from None


def check_checkpoint(folder: Path) -> Ready:
    """Compare all files of a checkpoint with its READY.json; one whose `state/` was freed by
    retention is whole.

    Raises:
        DamageError: names the first file that is gone, cut or changed.
    """
    ready = read_ready(folder)
    for entry in (*ready.files, *(ready.state_files if (folder / STATE).exists() else ())):
        manifests.check_entry(folder, entry)
    return ready


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints of a run, whole or not, oldest first by their
    number."""
    found = {
        path: path.name.removeprefix("samples_")
        for path in (folder / CHECKPOINTS).glob("samples_*")
    }
    return sorted(
        (path for path, number in found.items() if number.isdecimal()),
        key=lambda path: int(found[path]),
    )


def checkpoints(folder: Path) -> list[Path]:
    """Folders of a run's checkpoints with a readable READY.json, oldest first."""
    ready = []
    for path in checkpoint_folders(folder):
        try:
            read_ready(path)
        except DamageError:
            continue
        ready.append(path)
    return ready


def pinned_latents(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Generations of latents that a run may read again: of every epoch from that of its oldest
    resumable checkpoint on.

    Returns:
        What each such epoch's file says, per shard `{"generation": 3, "digest": "..."}`.
    """
    clocks = sorted((folder / CHECKPOINTS).glob(f"samples_*/{STATE}/clock.json"))
    first = min((json.loads(path.read_bytes())["epoch"] for path in clocks), default=0)
    manifests = sorted(path for path in (folder / EPOCHS).glob("*.json") if path.stem.isdecimal())
    return [
        json.loads(path.read_bytes())["latents"] for path in manifests if int(path.stem) >= first
    ]
