"""What scoring costs: each image seen once against the guide's way, summary and verdict of
100,000 rows, and the search for the nearest of 1.5 million training images.

Usage: python benchmarks/bench_evaluation.py [NUM_IMAGES]

Draws its own images and makes its own networks: a random CLIP of some 40 million parameters with
the demo's tokenizer. The two ways of scoring are compared in processor seconds of one thread; all
else is wall clock.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

NUM_IMAGES = 1_500_000
WIDTH = 768
NUM_PROMPTS, NUM_PER_PROMPT, SIDE_PX = 4, 8, 512
REPEATS = 3
MIN_SPEEDUP = 1.8
NUM_ROWS = 100_000
MAX_SUMMARY_S, MAX_VERDICT_S = 1.0, 1.0
NUM_QUERIES, NUM_VALIDATION = 256, 2_048
SHARD_ROWS = 10_000
MAX_SEARCH_MB = 400
ROOT = Path(__file__).resolve().parents[1]


def networks() -> tuple[object, object]:
    """A random CLIP between the demo's and ViT-L/14, and an aesthetic head on it."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from training.annotators.aesthetic import Aesthetic
    from training.annotators.clip import Clip
    from training.models.text_encoders import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(ROOT / "demo" / "models" / "clip")
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config={"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6,
                     **words},
        vision_config={"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
                       "num_attention_heads": 6, "image_size": 224, "patch_size": 16},
        projection_dim=WIDTH,
    )  # fmt: skip
    clip = Clip(CLIPModel(config), tokenizer, {"size": 224, "crop_size": 224}, "cpu")
    return clip, Aesthetic(torch.randn(WIDTH), torch.tensor(5.0), "cpu")


def draw(folder: Path) -> pl.DataFrame:
    """Rows of `sample_images` with their images."""
    from training.tables.schemas import TABLES

    rng, rows = np.random.default_rng(0), []
    for number in range(NUM_PROMPTS * NUM_PER_PROMPT):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(
            folder / f"{number}.png"
        )
        text = f"a red circle above a blue square, number {number // NUM_PER_PROMPT}"
        rows.append(
            {"prompt_id": f"p{number:03d}", "text": text, "negative": "", "group": "g", "seed": number,
             "height": SIDE_PX, "width": SIDE_PX, "file": f"{number}.png", "sha256": ""}
        )  # fmt: skip
    return pl.DataFrame(rows, schema=TABLES["sample_images"].schema)


def guide(samples: pl.DataFrame, folder: Path, clip: object, aesthetic: object) -> np.ndarray:
    """CLIP score and aesthetic `(N, 2)` as the guide and GhostReview have them.

    Each image is prepared and encoded for the one and again for the other, each prompt tokenized
    and encoded for each image. Loading CLIP anew for each, as they do, is left out.
    """
    found = []
    for row in samples.iter_rows(named=True):
        with Image.open(folder / row["file"]) as image:
            picture = np.asarray(image.convert("RGB"))
        text = clip.encode_text([row["text"]])[0]
        cosine = float(np.dot(clip([picture])[0].embedding, text))
        found.append((cosine, aesthetic(clip([picture])[0].embedding[None])[0]))
    return np.array(found)


