"""Duplicate groups against a plain loop over all pairs, and on drawn copies."""

import hashlib
import io
import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.config.workspace import DecodeConfig
from training.curation import duplicates
from training.images import decoding, measures
from training.tables.schemas import TABLES

SCHEMA = TABLES["raw_images"].schema


def rows(pictures):
    """`raw_images` of PNG or JPEG bytes by name."""
    found = []
    for name, data in pictures.items():
        facts = measures.measure(
            data, hashlib.sha256(data).hexdigest(), decoding.decode(data, DecodeConfig())
        )
        columns = {field: getattr(facts, field) for field in facts.__slots__}
        found.append({"source": "s", "source_id": name, "locator": name, **columns})
    return pl.DataFrame(found, schema=SCHEMA, orient="row")


def encode(pixels, fmt="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt, **options)
    return buffer.getvalue()


def textured(seed, height=96, width=128):
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 8, width // 8, 3), dtype=np.uint8
    )
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def by_id(frame):
    return {row["source_id"]: row for row in frame.iter_rows(named=True)}


def test_drawn_copies_are_one_group_and_the_best_is_kept():
    original = textured(0)
    small = np.asarray(Image.fromarray(original).resize((96, 72), Image.Resampling.LANCZOS))
    raw = rows(
        {
            "original.png": encode(original),
            "again.png": encode(original),
            "other_bytes.png": encode(original, compress_level=1),
            "jpeg.jpg": encode(original, "JPEG", quality=70),
            "small.png": encode(small),
            "mirrored.png": encode(original[:, ::-1].copy()),
            "other.png": encode(textured(1)),
        }
    )
    groups = by_id(duplicates.find_groups(raw))
    assert set(groups) == {"original.png", "again.png", "other_bytes.png", "jpeg.jpg", "small.png"}
    assert {row["group"] for row in groups.values()} == {
        min(raw.filter(pl.col("source_id").is_in(list(groups)))["image_id"])
    }
    kept = [name for name, row in groups.items() if row["kept"]]
    assert kept == ["other_bytes.png"]  # Same pixels, weaker compression: most bytes per pixel.
    assert groups["other_bytes.png"]["kind"] == "kept"
    assert groups["original.png"]["kind"] == groups["again.png"]["kind"] == "pixels"
    assert groups["jpeg.jpg"]["kind"] == groups["small.png"]["kind"] == "near"
    assert groups["small.png"]["why"] == "fewer pixels"
    assert groups["jpeg.jpg"]["why"] == "fewer bytes per pixel"


def test_equal_bytes_keep_the_first_candidate():
    data = encode(textured(0))
    groups = by_id(duplicates.find_groups(rows({"b.png": data, "a.png": data, "c.png": data})))
    assert [groups[name]["kind"] for name in ("a.png", "b.png", "c.png")] == [
        "kept",
        "exact",
        "exact",
    ]
    assert groups["b.png"]["why"] == "same bytes"


def test_flat_and_nearly_flat_images_are_no_duplicates():
    rng = np.random.default_rng(0)
    flat = {f"flat{v}.png": encode(np.full((64, 64, 3), v, np.uint8)) for v in (10, 11, 12)}
    noisy = {
        f"noise{i}.png": encode(rng.integers(100, 104, (64, 64, 3), dtype=np.uint8))
        for i in range(4)
    }
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, axis=0).repeat(
        3, axis=2
    )
    brighter = np.clip(ramp.astype(int) + 2, 0, 255).astype(np.uint8)
    ramps = {"ramp.png": encode(ramp), "ramp2.png": encode(brighter)}
    assert duplicates.find_groups(rows({**flat, **noisy, **ramps})).is_empty()


