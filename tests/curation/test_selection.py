"""Each rule drops what it should, with value and limit; the rest is what training will read."""

from datetime import UTC, datetime

import polars as pl
import pytest

from training.config.workspace import SelectionConfig, TagConfig
from training.curation import selection, tags
from training.tables.schemas import TABLES

NOW = datetime(2026, 11, 20, tzinfo=UTC)
BOX = {"y0": 1.0, "x0": 2.0, "y1": 3.0, "x1": 4.0}


def table(name, rows):
    schema = TABLES[name].schema
    return TABLES[name].conform(
        pl.DataFrame([{**dict.fromkeys(schema), **row} for row in rows], schema=schema)
    )


class World:
    """Forty plain images that pass every rule, to be spoilt one at a time."""

    def __init__(self):
        self.names = [f"{n:02d}" for n in range(40)]
        self.listing = {n: {"tags": [{"name": "red", "category": "general"}]} for n in self.names}
        self.raw = {
            n: {"image_id": n * 32, "height": 100, "width": 100, "bytes": 5000} for n in self.names
        }
        self.scores = {n: {"score": 5, "bytes_per_pixel": 0.5} for n in self.names}
        self.tagger = {n: [{"name": "circle", "probability": 0.9}] for n in self.names}
        self.captions = {}
        self.boxes = {n: [] for n in self.names}
        self.groups = []

    def select(self, previous=None, tag_config=TagConfig(), **rules):  # noqa: B008 - frozen
        def key(name):
            return {"source": "s", "source_id": name, "locator": name}

        ids = {name: row["image_id"] for name, row in self.raw.items()}
        tables = {
            "source_listing": table(
                "source_listing", [{**key(n), "shard": "s000000", "bytes": 1, **r} for n, r in self.listing.items()]
            ),
            "raw_images": table("raw_images", [{**key(n), **r} for n, r in self.raw.items()]),
            "duplicate_groups": table("duplicate_groups", self.groups),
            "quality_scores": table("quality_scores", [{"image_id": ids[n], **r} for n, r in self.scores.items()]),
            "tags": table("tags", [{"image_id": ids[n], "model": "m", "tags": t} for n, t in self.tagger.items()]),
            "captions": table(
                "captions",
                [{"image_id": ids[n], "model": "sidecar", "caption": c} for n, c in self.captions.items()],
            ),
            "watermark_boxes": table(
                "watermark_boxes", [{"image_id": ids[n], "model": "m", "boxes": b} for n, b in self.boxes.items()]
            ),
        }  # fmt: skip
        return selection.select(
            tables,
            aliases=tags.Aliases(to_tag={"circle": "round"}),
            tag_config=tag_config,
            config=SelectionConfig(**rules),
            previous=previous,
        )


def row(selected, name):
    return selected.row(by_predicate=pl.col("image_id") == name * 32, named=True)


def test_what_passes_is_kept_with_all_that_training_reads():
    world = World()
    world.listing["07"] |= {
        "rating": "explicit", "crop_box": BOX, "tags": [{"name": "someone", "category": "artist"}],
    }  # fmt: skip
    world.captions = {"07": "A sentence.", "08": None}
    world.boxes["07"] = [{**BOX, "confidence": 0.2}, {**BOX, "confidence": 0.5}]
    selected = world.select()
    assert selected["kept"].all()
    found = row(selected, "07")
    assert (found["source"], found["source_id"], found["locator"], found["shard"]) == (
        "s",
        "07",
        "07",
        "s000000",
    )
    assert found["tags"] == [
        {"name": "round", "category": "general"},
        {"name": "someone", "category": "artist"},
    ]
    assert (found["caption"], found["words"], found["score"]) == (
        "A sentence.",
        ["nsfw", "explicit"],
        5,
    )
    assert (found["watermark"], found["boxes"]) == (True, [{**BOX, "confidence": 0.5}])
    assert (found["crop_box"], found["flip"], found["cluster"]) == (BOX, False, "07" * 32)
    plain = row(selected, "08")
    assert (plain["caption"], plain["words"], plain["watermark"], plain["boxes"]) == (
        None,
        [],
        False,
        [],
    )
    assert selected["split"].value_counts().sort("split").rows() == [
        ("train", 38),
        ("validation", 2),
    ]
    assert selected.filter("stable").height == 38


def group(*names, kinds):
    return [
        {"group": names[0] * 32, "source": "s", "source_id": n, "image_id": n * 32, "kind": k, "kept": k == "kept",
         "why": "x"}
        for n, k in zip(names, kinds, strict=True)
    ]  # fmt: skip


def spoil_gone(world):
    world.listing["07"]["gone_at"] = NOW


def spoil_scores(world):
    del world.scores["07"]


def spoil_tags(world):
    del world.tagger["07"]


def spoil_boxes(world):
    del world.boxes["07"]


def spoil_pixels(world):
    world.groups = group("03", "07", kinds=["kept", "pixels"])


def spoil_near(world):
    world.groups = group("03", "07", kinds=["kept", "near"])


def spoil_side(world):
    world.raw["07"] |= {"height": 63, "width": 80}


