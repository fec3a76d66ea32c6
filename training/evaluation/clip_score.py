"""CLIP score, aesthetic score and all further scores of each image, from one look at it; the
embeddings are kept, so that scoring anew never means sampling anew. Always fp32: in 16 bits a score
moves by more than most checkpoints differ.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import polars as pl

from training.annotators.aesthetic import Aesthetic
from training.annotators.clip import Clip
from training.config.evaluation import ScorerName
from training.errors import EvaluationError
from training.evaluation import overbaked, summary
from training.evaluation.copies import Nearest
from training.evaluation.prompt_groups import counted
from training.evaluation.references import References
from training.evaluation.scorers import SCORERS, Scorer, load
from training.sampling.image_files import FAILED, NOT_DRAWN, can_be_drawn_again, read_or_explain
from training.tables.schemas import TABLES

SIMILARITY = "train_similarity"
"""Metric of the rows that hold the cosine with the nearest training image, and its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A batch of images with what each was asked for."""

    images: Sequence[np.ndarray]
    """`(H, W, 3)` uint8 of any sizes."""
    texts: Sequence[str]

    def __str__(self) -> str:
        return f"{len(self.images)} images, the first of {self.texts[0]!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A batch of distinct prompts."""

    texts: Sequence[str]

    def __str__(self) -> str:
        return f"{len(self.texts)} prompts from {self.texts[0]!r} on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Embeddings of all images."""

    embeddings: np.ndarray
    """`(N, d)`."""

    def __str__(self) -> str:
        return f"{len(self.embeddings)} embeddings"


Task = Look | Read | Rate


