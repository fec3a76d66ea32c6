"""What prompts, order and batches of a training set of a million and a half samples cost, on two
cores.

Usage: python benchmarks/bench_training_data.py [NUM_ROWS]

Makes its own set in a temporary folder (some 200 MB), with tags that repeat as a booru's do. Times
are wall clock; of a busy machine the processor seconds beside them tell.
"""

import contextlib
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROWS = 1_500_000
NUM_TAGS = 31
VOCABULARY = 10_000
NUM_PROMPTS = 4_000
REPEATS = 5
MIN_SPEEDUP = 8.0
MAX_OPEN_S, MAX_OPEN_MB = 3.0, 1_000
MAX_ORDER_S = 60.0
MAX_SEEK_MS = 50.0
IMAGES_PER_S = 26.0
MAX_LOADER_SHARE = 0.01
MICRO_BATCH, GLOBAL_BATCH = 8, 2048
BUCKETS = np.array([(1216, 832), (832, 1216), (1152, 832), (896, 1152), (1024, 1024)])
SYLLABLES = [
    "ba",
    "re",
    "lo",
    "ki",
    "sun",
    "ta",
    "mer",
    "vo",
    "li",
    "ne",
    "ro",
    "sha",
    "pon",
    "gri",
    "del",
    "wa",
]


def words(rng: np.random.Generator) -> list[str]:
    """Distinct tags of one to three words, as lengths of booru tags go."""
    found: dict[str, None] = {}
    while len(found) < VOCABULARY:
        parts = [
            "".join(rng.choice(SYLLABLES, rng.integers(1, 4)))
            for _ in range(rng.choice([1, 2, 3], p=[0.3, 0.6, 0.1]))
        ]
        found["_".join(parts)] = None
    return sorted(found)