def spoil_aspect(world):
    world.raw["07"] |= {"height": 100, "width": 301}


def spoil_density(world):
    world.scores["07"]["bytes_per_pixel"] = 0.25


def spoil_tag(world):
    world.tagger["07"] = [
        {"name": "bad", "probability": 0.5},
        {"name": "awful", "probability": 0.5},
    ]


def spoil_score(world):
    world.scores["07"]["score"] = 0


@pytest.mark.parametrize(
    ("spoil", "rules", "expected"),
    [
        (spoil_gone, {}, ("gone", "2026-11-20T00:00:00.000000+00:00", None)),
        (spoil_scores, {}, ("unannotated", "quality_scores", None)),
        (spoil_tags, {}, ("unannotated", "tags", None)),
        (spoil_boxes, {}, ("unannotated", "watermark_boxes", None)),
        (spoil_pixels, {"drop_near_duplicates": False}, ("duplicate", "pixels", "03" * 32)),
        (spoil_near, {}, ("near_duplicate", "near", "03" * 32)),
        (spoil_side, {"min_side_px": 64}, ("min_side", "63", "64")),
        (spoil_aspect, {"max_aspect": 3.0}, ("max_aspect", "3.01", "3.0")),
        (spoil_density, {"min_bytes_per_pixel": 0.3}, ("min_bytes_per_pixel", "0.25", "0.3")),
        (
            spoil_tag,
            {"unwanted_tags": ("bad", "awful", "other")},
            ("unwanted_tag", "awful bad", None),
        ),
        (spoil_score, {}, ("min_score", "0", "1")),
    ],
)
def test_each_rule_drops_one_with_value_and_limit(spoil, rules, expected):
    world = World()
    assert world.select(**rules)["kept"].all()
    spoil(world)
    selected = world.select(**rules)
    assert selected.filter(~pl.col("kept")).height == 1
    found = row(selected, "07")
    assert (found["rule"], found["value"], found["limit"]) == expected
    assert (found["split"], found["stable"]) == (None, False)
    counts = dict(selection.funnel(selected).select("rule", "num_dropped").iter_rows())
    assert counts == {**dict.fromkeys(selection.RULES, 0), expected[0]: 1}


def test_the_first_rule_counts():
    world = World()
    spoil_gone(world)
    spoil_score(world)
    spoil_near(world)
    assert row(world.select(), "07")["rule"] == "gone"
    world.listing["07"]["gone_at"] = None
    assert row(world.select(), "07")["rule"] == "near_duplicate"
    assert row(world.select(drop_near_duplicates=False), "07")["rule"] == "min_score"


def test_near_duplicates_share_their_cluster_when_they_are_kept():
    world = World()
    spoil_near(world)
    selected = world.select(drop_near_duplicates=False)
    assert row(selected, "07")["cluster"] == row(selected, "03")["cluster"] == "03" * 32
    assert row(selected, "07")["split"] == row(selected, "03")["split"]


def test_equal_bytes_are_one_image_with_the_tags_of_all():
    world = World()
    world.raw["99"] = dict(world.raw["07"])
    world.listing["99"] = {"tags": [{"name": "extra", "category": "meta"}]}
    world.groups = group("07", "99", kinds=["kept", "exact"])
    world.groups[1]["image_id"] = world.groups[0]["image_id"]
    selected = world.select()
    assert selected.height == 40
    assert row(selected, "07")["kept"]
    assert [t["name"] for t in row(selected, "07")["tags"]] == ["extra", "red", "round"]
    world.listing["07"]["gone_at"] = NOW
    assert (row(world.select(), "07")["source_id"], row(world.select(), "07")["kept"]) == (
        "99",
        True,
    )


def test_the_funnel_adds_up():
    world = World()
    spoil_gone(world)
    world.scores["08"]["score"] = world.scores["09"]["score"] = 0
    found = selection.funnel(world.select())
    assert found["rule"].to_list() == list(selection.RULES)
    assert found["num_left"].to_list() == [39] * 8 + [37, 37]


def test_the_split_persists_and_a_copy_of_both_sides_is_dropped():
    world = World()
    first = world.select()
    (validation, *_) = first.filter(pl.col("split") == "validation")["source_id"]
    (training, *_) = first.filter(pl.col("split") == "train")["source_id"]
    assert world.select(previous=first, seed=9)["split"].equals(first["split"])
    world.names.append("50")
    for part in (world.listing, world.raw, world.scores, world.tagger, world.boxes):
        part["50"] = part["10"]
    world.raw["50"] = {**world.raw["10"], "image_id": "50" * 32}
    world.groups = group(validation, training, "50", kinds=["kept", "near", "near"])
    second = world.select(previous=first, drop_near_duplicates=False)
    assert row(second, "50")["rule"] == "split_conflict"
    assert not row(second, "50")["kept"]
    assert row(second, validation)["split"] == "validation"
    assert row(second, training)["split"] == "train"


def test_no_images():
    world = World()
    for part in (world.listing, world.raw, world.scores, world.tagger, world.boxes):
        part.clear()
    assert world.select().is_empty()
    assert selection.funnel(world.select())["num_left"].to_list() == [0] * len(selection.RULES)
