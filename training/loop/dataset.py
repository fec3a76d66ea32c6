"""The frozen training set and its latents as batches: a batch depends on its samples and the epoch,
on nothing else.

Reads the set's table once; latents, prompts and tokens are made when a batch is asked for.
"""

import dataclasses
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import CLIPTokenizer

from training.buckets.crops import map_box, told_crop
from training.buckets.geometry import Box, Placement, Size
from training.config.run import RunConfig
from training.curation.vocabulary import Vocabulary
from training.errors import DataError
from training.latents.files import LatentFile
from training.latents.generations import read_generation
from training.latents.source import LatentSource
from training.loop import noise
from training.loop.prefetch import StageTimes
from training.manifests import Entry
from training.prompts.chunk_counts import count_in_processes
from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples
from training.seeds import Purpose

Pins = dict[str, dict[str, Any]]
"""Per shard `{"generation": 3, "digest": "..."}`: which latents an epoch reads."""

_OTHER_OPEN_FILES = 512
"""Room for everything that is no latent file."""
_GEOMETRY = (
    "original_height", "original_width", "resized_height", "resized_width", "crop_top", "crop_left", "pad_top",
    "pad_left", "flip",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Batch:
    """Samples of one bucket and one number of text chunks."""

    image_ids: list[str]
    prompts: list[str]
    latents: torch.Tensor
    """`(B, 4, h, w)` fp32."""
    ids: tuple[torch.Tensor, ...]
    """Token ids `(B, n, 77)` int64 per text encoder."""
    original_size: torch.Tensor
    """`(B, 2)` fp32, upright source pixels, height first."""
    crop_top_left: torch.Tensor
    """`(B, 2)` fp32, pixels of the resized image; of a mirrored one as it is seen."""
    target_size: torch.Tensor
    """`(B, 2)` fp32, the bucket in pixels."""
    zeroed: torch.Tensor
    """`(B,)` bool: samples whose text conditioning, hidden states and pooled, is to be replaced by
    zeros."""
    num_truncated: int
    """Tokens of its prompts that no chunk holds."""
    mask: torch.Tensor | None
    """Weight of each latent pixel, `(B, 1, h, w)` fp32; None when all are 1, as in validation."""
    bucket: Size
    """Of its images, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A batch and what is drawn for it: all that a forward pass reads."""

    batch: Batch
    timesteps: torch.Tensor
    """`(B,)` int64."""
    noise: torch.Tensor
    """`(B, 4, h, w)` fp32."""

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Draw":
        """The same elsewhere: `move` is called with each tensor."""
        changes: dict[str, Any] = {}
        for item in dataclasses.fields(self.batch):
            value = getattr(self.batch, item.name)
            if isinstance(value, torch.Tensor):
                changes[item.name] = move(value)
        changes["ids"] = tuple(move(ids) for ids in self.batch.ids)
        return Draw(
            batch=dataclasses.replace(self.batch, **changes),
            timesteps=move(self.timesteps),
            noise=move(self.noise),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        own = (getattr(self.batch, item.name) for item in dataclasses.fields(self.batch))
        return [
            *(value for value in own if isinstance(value, torch.Tensor)),
            *self.batch.ids,
            self.timesteps,
            self.noise,
        ]


class Dataset:
    """The samples of a run; rows are positions in the set's table, which is sorted by image_id."""

    def __init__(
        self,
        training_set: Path | pl.DataFrame,
        vocabulary: Vocabulary,
        latents: LatentSource,
        config: RunConfig,
        tokenizers: Sequence[CLIPTokenizer],
        scaling_factor: float,
    ) -> None:
        """Take a set.

        Args:
            training_set: `training_set`, or its file: then other processes can help with a million
                prompts.
            vocabulary: Of its tags, as frozen with the run.
            latents: Of its encoding.
            config: Prompts, loss and seed of the run.
            tokenizers: One per text encoder.
            scaling_factor: Of the run's VAE; latents scaled otherwise are refused.

        Raises:
            DataError: no sample trains, or the set cannot be read.
        """
        self.samples = Samples(training_set)
        self.latents = latents
        self.config = config
        self.scaling_factor = scaling_factor
        self.image_ids = self.samples.image_ids
        self.buckets = self.samples.buckets  # (N, 2)
        self.train_rows = self.samples.train_rows
        self.validation_rows = np.flatnonzero(self.samples.validates)
        self.stable_rows = self.train_rows[self.samples.stable[self.train_rows]]
        if not len(self.train_rows):
            raise DataError(
                f"training set has {len(self.samples)} rows and none with split 'train': nothing to train on"
            )
        self.pins: Pins = {}
        """What batches come from, see `use_latents`."""
        self.times = StageTimes()
        """What making batches has taken so far."""
        self._file = training_set if isinstance(training_set, Path) else None
        self.prompt_maker = PromptMaker(
            self.samples, vocabulary, config.prompts, config.seed, tokenizers
        )

    def prompt(self, row: int, epoch: int | None) -> str:
        """The prompt of a sample in an epoch; with None the one it is validated with, always the
        same."""
        return self.prompt_maker.make([row], epoch)[0].text

    def count_chunks(self, rows: np.ndarray, epoch: int | None) -> np.ndarray:
        """Text chunks that the prompts of `rows` (ascending) have in an epoch, `(len(rows),)`
        int64."""
        if self._file is None:
            return self.prompt_maker.count_chunks(rows, epoch)
        return count_in_processes(self.prompt_maker, self._file, rows, epoch)

    def shards_of(self, rows: np.ndarray) -> list[str]:
        """Shard of each of these rows."""
        names = self.samples.shard_names
        return [names[code] for code in self.samples.shards[rows].tolist()]

    def pin_latents(self) -> tuple[Pins, list[str]]:
        """For each shard the highest whole generation that holds all of the set's images of it.

        Returns:
            The pins, and a line for every generation that was skipped: its files are not all
            there, or another VAE encoded it.

        Raises:
            DataError: images of the set have no latents; the message counts them.
            DamageError: a manifest or its table is damaged.
        """
        pins: Pins = {}
        notes: list[str] = []
        lacking: dict[str, int] = {}
        samples = self.samples
        by_shard = np.split(
            np.argsort(samples.shards, kind="stable"), np.cumsum(np.bincount(samples.shards))[:-1]
        )
        for name, members in sorted(zip(samples.shard_names, by_shard, strict=True)):
            rows = members[~samples.forgotten[members]]
            if not len(rows):
                continue
            generation, missing, passed_over = self.latents.choose(
                name, samples.image_ids.take(rows)
            )
            notes += passed_over
            if generation is None:
                lacking[name] = missing
            else:
                pins[name] = {"generation": generation.number, "digest": generation.manifest.digest}
        if lacking:
            raise DataError(
                f"{sum(lacking.values())} of {len(samples)} images of the training set have no latents in "
                f"{self.latents.url or self.latents.folder} (shards {', '.join(sorted(lacking)[:5])})"
                f"{''.join('; ' + note for note in notes[:3])}: run `foundry run --select latents`"
            )
        return pins, notes

    def use_latents(self, pins: Pins) -> None:
        """Read the generations that an epoch is pinned to; batches come from them from now on.

        Raises:
            DataError: a generation was replaced since it was pinned, an image lies in another
                bucket than the set says, or the latents are scaled by another factor than the run's
                VAE scales by.
            DamageError: a table or latent file is damaged.
        """
        frames, self._files, self.pins = [], list[tuple[str, Entry]](), pins
        self._opened = dict[int, LatentFile]()
        for shard, pin in pins.items():
            generation = read_generation(self.latents.folder / shard, pin["generation"])
            if generation.manifest.digest != pin["digest"]:
                raise DataError(
                    f"latents of shard {shard}, generation {pin['generation']}, have digest "
                    f"{generation.manifest.digest[:16]}, this epoch began with {pin['digest'][:16]}"
                )
            entries = [
                entry for entry in generation.manifest.files if entry.name.endswith(".safetensors")
            ]
            numbers = {
                entry.name: len(self._files) + number for number, entry in enumerate(entries)
            }
            self._files += [(shard, entry) for entry in entries]
            frames.append(
                generation.table().with_columns(
                    pl.col("file").replace_strict(numbers, return_dtype=pl.Int32).alias("number")
                )
            )
        own = {"image_id": list(self.image_ids), "h": self.buckets[:, 0], "w": self.buckets[:, 1]}
        joined = pl.DataFrame(own).join(
            pl.concat(frames), on="image_id", how="left", maintain_order="left"
        )
        needed = joined.filter(~self.samples.forgotten)
        wrong = needed.filter(
            (pl.col("h") != pl.col("bucket_height")) | (pl.col("w") != pl.col("bucket_width"))
        )
        if len(wrong) or needed["row"].null_count():
            raise DataError(
                f"latents: {len(wrong)} images lie in another bucket than the training set says and "
                f"{needed['row'].null_count()} are missing: rebuild training_set and latents together"
            )
        if len(needed) < len(joined):
            joined = joined.with_columns(pl.col("number", "row", *_GEOMETRY).fill_null(0))
        self._places = joined.select("number", "row").to_numpy()  # (N, 2)
        self._geometry = joined.select(pl.col(name).cast(pl.Int64) for name in _GEOMETRY).to_numpy()
        _allow_open_files(len(self._files))
        self.latents.keep(self._files)
        if not self.latents.url:
            for number in range(len(self._files)):
                self._open(
                    number
                )  # what is cut or foreign is told of now, not in the middle of the epoch

    def fetch_in_order(self, samples: np.ndarray) -> None:
        """Let latent files arrive and be checked in this order of rows, those for validation
        first."""
        rows = np.concatenate([self.validation_rows, self.stable_rows, np.asarray(samples)])
        numbers, first = np.unique(self._places[rows, 0], return_index=True)
        self.latents.prefetch(
            [self._files[number] for number in numbers[np.argsort(first)].tolist()]
        )

    def _open(self, number: int) -> LatentFile:
        """A latent file of the epoch, fetched if need be."""
        if number not in self._opened:
            file = self.latents.open(*self._files[number])
            found = file.metadata.get("scaling_factor")
            if found is None or float(found) != self.scaling_factor:
                raise DataError(
                    f"{file.path} holds latents scaled by {found}, the run's VAE scales by "
                    f"{self.scaling_factor}: encode with a VAE of the model's family"
                )
            self._opened[number] = file
        return self._opened[number]

    def batch(self, rows: np.ndarray, epoch: int | None) -> Batch:
        """The samples of `rows` (one bucket, one number of chunks) in an epoch; None for
        validation's fixed view.

        Raises:
            DamageError: a latent file is damaged.
        """
        image_ids = self.image_ids.take(rows)
        with self.times.stage("prompts"):
            made = self.prompt_maker.make(rows.tolist(), epoch)
            ids = tuple(torch.from_numpy(ids) for ids in self.prompt_maker.ids(made))
        with self.times.stage("latents"):
            latents = self._gather(rows, image_ids, epoch)
        placements = self._placements(rows)
        crops = [told_crop(placement, self.config.rules_version) for placement in placements]
        return Batch(
            image_ids=image_ids,
            prompts=[prompt.text for prompt in made],
            latents=latents,
            ids=ids,
            original_size=torch.tensor([one.original for one in placements], dtype=torch.float32),
            crop_top_left=torch.tensor(crops, dtype=torch.float32),
            target_size=torch.from_numpy(self.buckets[rows]).to(torch.float32),
            zeroed=torch.tensor([prompt.zeroed for prompt in made]),
            num_truncated=sum(prompt.num_truncated for prompt in made),
            mask=self._masks(
                rows, placements, 1.0 if epoch is None else self.config.loss.watermark_weight
            ),
            bucket=Size(*self.buckets[rows[0]].tolist()),
        )

    def _gather(self, rows: np.ndarray, image_ids: list[str], epoch: int | None) -> torch.Tensor:
        """Latents `(B, 4, h, w)` fp32: drawn from the posterior in an epoch, its mean for
        validation."""
        numbers, in_file = self._places[rows].T
        latents: np.ndarray | None = None
        for number in np.unique(numbers).tolist():
            file, members = self._open(number), np.flatnonzero(numbers == number)
            mean, log_variance = file.gather(in_file[members])
            if latents is None:
                latents = np.empty((2, len(rows), *mean.shape[1:]), dtype=np.uint16)
            # Without log-variance the draw is the mean: minus infinity, whose bits in bfloat16
            # these are.
            latents[0, members] = mean
            latents[1, members] = 0xFF80 if log_variance is None else log_variance
        assert latents is not None, "a batch has at least one sample"
        mean, log_variance = torch.from_numpy(latents).view(torch.bfloat16).float()
        if epoch is None:
            return mean
        draw = noise.draw_noise(
            self.config.seed, Purpose.POSTERIOR, epoch, image_ids, mean.shape[1:]
        )
        return mean + torch.exp(log_variance / 2) * draw

    def _placements(self, rows: np.ndarray) -> list[Placement]:
        """How the images of these rows were placed."""
        placements = []
        for bucket, values in zip(
            self.buckets[rows].tolist(), self._geometry[rows].tolist(), strict=True
        ):
            height, width, resized_height, resized_width, top, left, pad_top, pad_left, flip = (
                values
            )
            placements.append(
                Placement(
                    original=Size(height, width),
                    resized=Size(resized_height, resized_width),
                    crop_top=top,
                    crop_left=left,
                    bucket=Size(*bucket),
                    flip=bool(flip),
                    pad_top=pad_top,
                    pad_left=pad_left,
                )
            )
        return placements

    def _masks(
        self, rows: np.ndarray, placements: Sequence[Placement], watermark_weight: float
    ) -> torch.Tensor | None:
        """Weights `(B, 1, h, w)` of latent pixels; None where all are 1."""
        if watermark_weight == 1 and not any(placement.padded for placement in placements):
            return None
        masks = []
        for row, placement in zip(rows.tolist(), placements, strict=True):
            latent_height = self._open(self._places[row, 0]).shape[2]
            boxes = self.samples.boxes(row) if watermark_weight < 1 else []
            masks.append(
                loss_mask(
                    boxes, placement, placement.bucket.height // latent_height, watermark_weight
                )
            )
        return torch.from_numpy(np.stack(masks))[:, None]


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files to hold a map of each latent file.

    Raises:
        DataError: the system's own limit is lower.
    """
    needed = count + _OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise DataError(
            f"{count} latent files need {needed} open files, this process may have {hard} (`ulimit -Hn`): raise that, "
            "or encode with a larger max_file_bytes"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def loss_mask(boxes: Sequence[Box], placement: Placement, scale: int, weight: float) -> np.ndarray:
    """How much each latent pixel of a sample counts, `(H/scale, W/scale)` fp32.

    Args:
        boxes: Watermarks, in upright source pixels.
        placement: How the source became the bucket's image; its padding counts nothing.
        scale: Pixels per latent along a side, 8.
        weight: Of a latent pixel wholly under a box; one partly covered lies between this and 1.
    """
    height, width = placement.bucket
    top, left = placement.pad_top - placement.crop_top, placement.pad_left - placement.crop_left
    weights = np.zeros((height, width), dtype=np.float32)
    bottom, right = top + placement.resized.height, left + placement.resized.width
    weights[max(top, 0) : bottom, max(left, 0) : right] = 1
    if placement.flip:
        weights = weights[:, ::-1]
    for box in boxes:
        if (mapped := map_box(box, placement)) is not None:
            inside = weights[
                round(mapped.y0) : round(mapped.y1), round(mapped.x0) : round(mapped.x1)
            ]
            np.minimum(inside, weight, out=inside)
    return weights.reshape(height // scale, scale, width // scale, scale).mean(axis=(1, 3))
