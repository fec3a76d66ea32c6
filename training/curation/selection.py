"""Which images go on, and the rule that dropped each of the others; with all that training will
read of them."""

from collections.abc import Mapping

import polars as pl

from training.config.workspace import SelectionConfig, TagConfig
from training.curation import captions as captions_
from training.curation import splits, tags, watermarks
from training.tables.schemas import TABLES
from training.tables.table import SCORED_BOX, TAG

RULES = (
    "gone",
    "unannotated",
    "duplicate",
    "near_duplicate",
    "min_side",
    "max_aspect",
    "min_bytes_per_pixel",
    "unwanted_tag",
    "min_score",
    "split_conflict",
)
"""In this order; the first that drops an image is recorded."""

RATING_WORDS = {
    "general": ["safe"],
    "sensitive": ["sensitive"],
    "questionable": ["nsfw"],
    "explicit": ["nsfw", "explicit"],
}
"""Kohaku XL Delta's words for a source's rating."""


def select(
    tables: Mapping[str, pl.DataFrame],
    *,
    aliases: tags.Aliases,
    tag_config: TagConfig,
    config: SelectionConfig,
    previous: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Apply the rules of taste to every accepted image.

    An image is stood for by its first candidate, in the order of (source, source_id), that is not
    gone; tags are joined over all of its candidates.

    Args:
        tables: `source_listing`, `raw_images`, `duplicate_groups`, `quality_scores`, `tags`,
            `captions` and `watermark_boxes` by name, with all shards and models.
        aliases: Alias table.
        tag_config: Threshold and blacklist.
        config: The rules.
        previous: `selected_images` of the previous commit, whose split and stable list persist.

    Returns:
        `selected_images`: one row per image_id of `raw_images`.
    """
    raw_images, source_listing, tagger_tags = (
        tables["raw_images"], tables["source_listing"], tables["tags"],
    )  # fmt: skip
    frame = _images(source_listing, raw_images)
    source_tags = raw_images.join(source_listing, on=["source", "source_id"]).select(
        "image_id", "tags"
    )
    resolved = tags.resolve_all(
        source_tags,
        tagger_tags,
        threshold=tag_config.threshold,
        aliases=aliases,
        blacklist=tag_config.blacklist,
    )
    looked_at = watermarks.above(tables["watermark_boxes"], config.watermark_threshold)
    frame = (
        frame.join(
            tables["quality_scores"].select("image_id", "score", "bytes_per_pixel"),
            on="image_id",
            how="left",
        )
        .join(resolved, on="image_id", how="left")
        .join(captions_.choose(tables["captions"]), on="image_id", how="left")
        .join(looked_at, on="image_id", how="left")
        .join(_duplicates(tables["duplicate_groups"]), on="image_id", how="left")
    )
    tagged = pl.col("image_id").is_in(tagger_tags["image_id"].unique().implode())
    frame = frame.with_columns(
        pl.col("tags").fill_null(pl.lit([], dtype=pl.List(TAG))),
        pl.coalesce("cluster", "image_id").alias("cluster"),
        missing=pl.when(pl.col("score").is_null())
        .then(pl.lit("quality_scores"))
        .when(pl.col("watermark").is_null())
        .then(pl.lit("watermark_boxes"))
        .when(~tagged)
        .then(pl.lit("tags")),
    )
    frame = _apply_rules(frame, config)
    frame = _split(frame, config, previous)
    return _finish(frame, config)


def _images(source_listing: pl.DataFrame, raw_images: pl.DataFrame) -> pl.DataFrame:
    """One row per image: the candidate that stands for it, with what its source says."""
    said = source_listing.select(
        "source", "source_id", "shard", "gone_at", "rating", "crop_box", source_split="split"
    )
    candidates = raw_images.select(
        "image_id", "source", "source_id", "locator", "height", "width"
    ).join(said, on=["source", "source_id"])
    first = candidates.sort(pl.col("gone_at").is_not_null(), "source", "source_id")
    return first.unique("image_id", keep="first", maintain_order=True)


def _duplicates(duplicate_groups: pl.DataFrame) -> pl.DataFrame:
    """One row per image that is in a group: its cluster, what ties it to the one kept, and that
    one's id."""
    standing = duplicate_groups.filter(pl.col("kind") != "exact").unique("image_id", keep="any")
    kept = duplicate_groups.filter("kept").select("group", kept_id="image_id")
    return standing.join(kept, on="group").select("image_id", "kind", "kept_id", cluster="group")


def _apply_rules(frame: pl.DataFrame, config: SelectionConfig) -> pl.DataFrame:
    """Add rule, value and limit: of the first rule that drops the image, else null."""
    side = pl.min_horizontal("height", "width")
    aspect = pl.max_horizontal("height", "width") / side
    names = pl.col("tags").list.eval(pl.element().struct.field("name"))
    unwanted = names.list.set_intersection(
        pl.lit(list(config.unwanted_tags), dtype=pl.List(pl.String))
    )
    density = pl.col("bytes_per_pixel")
    near = pl.lit(config.drop_near_duplicates) & (pl.col("kind") == "near")
    rules: list[tuple[str, pl.Expr, pl.Expr, pl.Expr | object]] = [
        (
            "gone",
            pl.col("gone_at").is_not_null(),
            pl.col("gone_at").dt.to_string("iso:strict"),
            None,
        ),
        ("unannotated", pl.col("missing").is_not_null(), pl.col("missing"), None),
        ("duplicate", pl.col("kind") == "pixels", pl.col("kind"), pl.col("kept_id")),
        ("near_duplicate", near, pl.col("kind"), pl.col("kept_id")),
        ("min_side", side < config.min_side_px, side, config.min_side_px),
        ("max_aspect", aspect > config.max_aspect, aspect.round(4), config.max_aspect),
        (
            "min_bytes_per_pixel",
            density < config.min_bytes_per_pixel,
            density,
            config.min_bytes_per_pixel,
        ),
        ("unwanted_tag", unwanted.list.len() > 0, unwanted.list.sort().list.join(" "), None),
        ("min_score", pl.col("score") < config.min_score, pl.col("score"), config.min_score),
    ]
    assert tuple(name for name, *_ in rules) == RULES[:-1]
    nothing = pl.lit(None, dtype=pl.String)
    columns = {"rule": nothing, "value": nothing, "limit": nothing}
    for name, drops, value, limit in reversed(rules):
        said = (
            limit
            if isinstance(limit, pl.Expr)
            else pl.lit(None if limit is None else f"{limit}", dtype=pl.String)
        )
        shown = {"rule": pl.lit(name), "value": value.cast(pl.String), "limit": said}
        hit = drops.fill_null(False)
        columns = {key: pl.when(hit).then(shown[key]).otherwise(columns[key]) for key in columns}
    return frame.with_columns(**columns)


def _split(
    frame: pl.DataFrame, config: SelectionConfig, previous: pl.DataFrame | None
) -> pl.DataFrame:
    """Add split and stable; an image that resembles both sides is dropped here."""
    parted = splits.assign(
        frame.select("image_id", "cluster", "source_split", kept=pl.col("rule").is_null()),
        num_validation=config.num_validation,
        num_stable=config.num_stable,
        seed=config.seed,
        previous=None if previous is None else previous.select("image_id", "split", "stable"),
    )
    frame = frame.join(parted, on="image_id", how="left")
    conflict = pl.col("rule").is_null() & pl.col("split").is_null()
    return frame.with_columns(
        rule=pl.when(conflict).then(pl.lit("split_conflict")).otherwise(pl.col("rule")),
        value=pl.when(conflict).then(pl.col("cluster")).otherwise(pl.col("value")),
        stable=pl.col("stable").fill_null(False),
    )


def _finish(frame: pl.DataFrame, config: SelectionConfig) -> pl.DataFrame:
    words = pl.col("rating").replace_strict(
        RATING_WORDS, default=pl.lit([], dtype=pl.List(pl.String)), return_dtype=pl.List(pl.String)
    )
    frame = frame.with_columns(
        kept=pl.col("rule").is_null(),
        words=words.fill_null(pl.lit([], dtype=pl.List(pl.String))),
        watermark=pl.col("watermark").fill_null(False),
        boxes=pl.col("boxes").fill_null(pl.lit([], dtype=pl.List(SCORED_BOX))),
    ).with_columns(
        flip=_has_tag(config.flip_tags)
        & ~_has_tag(config.never_flip_tags)
        & (pl.col("boxes").list.len() == 0)
    )
    table = TABLES["selected_images"]
    return table.conform(frame.select(list(table.columns)))


def _has_tag(names: tuple[str, ...]) -> pl.Expr:
    """Whether an image has one of the tags."""
    own = pl.col("tags").list.eval(pl.element().struct.field("name"))
    return own.list.set_intersection(pl.lit(list(names), dtype=pl.List(pl.String))).list.len() > 0


def funnel(selected: pl.DataFrame) -> pl.DataFrame:
    """How many images fell at each rule, in order.

    Returns:
        Columns rule, num_dropped, num_left: one row per rule, also of those that dropped nothing.
    """
    dropped = dict(selected.filter(~pl.col("kept")).group_by("rule").len().iter_rows())
    rows, left = [], selected.height
    for rule in RULES:
        left -= dropped.get(rule, 0)
        rows.append((rule, dropped.get(rule, 0), left))
    return pl.DataFrame(
        rows, {"rule": pl.String, "num_dropped": pl.Int64, "num_left": pl.Int64}, orient="row"
    )
