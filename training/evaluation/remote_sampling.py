"""Drawing a checkpoint's images on another machine, with only the checkpoint and a prompt file;
bringing them home.

The prompt file that a workspace writes carries how images are drawn, so that what comes home can
be compared.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from training import commit, manifests, records, toml
from training.config.evaluation import SamplingConfig
from training.errors import DamageError, EvaluationError
from training.evaluation.prompt_sets import digest, make_frame, read_prompts
from training.models.base_model import SUFFIX
from training.names import CheckpointName
from training.runs import run_folder
from training.sampling.prompt_reading import read_set
from training.sampling.sampling_inputs import input_digests
from training.tables.schemas import TABLES

if TYPE_CHECKING:
    from training.sampling.sampling import MapBatches

RECORD, IMAGES = "evaluation.json", "pictures"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`evaluation.json`, the last file that is written: what the images follow from."""

    checkpoint: str
    """`<run>@<samples_seen>`, or `base.<digest8>@0` for a model without a run, which may be a rival
    at home."""
    digest: str
    """Of its weights."""
    prompts: str
    """Digest of the prompt set."""
    sampling: dict[str, Any]
    """The resolved SamplingConfig."""
    further: dict[str, str]
    """Digests of averaged weights and LoRAs, where they were used."""
    samples: manifests.Entry
    """The table of images."""


def write_prompts(path: Path, prompts: pl.DataFrame, sampling: SamplingConfig) -> None:
    """Write a prompt set and how its images are drawn into one JSON file."""
    values = {"sampling": toml.dump(sampling), "prompts": prompts.drop("seed").to_dicts()}
    records.write_record(path, _FORMAT, values)


def read_file(path: Path) -> tuple[pl.DataFrame, SamplingConfig]:
    """Prompts and sampling of what `write_prompts` wrote; of a CSV file its prompts, and the
    defaults.

    Raises:
        EvaluationError: the file cannot be used; says why.
    """
    if path.suffix != ".json":
        return read_prompts(path), SamplingConfig()

    def build(values: dict[str, Any]) -> tuple[pl.DataFrame, SamplingConfig]:
        sampling = toml.build(SamplingConfig, values["sampling"], origin=path)
        return make_frame(values["prompts"]), sampling

    subject = f"prompt file {path}"
    try:
        return records.read_record(path, _FORMAT, build, subject=subject, error=EvaluationError)
    except FileNotFoundError:
        raise EvaluationError(f"{subject} does not exist") from None
    except pl.exceptions.PolarsError as error:
        raise EvaluationError(f"{subject} is damaged: {error!r}") from None


def identify(checkpoint: Path) -> tuple[str, str]:
    """Name and digest of a checkpoint's folder, or of a model without a run.

    Raises:
        ModelError: there is no model.
    """
    from training.models.weights import model_digest

    if (checkpoint / run_folder.READY).is_file():
        ready = run_folder.check_checkpoint(checkpoint)
        return ready.checkpoint, ready.digest
    weights = model_digest(checkpoint)
    return str(CheckpointName.of_base(weights)), weights


def draw(
    checkpoint: Path,
    prompts: Path,
    out: Path,
    *,
    map_batches: "MapBatches | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Draw a checkpoint's images of a prompt file into a new folder.

    Args:
        checkpoint: Model folder, or a single .safetensors file.
        prompts: A prompt file of a workspace, or a CSV; paths of LoRAs start from its folder.
        out: Must not hold finished images of anything else; an unfinished folder is drawn anew.
        map_batches: See `sample_folder`.
        progress: Follows along.

    Raises:
        EvaluationError: the prompt file or one of its prompts cannot be used, or `out` is in the
            way.
        ModelError: the checkpoint is incomplete.
    """
    from training.sampling.sampling import sample_folder

    frame, sampling = read_file(prompts)
    read_set(frame, sampling)
    if (out / RECORD).exists():
        raise EvaluationError(
            f"{out} holds the images of {read_record(out).checkpoint} already; choose another --out"
        )
    if not checkpoint.is_dir() and checkpoint.suffix != SUFFIX:
        raise EvaluationError(
            f"--checkpoint {checkpoint} is neither a model folder nor a {SUFFIX} file"
        )
    name, weights = identify(checkpoint)
    samples = sample_folder(
        checkpoint,
        name,
        frame,
        sampling,
        out / IMAGES,
        home=prompts.parent,
        map_batches=map_batches,
        progress=progress,
    )
    record = Record(
        checkpoint=name,
        digest=weights,
        prompts=digest(frame),
        sampling=toml.dump(sampling),
        further=input_digests(checkpoint, sampling, prompts.parent),
        samples=manifests.write_parquet(out, "samples", samples),
    )
    records.write_record(out / RECORD, _FORMAT, asdict(record))
    return record


def read_record(folder: Path) -> Record:
    """What `draw` recorded.

    Raises:
        DamageError: nothing was drawn here to the end, or the record cannot be read.
    """

    def build(values: dict[str, Any]) -> Record:
        return Record(**{**values, "samples": manifests.Entry(**values["samples"])})

    try:
        return records.read_record(folder / RECORD, _FORMAT, build)
    except FileNotFoundError:
        raise DamageError(
            f"{folder} has no {RECORD}: its images were not drawn to the end"
        ) from None


def bring_home(folder: Path, record: Record, target: Path) -> pl.DataFrame:
    """Copy images to where the workspace keeps them; returns rows of table `sample_images`, also
    of those that could not be drawn.

    Raises:
        DamageError: an image or the table is gone or has changed.
    """
    from training.sampling.image_files import read_image

    manifests.check_entry(folder, record.samples)
    samples = TABLES["sample_images"].conform(manifests.read_parquet(folder / record.samples.name))
    drawn = samples.filter(pl.col("file").is_not_null())
    for prompt_id, file, sha256 in drawn.select("prompt_id", "file", "sha256").iter_rows():
        image = read_image(folder / IMAGES / file)
        if hashlib.sha256(image.tobytes()).hexdigest() != sha256:
            raise DamageError(
                f"{folder / IMAGES / file} is not the image that was drawn for prompt {prompt_id!r}"
            )
    for file in drawn["file"]:
        with commit.atomic_file(target / file) as temporary:
            shutil.copyfile(folder / IMAGES / file, temporary)
    return samples
