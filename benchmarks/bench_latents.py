"""What latent files cost: reading and size against bigASP's gzip files, opening, memory, buckets,
encoding.

Usage: python benchmarks/bench_latents.py

Reading and writing are given as ratios within this run. Latents are simulated: SDXL's published
means and deviations per channel (config of Playground v2.5), noise of amplitude 1/f as of images,
and a fifth of white noise.
"""

import gzip
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from training import manifests
from training.buckets import bucket_assignments
from training.buckets.geometry import Size
from training.buckets.plans import BucketConfig
from training.latents import codec as latent_codec
from training.latents.files import BucketWriter, Codec, LatentFile, from_bfloat16, to_bfloat16
from training.latents.source import LatentSource
from training.tables.schemas import TABLES

if TYPE_CHECKING:
    from training.models.vae import Vae

ROOT = Path(__file__).resolve().parents[1]
MEAN = np.array([-1.66, 1.89, -1.38, 2.52]) * 0.13025
STD = np.array([8.49, 5.90, 6.55, 5.23]) * 0.13025
# The seven fullest buckets of bigASP's page.
BUCKETS = [
    Size(1216, 832),
    Size(832, 1216),
    Size(1152, 832),
    Size(896, 1152),
    Size(1152, 896),
    Size(1344, 768),
]
BUCKETS.append(Size(1024, 1024))
ROWS, BATCH = 64, 16
NUM_FILES, FILES_PER_SHARD, ROWS_PER_FILE = 1_500, 10, 1_000
NUM_IMAGES = 1_500_000
ENCODING_GOAL_PER_S = 70.0
READ_BYTES, READ_FILES, READ_S = 100e9, 8, 60
HEADER = struct.Struct("<7I")


def latents(size: Size, count: int, rng: np.random.Generator) -> np.ndarray:
    """Simulated latents `(count, 4, H/8, W/8)` as the bits of bfloat16."""
    height, width = size.height // 8, size.width // 8
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    radius[0, 0] = np.inf
    found = []
    for _ in range(count):
        white = rng.standard_normal((4, height, width))
        pink = np.fft.irfft2(np.fft.rfft2(white) / radius, s=(height, width))
        mixed = 0.8**0.5 * pink / pink.std() + 0.2**0.5 * rng.standard_normal(white.shape)
        found.append((mixed * STD[:, None, None] + MEAN[:, None, None]).astype(np.float32))
    return to_bfloat16(np.stack(found))


def per_second(work: Callable[[], int], seconds: float = 2.0) -> float:
    """What `work` counts, by second; the best of three spans."""
    work()
    best = 0.0
    for _ in range(3):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 3:
            done += work()
        best = max(best, done / (time.perf_counter() - began))
    return best


def write_gzip(folder: Path, index: int, bits: np.ndarray) -> Path:
    """One image as bigASP keeps it: seven numbers and fp16, through gzip."""
    path = folder / f"{index % 1000:03d}" / f"{index}.bin.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = from_bfloat16(bits).astype("<f2")
    with gzip.open(path, "wb") as file:
        file.write(HEADER.pack(index, 1024, 1024, 0, 0, *values.shape[1:]) + values.tobytes())
    return path


def read_gzip(paths: Sequence[Path]) -> np.ndarray:
    """A batch of such files, `(B, 4, H/8, W/8)` fp16."""
    found = []
    for path in paths:
        with gzip.open(path) as file:
            content = file.read()
        rows, columns = HEADER.unpack_from(content)[5:]
        found.append(
            np.frombuffer(content, dtype="<f2", offset=HEADER.size).reshape(4, rows, columns)
        )
    return np.stack(found)


def write_files(folder: Path, bits: Sequence[np.ndarray], codec: Codec) -> list[LatentFile]:
    """One latent file per bucket."""
    files = []
    for size, rows in zip(BUCKETS, bits, strict=True):
        writer = BucketWriter(
            folder=folder, generation=1, bucket=size, max_bytes=256_000_000, codec=codec
        )
        for number, row in enumerate(rows):
            writer.add_bits(str(number), row, None)
        writer.finish()
        files += [LatentFile(folder, entry) for entry in writer.entries]
    return files