def scoring() -> None:
    """Ours against the guide's way."""
    import torch

    from training.evaluation import clip_score

    torch.set_num_threads(1)
    clip, aesthetic = networks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = draw(folder)

        def ours() -> pl.DataFrame:
            return clip_score.score(
                samples, folder, clip_score.Networks(clip=clip, aesthetic=aesthetic), batch_size=16
            )

        frame, expected = ours(), guide(samples, folder, clip, aesthetic)
        found = [frame.filter(pl.col("metric") == name).sort("prompt_id")["value"].to_numpy()
                 for name in ("clip_score", "aesthetic")]  # fmt: skip
        gap = float(np.abs(np.stack(found, axis=1) - expected).max())
        times = [
            (seconds(ours), seconds(lambda: guide(samples, folder, clip, aesthetic)))
            for _ in range(REPEATS)
        ]
    fast, slow = (float(np.median(side)) for side in zip(*times, strict=True))
    count = samples.height
    print(f"scores of {count} images of {NUM_PROMPTS} prompts: {count / fast:.2f}/s of processor time, "
          f"the guide's way {count / slow:.2f}/s: {slow / fast:.2f} x (limit {MIN_SPEEDUP}); "
          f"largest difference {gap:.1e}")  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def tables() -> None:
    """Summary and verdict."""
    from training.evaluation import summary
    from training.evaluation.verdict import Protocol, Scores, compare
    from training.tables.schemas import TABLES

    rng = np.random.default_rng(0)
    ids = [f"p{number:06d}" for number in range(NUM_ROWS)]
    clip, taste = rng.normal(0.26, 0.03, NUM_ROWS), rng.normal(5.5, 0.4, NUM_ROWS)
    began = time.monotonic()
    summary.summarise(clip, taste)
    summary.std_within(taste, [f"p{number // 32}" for number in range(NUM_ROWS)])
    print(f"summary of {NUM_ROWS:,} rows: {time.monotonic() - began:.3f} s (limit {MAX_SUMMARY_S})")
    protocol, sides = (
        Protocol(prompts="p", sampling="s", clip="c", aesthetic="a", dtype="float32"),
        [],
    )
    for side in range(2):
        frames = [
            pl.DataFrame({"prompt_id": ids, "group": [f"g{number % 8}" for number in range(NUM_ROWS)], "metric": metric,
                          "value": values + side * 0.01 * rng.normal(size=NUM_ROWS)})
            for metric, values in (("clip_score", clip), ("aesthetic", taste))
        ]  # fmt: skip
        schema = TABLES["eval_metrics"].schema
        frame = pl.concat([pl.DataFrame(schema=schema), *frames], how="diagonal")
        sides.append(Scores(checkpoint=f"c@{side}", protocol=protocol, metrics=frame))
    began = time.monotonic()
    compare(*sides, {"clip_score": 0.003, "aesthetic": 0.05})
    print(
        f"verdict over {NUM_ROWS:,} prompts: {time.monotonic() - began:.3f} s (limit {MAX_VERDICT_S})"
    )


def search(num_images: int) -> None:
    """The nearest training image of a checkpoint's, its base's and the validation images; and
    what distances cost."""
    from training.evaluation import copies, distances

    rng = np.random.default_rng(0)
    pool = units(rng, SHARD_ROWS).astype(np.float16)
    queries = units(rng, 2 * NUM_QUERIES + NUM_VALIDATION)
    ids = [f"{number:064x}" for number in range(SHARD_ROWS)]

    def blocks() -> Iterator[copies.Block]:
        for start in range(0, num_images, SHARD_ROWS):
            yield ids[: num_images - start], pool[: num_images - start]

    before = peak_mb()
    began = time.monotonic()
    copies.nearest(queries, blocks())
    spent = time.monotonic() - began
    rate = 2 * num_images * len(queries) * WIDTH / spent / 1e9
    print(f"nearest of {num_images:,} x {WIDTH} (float16, a shard at a time) for {len(queries):,} images: "
          f"{spent:.1f} s, {rate:.0f} GFLOP/s, {peak_mb() - before:.0f} MB (limit {MAX_SEARCH_MB})")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        vectors = pl.Series(
            "projection", pool.astype(np.float32).tolist(), dtype=pl.List(pl.Float32)
        )
        pl.DataFrame({"image_id": ids, "projection": vectors}).write_parquet(path)
        began = time.monotonic()
        flat = (
            pl.read_parquet(path)["projection"]
            .explode(empty_as_null=False, keep_nulls=False)
            .to_numpy()
        )
        each = time.monotonic() - began
        assert flat.size == SHARD_ROWS * WIDTH
    whole = each * num_images / SHARD_ROWS
    print(
        f"  a shard of {SHARD_ROWS:,} embeddings is read in {each:.2f} s: {whole:.0f} s for all of them"
    )
    began = time.monotonic()
    real = queries[-NUM_VALIDATION:]
    for cloud in (queries[:NUM_QUERIES], queries[NUM_QUERIES : 2 * NUM_QUERIES]):
        distances.cmmd(cloud, real)
        distances.kid(cloud, real)
    print(
        f"CMMD and KID of {NUM_QUERIES} against {NUM_VALIDATION} images, twice: {time.monotonic() - began:.1f} s"
    )


def units(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random vectors of length 1."""
    found = rng.standard_normal((count, WIDTH), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def peak_mb() -> float:
    """Most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Print all ratios and limits."""
    search(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_IMAGES)
    tables()
    scoring()


if __name__ == "__main__":
    main()
