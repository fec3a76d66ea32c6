"""A shard is encoded whole or starts again smaller; what is encoded already is copied; what cannot
be is a row."""

import contextlib
import hashlib
from functools import partial

import numpy as np
import polars as pl
import pytest
from PIL import Image

from resources.engine.processes import ProcessPool
from training import manifests, toml
from training.buckets import crops
from training.buckets.geometry import Box, Placement, Size
from training.buckets.plans import BucketConfig
from training.config.workspace import DecodeConfig, EncodingConfig
from training.errors import DataError, ModelError
from training.images import figures
from training.latents.encoder import EncodeJob, Encoder, KeptImage, VaeSpec, placement_of
from training.latents.encoding import encode_shard, same_policy
from training.latents.files import LatentFile, from_bfloat16
from training.latents.generations import read_generation
from training.models.vae import Vae
from training.tables.schemas import TABLES

BUCKETS = (Size(32, 48), Size(48, 32))


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return Vae.load(tiny_sdxl / "vae", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine noisy images, the fourth of which is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(9):
        bucket = BUCKETS[number % 2]
        original = Size(bucket.height + 16, bucket.width + 40)
        pixels = np.random.default_rng(number).integers(0, 256, (*original, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        if number == 3:
            path.write_bytes(b"not an image")
        found.append(
            KeptImage(
                image_id=hashlib.sha256(path.read_bytes()).hexdigest(), file=path, original=original, bucket=bucket,
                flip=number == 5, crop_box=Box(0, 0, 20, 20) if number == 6 else None, padded=number == 7,
                measured=number in (0, 8),
            )
        )  # fmt: skip
    return found


@pytest.fixture
def encode(tmp_path, vae):
    """`encode(images, generation, changes, previous=...)`: one committed generation in
    `tmp_path`."""

    def run(pictures, number, load=lambda: vae, previous=None, older=(), **changes):
        encoding = EncodingConfig(
            buckets=BucketConfig(scale=8), **{"batch_size": 3, "max_file_bytes": 4096, **changes}
        )

        class Loads(Encoder):
            def load(self, spec):
                return load()

        spec = VaeSpec(folder=tmp_path, precision="fp32", tile_above_px=1)
        with contextlib.closing(Loads(DecodeConfig(num_workers=1), "cpu")) as encoder:
            shard = encode_shard(
                pictures,
                EncodeJob(
                    folder=tmp_path, generation=number, encoding=encoding,
                    vae_digest="v", vae=spec, previous=previous, older=older,
                ),
                partial(map, encoder),
            )  # fmt: skip
        frame = TABLES["latents"].conform(shard.frame)
        entry = manifests.write_parquet(tmp_path, f"g{number:04d}", frame)
        manifest = manifests.Manifest(
            table="latents",
            part="s",
            version=1,
            files=(entry, *shard.files),
            rows=frame.height,
            digest=f"{number}",
        )
        manifests.commit_manifest(tmp_path / f"g{number:04d}.json", manifest)
        return shard, read_generation(tmp_path, number)

    return run


def values(generation):
    """image_id -> bits of latents and log-variance."""
    files = generation.open_files()
    return {
        row["image_id"]: files[row["file"]].gather([row["row"]])
        for row in generation.table().iter_rows(named=True)
    }


def test_every_image_is_encoded_as_it_was_placed_or_rejected(pictures, encode, vae):
    shard, generation = encode(pictures, 1)
    assert [row["image_id"] for row in shard.rejected] == [pictures[3].image_id]
    assert generation.manifest.rows == 8
    bits = values(generation)
    table = {row["image_id"]: row for row in generation.table().iter_rows(named=True)}
    for picture in pictures[:3] + pictures[4:]:
        row = table[picture.image_id]
        placement = placement_of(row)
        assert (placement.original, placement.bucket, placement.flip) == (
            picture.original, picture.bucket, picture.flip,
        )  # fmt: skip
        assert placement.padded == picture.padded
        pixels = np.asarray(Image.open(picture.file))
        (expected,) = vae([crops.apply(pixels, placement)], with_log_variance=True)
        mean, spread = bits[picture.image_id]
        np.testing.assert_allclose(
            from_bfloat16(mean[0]), expected.latents, rtol=1 / 128, atol=1e-5
        )
        np.testing.assert_allclose(
            from_bfloat16(spread[0]), expected.log_variance, rtol=1 / 128, atol=1e-3
        )
        assert row["encoded_in"] == 1
    assert (shard.batch_size, shard.precision, shard.num_copied) == (3, "fp32", 0)
    smallest = set(sorted(picture.image_id for picture in pictures)[:6]) - {pictures[3].image_id}
    assert {item.image_id for item in shard.shown} == smallest
    # Those on the validation and stable lists lie in files of their own.
    measured = {table[pictures[number].image_id]["file"] for number in (0, 8)}
    assert measured.isdisjoint(
        table[pictures[number].image_id]["file"] for number in (1, 2, 4, 5, 6, 7)
    )
    for entry in shard.files:
        assert LatentFile(generation.folder, entry).metadata["scaling_factor"] == "0.13025"


@pytest.mark.parametrize("codec", ["raw", "split-zstd"])
def test_rows_are_the_same_in_every_codec(pictures, encode, codec):
    one, other = values(encode(pictures, 1)[1]), values(encode(pictures, 1, codec=codec)[1])
    assert all((a == b).all() for key in one for a, b in zip(one[key], other[key], strict=True))


def test_two_devices_write_what_one_writes(pictures, encode, tiny_sdxl, tmp_path):
    one = encode(pictures, 1)[0]
    job = EncodeJob(
        folder=tmp_path, generation=1, encoding=EncodingConfig(
            buckets=BucketConfig(scale=8), batch_size=3, max_file_bytes=4096
        ),
        vae=VaeSpec(folder=tiny_sdxl / "vae", precision="fp32", tile_above_px=4_194_304),
        vae_digest="v",
    )  # fmt: skip
    decode = DecodeConfig(num_workers=1)
    with contextlib.closing(
        ProcessPool("encode", Encoder, (decode,), ["cpu", "cpu"], print)
    ) as pool:
        two = encode_shard(pictures, job, pool.map)
    assert two.frame.equals(one.frame)
    assert two.files == one.files
    assert two.rejected == one.rejected


def test_out_of_memory_starts_the_shard_again_at_half_the_batch(pictures, encode, vae):
    class Small:
        """A device that holds two images."""

        def __init__(self):
            self.calls, self.freed = [], 0

        def __getattr__(self, name):
            return getattr(vae, name)

        def free_memory(self):
            self.freed += 1

        def __call__(self, images, **options):
            self.calls.append(len(images))
            if len(images) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return vae(images, **options)

    small = Small()
    shard, generation = encode(pictures, 1, load=lambda: small, batch_size=4)
    assert shard.batch_size == 2
    assert small.freed == 1 + len({(item.bucket, item.measured) for item in pictures}), (
        "before the second attempt, and after each group for whoever gets the card next"
    )
    assert max(small.calls[1:]) == 2
    assert len(shard.rejected) == 1, "the first attempt's rejections are not counted again"
    again = encode(pictures, 1, batch_size=2)[1]
    assert generation.manifest.files == again.manifest.files, "as if two had been asked for"


def test_other_errors_and_a_single_image_too_large_are_told(pictures, encode, vae):
    def broken(message):
        class Broken:
            def __getattr__(self, name):
                return getattr(vae, name)

            def __call__(self, images, **options):
                raise RuntimeError(message)

        return Broken

    with pytest.raises(RuntimeError, match="kernel image"):
        encode(pictures, 1, load=broken("no kernel image is available"))
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(pictures, 1, load=broken("CUDA out of memory"))


def test_values_that_are_not_finite_cost_their_image_and_no_other(pictures, encode, vae):
    bad = pictures[4].image_id

    class Poisoned:
        def __getattr__(self, name):
            return getattr(vae, name)

        def __call__(self, images, **options):
            rows = vae(images, **options)
            pixels = crops.apply(np.asarray(Image.open(pictures[4].file)), placed)
            return [
                type(row)(latents=row.latents * np.nan, log_variance=row.log_variance, finite=False)
                if np.array_equal(image, pixels) else row
                for image, row in zip(images, rows, strict=True)
            ]  # fmt: skip

    table = encode(pictures, 1)[1].table()
    placed = placement_of(table.row(by_predicate=pl.col("image_id") == bad, named=True))
    shard, generation = encode(pictures, 1, load=Poisoned)
    assert {"image_id": bad, "reason": "non_finite_latents"} in shard.rejected
    assert generation.manifest.rows == 7
    assert bad not in generation.table()["image_id"].to_list()


def test_what_is_encoded_already_is_copied_bit_for_bit_and_only_the_rest_encoded(pictures, encode):
    _, first = encode(pictures[:5], 1)
    shard, second = encode(pictures, 2, previous=first)
    assert shard.num_copied == 4
    before, after = values(first), values(second)
    assert all(
        (a == b).all() for key in before for a, b in zip(before[key], after[key], strict=True)
    )
    born = dict(second.table().select("image_id", "encoded_in").iter_rows())
    assert [born[picture.image_id] for picture in pictures if picture.image_id in born] == [
        1,
        1,
        1,
        1,
        2,
        2,
        2,
        2,
    ]

    # Nothing new: no VAE is loaded, and rows that are no longer wanted are gone.
    def never():
        raise AssertionError("the VAE was loaded")

    shard, third = encode(pictures[4:], 3, load=never, previous=second)
    assert (shard.num_copied, third.manifest.rows) == (5, 5)
    for entry in third.open_files().values():
        assert entry.metadata["scaling_factor"] == "0.13025"


def test_a_image_that_was_missing_from_a_generation_is_copied_from_an_older_one(pictures, encode):
    def never():
        raise AssertionError("the VAE was loaded")

    wanted = pictures[:3] + pictures[4:]  # One of them cannot be encoded.
    _, first = encode(wanted, 1)
    _, second = encode(wanted[2:], 2, load=never, previous=first)
    shard, third = encode(wanted, 3, load=never, previous=second, older=(first,))
    assert shard.num_copied == len(wanted)
    before, after = values(first), values(third)
    assert before.keys() == after.keys()
    assert all(
        (a == b).all() for key in before for a, b in zip(before[key], after[key], strict=True)
    )

    # A damaged older generation costs its images' encoding; a newer one wins where both have a
    # image.
    for entry in first.manifest.files:
        (first.folder / entry.name).write_bytes(b"")
    shard, fourth = encode(wanted, 4, previous=second, older=(first,))
    assert shard.num_copied == len(wanted) - 2
    assert fourth.table().filter(pl.col("encoded_in") == 4).height == 2


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"bucket": Size(40, 48)}),
        (0, {"original": Size(49, 88)}),
        (0, {"flip": True}),
        (0, {"padded": True}),
        (7, {"padded": False}),
        (6, {"crop_box": Box(0, 60, 20, 80)}),
        (0, {"resized": Size(48, 88)}),
    ],
)
def test_a_image_whose_placement_changed_is_encoded_anew(pictures, encode, number, change):
    from dataclasses import replace

    _, first = encode(pictures, 1)
    changed = replace(pictures[number], **change)
    if "original" in change:
        # The same id under another size: only a faulty source could bring it, and it must not be
        # taken for the old.
        with pytest.raises(DataError, match="placement was made for 49x88"):
            encode([changed], 2, previous=first)
        return
    shard, second = encode([changed], 2, previous=first)
    assert shard.num_copied == 0
    assert second.table()["encoded_in"].to_list() == [2]
    assert encode([pictures[number]], 3, previous=first)[0].num_copied == 1