class Mapped(Protocol):
    """Networks that work off tasks in order: `Networks` here, or the engine's workers."""

    def map(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """Of a `Look` embeddings `(B, d)` and scores; of a `Read` vectors `(T, d)`; of a `Rate`
        aesthetic scores `(N,)`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """All that looks at images."""

    clip: Clip
    aesthetic: Aesthetic
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """Further scorers by the name of their metric."""

    def __call__(self, task: Task) -> Any:
        """Work off one task, see `Mapped`."""
        if isinstance(task, Look):
            return _look_at(task.images, task.texts, self)
        if isinstance(task, Read):
            return self.clip.encode_text(task.texts)
        return np.array(self.aesthetic(task.embeddings), dtype=np.float64)

    def map(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """Work off tasks in this process."""
        return map(self, tasks)

    def close(self) -> None:
        """Nothing was started."""


def load_networks(folders: Mapping[str, Path], device: str) -> Networks:
    """Load `clip`, `aesthetic` and further scorers from their folders; makes a worker of the
    engine.

    Raises:
        ModelError: files are missing, or are of another model.
    """
    further = {name: folder for name, folder in folders.items() if name in SCORERS}
    return Networks(
        clip=Clip.load(folders["clip"], device),
        aesthetic=Aesthetic.load(folders["aesthetic"], device),
        scorers=load(cast(Mapping[ScorerName, Path], further), device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found of N of some images; of the others, why nothing was."""

    rows: np.ndarray
    """`(N,)` places of the images that were scored, ascending."""
    scores: dict[str, np.ndarray]
    """Metric -> `(N,)` fp64, all finite."""
    embeddings: np.ndarray
    """`(N, d)` fp32 of length 1."""
    failures: dict[int, str]
    """Place of an image -> why it has no scores."""


def score(
    samples: pl.DataFrame,
    folder: Path,
    networks: Mapped,
    *,
    batch_size: int,
    references: References = References(),  # noqa: B008 - frozen
) -> pl.DataFrame:
    """Score a checkpoint's images.

    Args:
        samples: Rows of table `sample_images`.
        folder: Where their files are.
        networks: Look at each image, and read each distinct prompt, once.
        batch_size: Images at a time.
        references: What the images are compared with as a whole; without any, their look alone is
            told.

    Returns:
        Rows of table `eval_metrics`: per image `clip_score` (cosine of image and prompt, not
        scaled, not clamped), `aesthetic`, the further scorers, the measures of `overbaked`,
        `train_similarity` and `embedding`; for an image that was not drawn, is missing or
        unreadable, or has a score that is not finite one row `failed` with the reason instead; and
        the summary as rows without a prompt, over the images that count in a verdict over all
        prompts, in which `num_failed` counts the failed ones of all.

    Raises:
        EvaluationError: the table is empty, or no image that can be read could be scored.
    """
    if samples.is_empty():
        raise EvaluationError(f"{folder} holds no sample images to score")
    samples = samples.sort("prompt_id")
    images = (read_or_explain(folder, file) for file in samples["file"])
    seen = look(images, samples["text"].to_list(), networks, batch_size=batch_size)
    own = _counts(samples["prompt_id"].gather(seen.rows))
    whole = _only(seen, own)
    summed = summarise(whole, samples["text"].gather(whole.rows).to_list())
    if not len(seen.rows):
        _require_images_to_blame(folder, seen)
        return _table(samples, seen, None, summed)
    found = references.compare(
        seen.embeddings, {name: seen.scores[name] for name in overbaked.ALL}, own
    )
    return _table(samples, seen, found.nearest, summed | found.summary)


def look(
    images: Iterable[np.ndarray | str],
    texts: Sequence[str],
    networks: Mapped,
    *,
    batch_size: int,
) -> Seen:
    """Score images one batch after the other.

    Args:
        images: `(H, W, 3)` uint8 of any sizes; or, in words, why there is none.
        texts: What each was asked for; each distinct one is encoded once.
        networks: Clip, aesthetic head and further scorers.
        batch_size: Images held and encoded at a time.

    Returns:
        Scores of all that could be scored: an image with any score that is not finite is among the
        failures.
    """
    failures: dict[int, str] = {}
    rows: list[int] = []

    def looks() -> Iterator[Look]:
        for batch in _batches(enumerate(images), batch_size):
            failures.update({n: image for n, image in batch if isinstance(image, str)})
            good = [(n, image) for n, image in batch if not isinstance(image, str)]
            rows.extend(n for n, _ in good)
            if good:
                yield Look(images=[image for _, image in good], texts=[texts[n] for n, _ in good])

    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = list(networks.map(looks()))
    if not rows:
        return Seen(
            rows=np.empty(0, dtype=np.int64),
            scores={},
            embeddings=np.empty((0, 0)),
            failures=failures,
        )
    embeddings = np.concatenate([part[0] for part in parts])  # (N, d)
    scores = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
    scores |= _judge(embeddings, [texts[place] for place in rows], networks, batch_size)
    return _finite(np.array(rows), scores, embeddings, failures)


def summarise(seen: Seen, texts: Sequence[str]) -> dict[str, float]:
    """The guide's summary of scored images, the deviation within prompts, the mean of each
    further scorer, and the number of images that could not be scored."""
    empty = np.empty(0)
    clip_scores, aesthetic = (
        seen.scores.get("clip_score", empty),
        seen.scores.get("aesthetic", empty),
    )
    found = summary.summarise(clip_scores, aesthetic)
    found["aesthetic_std_within"] = summary.std_within(aesthetic, list(texts))
    further = [
        name for name in seen.scores if name not in ("clip_score", "aesthetic", *overbaked.ALL)
    ]
    found |= {f"{name}_mean": float(seen.scores[name].mean()) for name in further}
    return found | {"num_failed": float(len(seen.failures))}


def _require_images_to_blame(folder: Path, seen: Seen) -> None:
    """Where nothing was scored, refuse to call it the images' fault when one of them could be
    read."""
    odd = [
        reason
        for reason in seen.failures.values()
        if reason != NOT_DRAWN and not can_be_drawn_again(reason)
    ]
    if odd:
        raise EvaluationError(
            f"none of {len(seen.failures)} images in {folder} could be scored, and {len(odd)} of them can be read: "
            f"{odd[0]}; CLIP, the aesthetic head or a further scorer is broken"
        )


def _batches(
    items: Iterable[tuple[int, np.ndarray | str]], size: int
) -> Iterator[list[tuple[int, np.ndarray | str]]]:
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def _look_at(
    images: Sequence[np.ndarray], texts: Sequence[str], networks: Networks
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings `(B, d)` of a batch, and what is told from pixels."""
    embeddings = np.stack([row.embedding for row in networks.clip(images)])
    scores = {
        name: np.asarray(scorer.score(images, texts), dtype=np.float64)
        for name, scorer in networks.scorers.items()
    }
    return embeddings, scores | overbaked.collect([overbaked.measure(image) for image in images])


def _judge(
    embeddings: np.ndarray, texts: Sequence[str], networks: Mapped, size: int
) -> dict[str, np.ndarray]:
    """Scores `(N,)` that follow from CLIP's embeddings `(N, d)`."""
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    names = list(distinct)
    tasks: list[Task] = [
        Read(texts=names[start : start + size]) for start in range(0, len(names), size)
    ]
    *vectors, aesthetic = networks.map([*tasks, Rate(embeddings=embeddings)])
    own = np.concatenate(vectors)[[distinct[text] for text in texts]]  # (N, d)
    return {
        # The sum in fp64: equal for equal embeddings, whatever the order of a dot product.
        "clip_score": (embeddings.astype(np.float64) * own).sum(axis=1),
        "aesthetic": aesthetic,
    }


def _finite(
    rows: np.ndarray,
    scores: dict[str, np.ndarray],
    embeddings: np.ndarray,
    failures: dict[int, str],
) -> Seen:
    """Leave out images with a score that is not finite, and say which score."""
    usable = np.ones(len(rows), dtype=bool)
    for name, values in scores.items():
        for place in np.flatnonzero(usable & ~np.isfinite(values)):
            failures[int(rows[place])] = f"{name} is {values[place]}"
        usable &= np.isfinite(values)
    return _only(Seen(rows=rows, scores=scores, embeddings=embeddings, failures=failures), usable)


def _only(seen: Seen, chosen: np.ndarray) -> Seen:
    """What was found of the `chosen` images `(N,)` bool, with all failures."""
    return Seen(
        rows=seen.rows[chosen],
        scores={name: values[chosen] for name, values in seen.scores.items()},
        embeddings=seen.embeddings[chosen],
        failures=seen.failures,
    )


def _counts(prompt_ids: pl.Series) -> np.ndarray:
    """`(N,)` bool: whether an image counts in what is said of all of them, see
    `prompt_groups.counted`."""
    return prompt_ids.is_in(counted(prompt_ids.to_frame())["prompt_id"].to_list()).to_numpy()


def _table(
    samples: pl.DataFrame, seen: Seen, nearest: Nearest | None, summed: Mapping[str, float]
) -> pl.DataFrame:
    """Rows of `eval_metrics`."""
    keys = samples.select("prompt_id", "group")
    good = keys[seen.rows.tolist()]
    frames = [
        good.with_columns(metric=pl.lit(name), value=values) for name, values in seen.scores.items()
    ]
    if nearest is not None:
        ids = pl.Series(nearest.image_ids.tolist(), dtype=pl.String)
        frames.append(
            good.with_columns(metric=pl.lit(SIMILARITY), value=nearest.similarity, image_id=ids)
        )
    vectors = pl.Series(seen.embeddings.tolist(), dtype=pl.List(pl.Float32))
    frames.append(good.with_columns(metric=pl.lit("embedding"), embedding=vectors))
    places = sorted(seen.failures)
    reasons = pl.Series([seen.failures[place] for place in places], dtype=pl.String)
    frames.append(keys[places].with_columns(metric=pl.lit(FAILED), reason=reasons))
    frames.append(pl.DataFrame({"metric": list(summed), "value": list(summed.values())}))
    table = TABLES["eval_metrics"]
    typed = [
        frame.cast({name: table.schema[name] for name in frame.columns})
        for frame in [table.empty(), *frames]
    ]
    return table.conform(pl.concat(typed, how="diagonal"))