def write_set(path: Path, num_rows: int, names: list[str]) -> None:
    """A `training_set` in row groups, without ever holding its strings."""
    from training.tables.schemas import TABLES

    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(names) + 1) ** 0.9
    edges, places = np.cumsum(weights / weights.sum()), rng.permutation(len(names))
    ids = sorted(
        hashlib.sha256(number.to_bytes(8, "little")).hexdigest() for number in range(num_rows)
    )
    schema = (
        pl.DataFrame(schema=TABLES["training_set"].schema)
        .to_arrow(compat_level=pl.CompatLevel.oldest())
        .schema
    )
    with pq.ParquetWriter(
        path, schema, compression="zstd", dictionary_pagesize_limit=8_000_000
    ) as writer:
        for first in range(0, num_rows, 131_072):
            own = ids[first : first + 131_072]
            lengths = rng.poisson(NUM_TAGS, len(own)).clip(1)
            row = np.repeat(np.arange(len(own)), lengths)
            codes = places[
                np.searchsorted(edges, rng.random(lengths.sum())).clip(0, len(names) - 1)
            ]
            pairs = np.unique(
                row.astype(np.int64) * len(names) + codes
            )  # sorted by row and name, each tag once
            row, codes = pairs // len(names), pairs % len(names)
            starts = np.searchsorted(row, np.arange(len(own) + 1))
            tags = pa.DictionaryArray.from_arrays(
                pa.array(codes.astype(np.int32)), pa.array(names)
            ).cast(pa.large_string())
            kinds = pa.array(["general"] * len(codes), pa.large_string())
            pairs_of = pa.StructArray.from_arrays([tags, kinds], ["name", "category"])
            bucket = BUCKETS[rng.integers(len(BUCKETS), size=len(own))]
            columns = {
                "image_id": own,
                "shard": [f"s{number // 10_000:06d}" for number in range(first, first + len(own))],
                "height": np.full(len(own), 2000), "width": np.full(len(own), 1500),
                "bucket_height": bucket[:, 0], "bucket_width": bucket[:, 1],
                "score": rng.integers(1, 10, len(own)),
                "tags": pa.LargeListArray.from_arrays(starts, pairs_of),
                "caption": [None] * len(own), "made_caption": [None] * len(own), "words": [["safe"]] * len(own),
                "boxes": [[{"y0": 0.0, "x0": 0.0, "y1": 9.0, "x1": 9.0, "confidence": 0.5}] * (number % 10 == 0)
                          for number in range(len(own))],
                "split": ["validation" if first + number < 2048 else "train" for number in range(len(own))],
                "stable": [2048 <= first + number < 4096 for number in range(len(own))],
            }  # fmt: skip
            arrays = [
                value.cast(kind) if isinstance(value, pa.Array) else pa.array(value, kind)
                for value, kind in zip(
                    (columns[name] for name in schema.names), schema.types, strict=True
                )
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def tokenizers(names: list[str]) -> list[object]:
    """SDXL's two: CLIP's rules, with a vocabulary learned from the tags until they have some three
    tokens each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(names, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    vocabulary = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
    ]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    return [
        CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]


def prompts(path: Path, names: list[str], pair: list[object]) -> None:
    """Prompts with ids for both encoders by micro-batches, against building the strings and
    tokenizing them twice.

    The naive way gets its strings by large blocks, which is the cheapest way to make them; then for
    counts.
    """
    from training.models.tokens import tokenize
    from training.prompts.maker import PromptMaker
    from training.prompts.samples import Samples

    maker = PromptMaker(Samples(path, [0]), vocabulary(names), recipe(), 0, pair)
    chunks = maker.count_chunks(np.arange(NUM_PROMPTS), 0)
    batches = [np.flatnonzero(chunks == n)[start : start + MICRO_BATCH] for n in (1, 2, 3)
               for start in range(0, int((chunks == n).sum()), MICRO_BATCH)]  # fmt: skip
    rows = np.concatenate(batches)

    def ours() -> list[tuple[np.ndarray, ...]]:
        maker.expect(rows, 0)
        return out_of_turn()

    def out_of_turn() -> list[tuple[np.ndarray, ...]]:
        return [maker.ids(maker.make(batch.tolist(), 0)) for batch in batches]

    def naive() -> list[tuple[np.ndarray, ...]]:
        found, made = [], iter(maker.prompts(rows.tolist(), 0))
        for batch in batches:
            texts = [next(made).text for _ in batch]
            first = tokenize(texts, pair[0])
            most = first[0].num_chunks
            second = tokenize(texts, pair[1], max_chunks=most, min_chunks=most)
            found.append(
                tuple(
                    np.array([one.ids for one in side], dtype=np.int64) for side in (first, second)
                )
            )
        return found

    # Cut prompts aside, where ours end at a tag, ids are the same.
    whole = [
        all(prompt.num_truncated == 0 for prompt in maker.make(batch.tolist(), 0))
        for batch in batches
    ]
    same = all(
        np.array_equal(a, b)
        for found, expected, complete in zip(ours(), naive(), whole, strict=True) if complete
        for a, b in zip(found, expected, strict=True)
    )  # fmt: skip
    alone = []
    times = []
    for _ in range(REPEATS):
        times.append((seconds(ours), seconds(naive)))
        maker.expect(rows[:0], 0)
        alone.append(seconds(out_of_turn))
    fast, slow = (float(np.median(side)) for side in zip(*times, strict=True))
    print(f"prompt + ids of both encoders: {NUM_PROMPTS / fast:,.0f}/s of processor time, naive "
          f"{NUM_PROMPTS / slow:,.0f}/s: {slow / fast:.1f} x (limit {MIN_SPEEDUP}), ids identical: {same}")  # fmt: skip
    print(
        f"  micro-batches of {MICRO_BATCH} that no one announced: {NUM_PROMPTS / float(np.median(alone)):,.0f}/s"
    )
    print(
        f"  tokens per prompt {np.mean([one.num_tokens for one in maker.make(range(1000), 0)]):.0f}"
    )


def vocabulary(names: list[str]) -> object:
    """A third of the tags have aliases."""
    from training.curation.vocabulary import Vocabulary

    return Vocabulary(
        dict.fromkeys(names, "general"),
        {name: (f"{name}_too", f"other_{name}") for name in names[::3]},
    )


def recipe() -> object:
    """BigASP's."""
    from training.config.run import PromptConfig

    return PromptConfig()


def seconds(work: object) -> float:
    """Processor seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


OPEN = """
import sys, time
from pathlib import Path
from training.prompts.samples import Samples
began = time.monotonic()
samples = Samples(Path(sys.argv[1]))
spent = time.monotonic() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Vm"))
print(spent, *(int(status[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM")), len(samples))
"""


def open_set(path: Path) -> None:
    """Open the set in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True
    )
    spent, resident, highest, rows = map(float, done.stdout.split())
    print(f"open {rows:,.0f} rows: {spent:.2f} s (limit {MAX_OPEN_S}), {resident:.0f} MB resident, "
          f"{highest:.0f} MB at most (limit {MAX_OPEN_MB})")  # fmt: skip


def order(path: Path, folder: Path, names: list[str], pair: list[object]) -> None:
    """The order of an epoch, with the chunks of every prompt, and a seek in it."""
    from training.loop.order import make_order, read_order, write_order
    from training.prompts.chunk_counts import count_in_processes
    from training.prompts.maker import PromptMaker
    from training.prompts.samples import Samples

    samples = Samples(path)
    maker = PromptMaker(samples, vocabulary(names), recipe(), 0, pair)
    rows = np.flatnonzero(~samples.validates)
    began, used = time.monotonic(), processor_seconds()
    chunks = count_in_processes(maker, path, rows, 0)
    counted = time.monotonic() - began
    made = make_order(samples.buckets[rows], chunks, seed=0, epoch=0, micro_batch_size=MICRO_BATCH,
                      global_batch_size=GLOBAL_BATCH)  # fmt: skip
    sha256 = write_order(folder / "0.npz", made)
    spent = time.monotonic() - began
    print(f"order of an epoch of {len(rows):,} rows: {spent:.1f} s (limit {MAX_ORDER_S:.0f}), of which chunks "
          f"{counted:.1f} s; {processor_seconds() - used:.1f} processor seconds")  # fmt: skip
    shares = np.bincount(chunks, minlength=4)[1:] / len(rows)
    print(f"  prompts by chunks: {', '.join(f'{share:.1%}' for share in shares.tolist())}")
    slowest = 0.0
    for step in np.random.default_rng(0).integers(made.num_steps, size=20).tolist():
        began = time.monotonic()
        found = read_order(folder / "0.npz", sha256)
        batch = found.micro_batches(step)[0]
        slowest = max(slowest, time.monotonic() - began)
        assert len(batch)
    print(
        f"  open it and seek to a micro-batch: {slowest * 1e3:.1f} ms at most (limit {MAX_SEEK_MS:.0f})"
    )


def processor_seconds() -> float:
    """Of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def loader(path: Path, names: list[str], pair: list[object]) -> None:
    """How long a loop of 26 images a second waits for prompts, ids and 128 x 128 latents made ahead
    of it."""
    from training.loop.prefetch import Prefetch
    from training.prompts.maker import PromptMaker
    from training.prompts.samples import Samples

    maker = PromptMaker(Samples(path, [0]), vocabulary(names), recipe(), 0, pair)
    chunks = maker.count_chunks(np.arange(2_000), 0)
    two = np.flatnonzero(chunks == 2)[: 60 * MICRO_BATCH].reshape(-1, MICRO_BATCH)
    stored = np.random.default_rng(0).integers(0, 2**16, (64, 4, 128, 128), dtype=np.uint16)

    def make(batch: np.ndarray) -> tuple[object, ...]:
        latents = (stored[batch % 64].astype(np.uint32) << 16).view(np.float32)
        return maker.ids(maker.make(batch.tolist(), 0)), latents

    with Prefetch(make, two) as ahead:
        next(ahead)
        ahead.waited_s, began = 0.0, time.monotonic()
        with contextlib.suppress(StopIteration):
            while True:
                time.sleep(MICRO_BATCH / IMAGES_PER_S)
                next(ahead)
        share = ahead.waited_s / (time.monotonic() - began)
    print(
        f"loader's share of a step at {IMAGES_PER_S:.0f} images/s: {share:.3%} (limit {MAX_LOADER_SHARE:.0%})"
    )


def main() -> None:
    """Print all ratios and limits."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_ROWS
    names = words(np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training_set.parquet"
        write_set(path, num_rows, names)
        pair = tokenizers(names)
        open_set(path)
        prompts(path, names, pair)
        loader(path, names, pair)
        order(path, Path(folder), names, pair)


if __name__ == "__main__":
    main()