def test_latents_without_log_variance_are_copied_to_files_of_their_own(pictures, encode):
    _, first = encode(pictures[:3], 1, log_variance=False)
    shard, second = encode(pictures, 2, previous=first)
    assert shard.num_copied == 3
    spreads = {image_id: spread is None for image_id, (_, spread) in values(second).items()}
    assert [spreads[picture.image_id] for picture in pictures if picture.image_id in spreads] == [
        True
    ] * 3 + [False] * 5


def test_only_what_decides_a_row_makes_another_policy():
    base = toml.dump(EncodingConfig())
    for change, same in (
        ({"batch_size": 3}, True), ({"codec": "split-zstd"}, True), ({"max_file_bytes": 5}, True),
        ({"crop": "centre"}, False), ({"precision": "fp32"}, False), ({"seed": 4}, False),
        ({"avoid_watermarks": 0.5}, False), ({"log_variance": False}, False), ({"tile_above_px": 9}, False),
    ):  # fmt: skip
        assert same_policy(base, toml.dump(EncodingConfig(**change))) is same, change


def test_bf16_is_refused_before_anything_is_written_where_it_costs_quality(
    pictures, encode, tiny_sdxl, tmp_path
):
    poor = Vae.load(tiny_sdxl / "vae", "cpu", precision="bf16")
    asked = []

    def refuse(images):
        asked.append(len(images))
        raise ModelError("VAE in bf16: worse")

    poor.check_bf16 = refuse
    with pytest.raises(ModelError, match="VAE in bf16"):
        encode(pictures, 1, load=lambda: poor, precision="bf16")
    assert asked[0] >= 1
    assert not list(tmp_path.glob("*.safetensors"))
    good = Vae.load(tiny_sdxl / "vae", "cpu", precision="bf16")
    assert encode(pictures, 1, load=lambda: good, precision="bf16")[0].precision == "bf16"


