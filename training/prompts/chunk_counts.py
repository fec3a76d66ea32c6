"""Counts the text chunks of a million prompts in worker processes, with the same result for any
number of them.

A worker is a fresh interpreter without torch: it reads its part of the training set's file, and
answers in bytes.
"""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.errors import PipelineError
from training.models.clip_tokenizer import ClipTokenizer
from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples

_WORTH_A_PROCESS = 250_000
"""Prompts that take longer than the start of a worker, some two seconds."""
_MAX_WORKERS = 8
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What a worker is told."""

    path: Path
    groups: tuple[int, ...]
    """Row groups of the file that hold its rows."""
    rows: np.ndarray
    """Counted from the first row of these groups."""
    vocabulary: Vocabulary
    config: PromptConfig
    seed: int
    tokenizer: str
    """The first text encoder's, as JSON."""
    epoch: int | None


def count_in_processes(
    maker: PromptMaker, path: Path, rows: np.ndarray, epoch: int | None, num_workers: int = 0
) -> np.ndarray:
    """Chunks of the prompts of rows in an epoch, `(len(rows),)` int64; as `maker.count_chunks`.

    Args:
        maker: Of the whole set.
        path: The set's file.
        rows: In ascending order.
        epoch: As `PromptMaker`.
        num_workers: Processes; 0 for as many as there are cores and work for, none for short work.

    Raises:
        PipelineError: a worker failed; the message has its last line.
    """
    cores = len(os.sched_getaffinity(0))
    num_workers = num_workers or min(cores, _MAX_WORKERS, len(rows) // _WORTH_A_PROCESS)
    if num_workers < 1:
        return maker.count_chunks(rows, epoch)
    tasks = [_task(maker, path, part, epoch) for part in np.array_split(rows, num_workers)]
    with ThreadPoolExecutor(num_workers) as pool:
        return np.concatenate(list(pool.map(_run, tasks)))


def _task(maker: PromptMaker, path: Path, rows: np.ndarray, epoch: int | None) -> _Task:
    metadata = pq.ParquetFile(path).metadata
    starts = np.cumsum(
        [0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
    )
    first, last = np.searchsorted(starts, [rows[0], rows[-1]], side="right") - 1
    return _Task(
        path=path,
        groups=tuple(range(first, last + 1)),
        rows=rows - starts[first],
        vocabulary=maker.vocabulary,
        config=maker.config,
        seed=maker.seed,
        tokenizer=maker.tokenizers[0].backend_tokenizer.to_str(),
        epoch=epoch,
    )


def _run(task: _Task) -> np.ndarray:
    """Let a worker do a task."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from training.prompts.chunk_counts import main; main()"],
        input=pickle.dumps(task), capture_output=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise PipelineError(
            f"counting the chunks of {len(task.rows)} prompts failed ({done.returncode}): {said[-1]}"
        )
    return np.frombuffer(done.stdout, dtype=np.uint8).astype(np.int64)


def main() -> None:
    """Read a task from standard input, and write a byte for each row's chunks."""
    task: _Task = pickle.load(sys.stdin.buffer)  # noqa: S301  # our parent's own words
    samples = Samples(task.path, task.groups)
    tokenizer = ClipTokenizer(
        Tokenizer.from_str(task.tokenizer), 0, 0, 0
    )  # a count asks for no special tokens
    maker = PromptMaker(samples, task.vocabulary, task.config, task.seed, [tokenizer])
    sys.stdout.buffer.write(maker.count_chunks(task.rows, task.epoch).astype(np.uint8).tobytes())
