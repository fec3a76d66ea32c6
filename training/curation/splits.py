"""Which kept images are held out, and which training images the stable loss is measured on; both
lists persist.

An image that was held out never trains and one that trained is never held out, as long as the lists
of the previous commit are handed on.
"""

import polars as pl

from training import seeds

_MAX_SHARE = 0.05
"""Largest share of the kept images that is held out, unless the source says otherwise."""


def assign(
    images: pl.DataFrame,
    *,
    num_validation: int,
    num_stable: int,
    seed: int,
    previous: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Part images into training and validation by whole clusters.

    A cluster goes where its members went before; else to validation when its source says so of one
    of them; else to training when its source says so; the rest fill validation in the order of
    SHA-256 (seed, cluster) up to min(num_validation, 5 % of the kept, at least 1). A cluster that
    would overshoot is skipped, unless nothing would be held out. A single image is never held
    out.

    Where two clusters have grown into one whose members were on both sides before, each of those
    stays on its side; its other members belong to neither (`split` is null), because they resemble
    both. When none of those is kept any more, the others train: what was held out is gone, and what
    trained has been seen.

    Args:
        images: Columns image_id, cluster, kept, source_split (train, validation or null). Images
            that are not kept only tell where their cluster went before.
        num_validation: Images held out at most.
        num_stable: Training images on the stable list at most.
        seed: Keys both orders.
        previous: Columns image_id, split, stable of the previous commit; None for the first.

    Returns:
        Columns image_id, split, stable: a row for each kept image.
    """
    earlier = _earlier(previous)
    known = images.join(earlier, on="image_id", how="left")
    sides = known.group_by("cluster").agg(
        was_train=(pl.col("before") == "train").any(),
        was_validation=(pl.col("before") == "validation").any(),
        says_train=(pl.col("source_split") == "train").filter("kept").any(),
        says_validation=(pl.col("source_split") == "validation").filter("kept").any(),
        keeps_known=pl.col("before").filter("kept").is_not_null().any(),
        size=pl.col("kept").sum(),
    )
    torn = pl.col("was_train") & pl.col("was_validation")
    sides = sides.filter(pl.col("size") > 0).with_columns(
        side=pl.when(torn)
        .then(pl.when("keeps_known").then(pl.lit("torn")).otherwise(pl.lit("train")))
        .when(pl.col("was_validation"))
        .then(pl.lit("validation"))
        .when(pl.col("was_train"))
        .then(pl.lit("train"))
        .when(pl.col("says_validation"))
        .then(pl.lit("validation"))
        .when(pl.col("says_train"))
        .then(pl.lit("train"))
    )
    kept = known.filter("kept").join(sides.select("cluster", "side"), on="cluster")
    own = pl.when(pl.col("side") == "torn").then(pl.col("before")).otherwise(pl.col("side"))
    held_out = kept.filter(own == "validation").height
    limit = min(num_validation, max(1, int(kept.height * _MAX_SHARE))) if kept.height > 1 else 0
    chosen = _fill(sides.filter(pl.col("side").is_null()), limit - held_out, held_out, seed)
    free = (
        pl.when(pl.col("cluster").is_in(chosen))
        .then(pl.lit("validation"))
        .otherwise(pl.lit("train"))
    )
    kept = kept.with_columns(split=pl.when(pl.col("side").is_null()).then(free).otherwise(own))
    stable = _stable(kept, num_stable, seed)
    return kept.select("image_id", "split", stable=pl.col("image_id").is_in(stable)).sort(
        "image_id"
    )


def _earlier(previous: pl.DataFrame | None) -> pl.DataFrame:
    schema = {"image_id": pl.String, "before": pl.String, "was_stable": pl.Boolean}
    if previous is None:
        return pl.DataFrame(schema=schema)
    return previous.filter(pl.col("split").is_not_null()).select(
        "image_id", before="split", was_stable="stable"
    )


def _fill(free: pl.DataFrame, room: int, held_out: int, seed: int) -> list[str]:
    """Clusters of free images that join validation."""
    if room <= 0 or free.is_empty():
        return []
    sizes = dict(free.select("cluster", "size").iter_rows())
    ordered = sorted(sizes, key=lambda cluster: seeds.digest(seed, seeds.Purpose.SPLIT, cluster))
    chosen = []
    for cluster in ordered:
        if sizes[cluster] <= room:
            chosen.append(cluster)
            room -= sizes[cluster]
        if room == 0:
            break
    if not chosen and held_out == 0 and len(ordered) > 1:
        chosen = [min(ordered, key=lambda cluster: sizes[cluster])]
    return chosen


def _stable(kept: pl.DataFrame, num_stable: int, seed: int) -> list[str]:
    """Training images of the stable list: those on it before, then new ones in the order of their
    digest."""
    training = kept.filter(pl.col("split") == "train")
    before = training.filter("was_stable")["image_id"].to_list()
    if len(before) >= min(num_stable, training.height):
        return before
    others = training.filter(~pl.col("was_stable").fill_null(False))["image_id"].to_list()
    others.sort(key=lambda image_id: seeds.digest(seed, seeds.Purpose.SPLIT, "stable", image_id))
    return before + others[: num_stable - len(before)]