def test_the_shown_source_has_its_crop_and_watermarks_drawn_in():
    pixels = np.full((384, 768, 3), 200, np.uint8)
    placement = Placement(Size(384, 768), Size(96, 192), 0, 48, Size(96, 96), False)
    shown = figures.placed_source(pixels, placement, [Box(200, 300, 300, 400)])
    assert shown.shape == (96, 192, 3)
    yellow = (shown[..., 0] > 220) & (shown[..., 2] < 80) & (shown[..., 1] > 150)
    red = (shown[..., 0] > 200) & (shown[..., 1] < 90)
    columns, rows = np.nonzero(yellow.any(axis=0))[0], np.nonzero(red.any(axis=1))[0]
    assert (columns.min(), columns.max()) == (48, 143)
    assert (rows.min(), rows.max()) == (50, 74)
    assert (shown[:, :48].max(), shown[:, 144:].max()) == (70, 70), "what is cut away is dark"
    assert shown[10, 96].tolist() == [200, 200, 200]


def test_of_the_shown_images_two_have_a_watermark_where_there_are_such(pictures, encode):
    from dataclasses import replace

    ids = sorted(picture.image_id for picture in pictures if picture is not pictures[3])
    last = set(ids[-3:])
    marked = [
        replace(picture, watermarks=((Box(0, 0, 9, 9), 1.0),))
        if picture.image_id in last
        else picture
        for picture in pictures[:3] + pictures[4:]
    ]
    shown = {item.image_id for item in encode(marked, 1)[0].shown}
    assert shown == {*ids[:4], *sorted(last)[:2]}