def reading_and_size(folder: Path) -> None:
    """Random batches of one bucket from warm files; size and speed of writing; every bit back."""
    rng = np.random.default_rng(0)
    bits = [latents(size, ROWS, rng) for size in BUCKETS]
    paths = [
        [write_gzip(folder / "gzip", 1000 * place + row, rows[row]) for row in range(ROWS)]
        for place, rows in enumerate(bits)
    ]

    def from_gzip() -> int:
        of_bucket = paths[rng.integers(len(paths))]
        return len(read_gzip([of_bucket[row] for row in draw(rng)]))

    base = per_second(from_gzip)
    print(
        f"batches of {BATCH} of one bucket, {ROWS * len(BUCKETS)} images, warm: bigASP's gzip files {base:,.0f}/s"
    )
    goals: dict[Codec, int] = {"raw": 40, "split-zstd": 6}
    for codec, goal in goals.items():
        files = write_files(folder / codec, bits, codec)
        for file, rows in zip(files, bits, strict=True):
            assert (file.gather(range(ROWS))[0] == rows).all(), f"{codec} changed a bit"
        speed = per_second(partial(gather_some, files, rng))
        print(f"  {codec}: {speed / base:.1f} x (goal {goal} x), {speed:,.0f}/s")
    stored = sum(path.stat().st_size for path in (folder / "split-zstd").glob("*.safetensors"))
    raw = sum(rows.nbytes for rows in bits)
    print(f"split-zstd: {stored / raw:.3f} of raw bf16 (goal 0.67), every bit came back")
    halves = from_bfloat16(bits[0][0]).astype("<f2").tobytes()
    theirs = per_second(lambda: len(gzip.compress(halves)[:0]) + len(halves))
    ours = per_second(lambda: len(latent_codec.encode(bits[0][0])[1][:0]) + bits[0][0].nbytes)
    print(
        f"  encodes {ours / theirs:.1f} x as fast as gzip bigASP's fp16 (goal 15 x), {ours / 1e6:,.0f} MB/s"
    )


def draw(rng: np.random.Generator) -> list[int]:
    """Rows of a batch."""
    return rng.choice(ROWS, BATCH, replace=False).tolist()


def gather_some(files: Sequence[LatentFile], rng: np.random.Generator) -> int:
    """One batch."""
    return len(files[int(rng.integers(len(files)))].gather(draw(rng))[0])


def opening(folder: Path) -> None:
    """What an epoch's border costs for 1.5 million images: choose the generation of each shard,
    open its files.

    The files are holes of the right size behind a real header: opening reads no further.
    """
    ids: dict[str, list[str]] = {}
    for number in range(NUM_FILES // FILES_PER_SHARD):
        shard = f"s{number:06d}"
        write_hollow_shard(folder / shard, number)
        ids[shard] = pl.read_parquet(folder / shard / "*.parquet", columns=["image_id"])[
            "image_id"
        ].to_list()
    began = time.perf_counter()
    source = LatentSource(folder)
    opened = 0
    for shard, members in ids.items():
        generation, missing, _ = source.choose(shard, members)
        assert generation is not None, missing
        opened += len(generation.open_files())
    seconds = time.perf_counter() - began
    print(
        f"opening {opened:,} latent files with {opened * ROWS_PER_FILE:,} images: {seconds:.2f} s (limit 2 s)"
    )


def write_hollow_shard(folder: Path, number: int) -> None:
    """A committed generation of `FILES_PER_SHARD` files whose values are holes."""
    folder.mkdir(parents=True)
    entries, tables = [], []
    for place in range(FILES_PER_SHARD):
        name = f"g0001-1024x1024-{number:04x}{place:04x}.safetensors"
        num_bytes = ROWS_PER_FILE * 4 * 128 * 128 * 2
        tensor = {
            "dtype": "BF16",
            "shape": [ROWS_PER_FILE, 4, 128, 128],
            "data_offsets": [0, num_bytes],
        }
        text = json.dumps(
            {"__metadata__": {"codec": "raw", "scaling_factor": "0.13025"}, "latents": tensor}
        ).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + num_bytes)
        entries.append(manifests.Entry(name=name, bytes=8 + len(text) + num_bytes, sha256="0" * 64))
        rows = np.arange(ROWS_PER_FILE) + (number * FILES_PER_SHARD + place) * ROWS_PER_FILE
        digests = [hashlib.sha256(str(row).encode()).hexdigest() for row in rows.tolist()]
        tables.append(
            pl.DataFrame({"image_id": digests, "file": name, "row": np.arange(ROWS_PER_FILE)})
        )
    frame = pl.concat(tables)
    schema = TABLES["latents"].schema
    others = [
        pl.lit(dtype == pl.Boolean).cast(dtype).alias(name)
        for name, dtype in schema.items()
        if name not in frame
    ]
    table = manifests.write_parquet(
        folder, "g0001", frame.with_columns(others).select(list(schema)).cast(schema)
    )
    manifest = manifests.Manifest(
        table="latents",
        part=f"sdxl|{folder.name}",
        version=1,
        files=(table, *entries),
        rows=frame.height,
        digest="0",
    )
    manifests.commit_manifest(folder / "g0001.json", manifest)


