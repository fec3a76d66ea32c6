"""Which candidates show the same image, and which one of them goes on.

Same bytes, same upright pixels, or nearly the same image by perceptual hash: a re-encoded or
resized copy. A mirror image is no duplicate here: it shows another direction, and captions and tags
tell the two apart.
"""

import numpy as np
import polars as pl

from training.tables.schemas import TABLES

MAX_DISTANCE = 3
"""Bits in which the hashes of near-duplicates may differ."""
MIN_CONTRAST = 0.02
"""Flatter images are never near-duplicates: their hash is made of noise."""
MIN_BITS = 8
"""A hash with fewer ones, or fewer zeros, is that of a flat image or a plain gradient."""
MAX_LUMA_DIFFERENCE = 0.03
"""Copies keep brightness and contrast; two drawings of one layout in other colours do not. Luma
0-1."""
MAX_ASPECT_DIFFERENCE = 0.03
"""Copies keep their shape, up to rounding of small sizes. Natural logarithm of width / height."""

_BANDS = tuple(range(0, 64, 16))
"""Four bands of 16 bits: two hashes at distance 3 or less agree in at least one of them."""


def find_groups(raw_images: pl.DataFrame) -> pl.DataFrame:
    """Group candidates that show one image, and choose one of each group.

    Ties are transitive: a chain of near copies is one group. The one kept has the most pixels, then
    the most bytes per pixel, then the smallest image_id, then the first (source, source_id).

    Args:
        raw_images: The table, without candidates that are gone.

    Returns:
        `duplicate_groups`: every candidate of a group of two or more.
    """
    if raw_images.is_empty():
        return TABLES["duplicate_groups"].empty()
    images = (
        raw_images.select("pixel_digest").unique().sort("pixel_digest").with_row_index("picture")
    )
    rows = raw_images.join(images, on="pixel_digest")
    components = _connect(rows)
    rows = rows.with_columns(component=pl.Series(components)[rows["picture"]])
    rows = rows.filter(pl.len().over("component") > 1)
    area = pl.col("height").cast(pl.Int64) * pl.col("width")
    rows = rows.with_columns(area=area, density=pl.col("bytes") / area)
    rows = rows.sort(
        ["component", "area", "density", "image_id", "source", "source_id"],
        descending=[False, True, True, False, False, False],
    )
    best = {
        name: pl.col(name).first().over("component")
        for name in ("image_id", "pixel_digest", "area", "density")
    }
    kept = pl.int_range(pl.len()).over("component") == 0
    kind = (
        pl.when(kept)
        .then(pl.lit("kept"))
        .when(pl.col("image_id") == best["image_id"])
        .then(pl.lit("exact"))
        .when(pl.col("pixel_digest") == best["pixel_digest"])
        .then(pl.lit("pixels"))
        .otherwise(pl.lit("near"))
    )
    why = (
        pl.when(kept)
        .then(pl.lit("most pixels, then most bytes per pixel, then smallest id"))
        .when(pl.col("image_id") == best["image_id"])
        .then(pl.lit("same bytes"))
        .when(pl.col("area") < best["area"])
        .then(pl.lit("fewer pixels"))
        .when(pl.col("density") < best["density"])
        .then(pl.lit("fewer bytes per pixel"))
        .otherwise(pl.lit("larger id"))
    )
    rows = rows.with_columns(
        group=pl.col("image_id").min().over("component"), kind=kind, kept=kept, why=why
    )
    table = TABLES["duplicate_groups"]
    return table.conform(rows.select(list(table.columns)))


def _connect(rows: pl.DataFrame) -> np.ndarray:
    """The component of each image (a distinct pixel digest), by near-duplicate pairs."""
    # Here, because Dagster loads this module to draw the graph, and SciPy takes a third of a
    # second.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_images = rows["picture"].n_unique()
    pairs = near_pairs(rows.unique("picture", keep="any"))
    first, second = pairs["first"].to_numpy(), pairs["second"].to_numpy()
    graph = coo_array(
        (np.ones(len(first), dtype=np.int8), (first, second)), shape=(num_images, num_images)
    )
    return connected_components(graph, directed=False)[1].astype(np.int64)


def near_pairs(images: pl.DataFrame) -> pl.DataFrame:
    """Pairs of near-duplicate images.

    Args:
        images: Columns image, phash, contrast, brightness, height, width; one row per image.

    Returns:
        Columns first, second with first < second, each pair once.
    """
    ones = pl.col("phash").bitwise_count_ones()
    usable = images.filter(
        (pl.col("contrast") >= MIN_CONTRAST) & (ones >= MIN_BITS) & (ones <= 64 - MIN_BITS)
    ).select(
        "picture",
        "phash",
        "brightness",
        "contrast",
        aspect=(pl.col("width") / pl.col("height")).log(),
    )
    found = []
    for shift in _BANDS:
        banded = usable.with_columns(band=(pl.col("phash") // (1 << shift)) % (1 << 16))
        pairs = banded.lazy().join(banded.lazy(), on="band", suffix="_2")
        pairs = pairs.filter(
            (pl.col("picture") < pl.col("picture_2"))
            & ((pl.col("phash") ^ pl.col("phash_2")).bitwise_count_ones() <= MAX_DISTANCE)
            & ((pl.col("aspect") - pl.col("aspect_2")).abs() <= MAX_ASPECT_DIFFERENCE)
            & ((pl.col("brightness") - pl.col("brightness_2")).abs() <= MAX_LUMA_DIFFERENCE)
            & ((pl.col("contrast") - pl.col("contrast_2")).abs() <= MAX_LUMA_DIFFERENCE)
        )
        found.append(pairs.select(first="picture", second="picture_2").collect(engine="streaming"))
    return pl.concat(found).unique().sort("first", "second")