def test_one_layout_in_other_colours_is_no_duplicate():
    def circle(colour, size=96):
        y, x = np.mgrid[0:size, 0:size]
        pixels = np.full((size, size, 3), 235, np.uint8)
        pixels[(y - 40) ** 2 + (x - 55) ** 2 < 600] = colour
        return pixels

    red, blue = circle((230, 30, 30)), circle((20, 20, 120))
    small_red = np.asarray(Image.fromarray(red).resize((64, 64), Image.Resampling.LANCZOS))
    groups = by_id(
        duplicates.find_groups(rows({"r": encode(red), "b": encode(blue), "s": encode(small_red)}))
    )
    assert set(groups) == {"r", "s"}


def test_no_images_no_groups():
    assert duplicates.find_groups(TABLES["raw_images"].empty()).is_empty()


def synthetic(hashes, **overrides):
    count = len(hashes)
    columns = {
        "source": ["s"] * count,
        "source_id": [f"{i:04d}" for i in range(count)],
        "image_id": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)],
        "pixel_digest": [hashlib.sha256(f"p{i}".encode()).hexdigest() for i in range(count)],
        "phash": hashes,
        "height": [100] * count,
        "width": [100] * count,
        "bytes": [1000] * count,
        "brightness": [0.5] * count,
        "contrast": [0.3] * count,
    } | overrides
    frame = pl.DataFrame(columns, schema_overrides={n: SCHEMA[n] for n in columns})
    return frame.with_columns(
        pl.lit(None, dtype=t).alias(n) for n, t in SCHEMA.items() if n not in columns
    )


BASE = 0x5A3C_96F0_1E87_4BD2


@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 63), max_size=5)),
        min_size=1,
        max_size=25,
    )
)
def test_groups_are_the_components_of_all_close_pairs(flips):
    bases = [BASE, ~BASE & (2**64 - 1), BASE ^ 0xFFFF_0000_FFFF_0000]
    hashes = []
    for base, bits in flips:
        value = bases[base]
        for bit in bits:
            value ^= 1 << bit
        hashes.append(value)
    raw = synthetic(hashes)
    parent = list(range(len(hashes)))
    for a, b in itertools.combinations(range(len(hashes)), 2):
        if (hashes[a] ^ hashes[b]).bit_count() <= 3:
            old, new = parent[b], parent[a]
            parent = [new if p == old else p for p in parent]
    expected = {
        frozenset(raw["image_id"][i] for i in range(len(hashes)) if parent[i] == root)
        for root in set(parent)
        if parent.count(root) > 1
    }
    groups = duplicates.find_groups(raw)
    found = {frozenset(part["image_id"]) for part in groups.partition_by("group")}
    assert found == expected
    kept = groups.filter(
        "kept"
    )  # All images are equally large here: the smallest id is kept, and names the group.
    assert (
        sorted(kept["image_id"])
        == sorted(min(group) for group in expected)
        == sorted(kept["group"])
    )


def test_the_order_of_the_rows_does_not_matter():
    raw = synthetic(
        [BASE ^ (1 << (i % 3)) if i % 2 else (BASE << 7) & (2**64 - 1) for i in range(20)]
    )
    expected = duplicates.find_groups(raw)
    for seed in range(3):
        assert duplicates.find_groups(raw.sample(fraction=1.0, shuffle=True, seed=seed)).equals(
            expected
        )


@pytest.mark.parametrize(
    "overrides",
    [
        {"contrast": [0.01, 0.01]},
        {"brightness": [0.5, 0.6]},
        {"contrast": [0.3, 0.4]},
        {"width": [100, 110]},
    ],
)
def test_guards_part_what_only_the_hash_joins(overrides):
    assert duplicates.find_groups(synthetic([BASE, BASE])).height == 2
    assert duplicates.find_groups(synthetic([BASE, BASE], **overrides)).is_empty()
    assert duplicates.find_groups(synthetic([1 << 63, 1 << 63])).is_empty()


@pytest.mark.parametrize("band", range(4))
def test_any_band_may_be_the_one_that_agrees(band):
    changed = BASE
    for other in set(range(4)) - {band}:
        changed ^= 1 << (16 * other + 5)
    assert duplicates.find_groups(synthetic([BASE, changed])).height == 2
    assert duplicates.find_groups(synthetic([BASE, changed ^ 1 << (16 * band)])).is_empty()