READER = """
import sys, time
from pathlib import Path
import numpy as np
from training import commit, manifests
from training.latents.files import LatentFile
folder, total, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
files = [LatentFile(folder, manifests.Entry(name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size))
         for path in sorted(folder.glob("*.safetensors"))]
rng, done, began = np.random.default_rng(0), 0, time.perf_counter()
while done < total and time.perf_counter() - began < seconds:
    file = files[rng.integers(len(files))]
    done += file.gather(rng.choice(file.shape[0], 16, replace=False))[0].nbytes
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(done, time.perf_counter() - began, *(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")))
"""


def memory(folder: Path) -> None:
    """A process that reads as much as it can in a minute, 100 GB at most, from fewer files again
    and again."""
    rng = np.random.default_rng(1)
    few = latents(Size(1024, 1024), 16, rng)
    num_bytes = 0
    for _ in range(READ_FILES):
        writer = BucketWriter(
            folder=folder, generation=1, bucket=Size(1024, 1024), max_bytes=256_000_000
        )
        for row in range(256_000_000 // few[0].nbytes - 1):
            writer.add_bits(str(row), few[rng.integers(len(few))], None)
        writer.finish()
        num_bytes += sum(entry.bytes for entry in writer.entries)
    arguments = [sys.executable, "-c", READER, str(folder), str(READ_BYTES), str(READ_S)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    read, seconds, anonymous, mapped = map(float, done.stdout.split())
    print(
        f"read {read / 1e9:.1f} GB in {seconds:.0f} s out of {num_bytes / 1e9:.1f} GB of latent files, one process:"
    )
    print(
        f"  {anonymous / 1e6:.0f} MB of its own (limit 1000 MB), {mapped / 1e9:.1f} GB of the page cache mapped"
    )


def assignment() -> None:
    """Buckets of 1.5 million images, and the report."""
    rng = np.random.default_rng(2)
    sides = {
        name: rng.integers(900, 5000, NUM_IMAGES).astype(np.int32) for name in ("height", "width")
    }
    images = pl.DataFrame({"image_id": np.arange(NUM_IMAGES), "shard": "s000000", **sides}).cast(
        {"image_id": pl.String}
    )
    began = time.perf_counter()
    placed, rejected = bucket_assignments.assign(images, BucketConfig())
    seconds = time.perf_counter() - began
    bucket_assignments.report(placed, (4, 8, 16))
    whole = time.perf_counter() - began
    print(
        f"buckets of {NUM_IMAGES:,} images: {seconds:.2f} s (goal well under 1 s), {whole:.2f} s with the report"
    )
    print(f"  {placed.height:,} placed, {len(rejected):,} too small")


def encoding(*, tiny: bool = False) -> dict[str, float]:
    """The VAE adapter on images of 1 MP on a CUDA device; without one, or if asked, on small ones
    with a tiny VAE.

    Returns:
        Images per second by the precision that was used.
    """
    import torch
    from diffusers import AutoencoderKL

    from training.models.vae import Precision, Vae

    cuda = torch.cuda.is_available()
    full = cuda and not tiny
    channels, side, batch = ([128, 256, 512, 512], 1024, 8) if full else ([4, 4, 4, 4], 64, 2)
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=channels, norm_num_groups=min(32, *channels), layers_per_block=2, scaling_factor=0.13025,
        sample_size=side,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    device = torch.cuda.get_device_name() if cuda else "no CUDA device"
    which = "full-size" if full else "tiny"
    print(
        f"encoding {side} x {side} px in batches of {batch}, {which} VAE, random weights; {device}"
    )
    pictures = list(
        np.random.default_rng(3).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    )
    precisions: tuple[Precision, ...] = ("tf32", "bf16")
    speeds = {}
    for precision in precisions:
        vae = Vae(model, "cuda" if cuda else "cpu", precision=precision)
        speed = per_second(partial(encode_some, vae, pictures), seconds=9.0 if full else 0.5)
        goal = f" (goal {ENCODING_GOAL_PER_S:g}/s on an H200)" if full else ""
        print(f"  asked for {precision}, used {vae.precision}: {speed:.1f} images/s{goal}")
        speeds[vae.precision] = speed
    return speeds


def encode_some(vae: "Vae", pictures: Sequence[np.ndarray]) -> int:
    """One batch, with log-variance."""
    return len(vae(pictures, with_log_variance=True))


def main() -> None:
    """All of it, in a folder that is removed afterwards."""
    for measure in (reading_and_size, opening, memory):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder))
    assignment()
    encoding()


if __name__ == "__main__":
    main()
