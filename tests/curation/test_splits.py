"""Held-out images stay held out, whatever is added, dropped or grouped later."""

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.curation import splits

SCHEMA = {
    "image_id": pl.String,
    "cluster": pl.String,
    "kept": pl.Boolean,
    "source_split": pl.String,
}


def frame(rows):
    return pl.DataFrame(rows, SCHEMA, orient="row")


def singles(count, start=0):
    return frame([(f"i{n}", f"i{n}", True, None) for n in range(start, start + count)])


def assign(images, previous=None, num_validation=2048, num_stable=5, seed=0):
    return splits.assign(
        images, num_validation=num_validation, num_stable=num_stable, seed=seed, previous=previous
    )


def held(result):
    return set(result.filter(pl.col("split") == "validation")["image_id"])


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 0), (2, 1), (39, 1), (40, 2), (100, 5), (1000, 10)]
)
def test_at_most_the_number_and_five_percent_at_least_one(count, expected):
    assert len(held(assign(singles(count), num_validation=10))) == expected


def test_the_choice_is_keyed_by_cluster_and_seed_and_not_by_the_order_of_rows():
    images = singles(200)
    assert assign(images).equals(assign(images.reverse()))
    assert held(assign(images, seed=1)) != held(assign(images))


images_strategy = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.integers(0, 8),
        st.booleans(),
        st.sampled_from([None, None, "train", "validation"]),
    ),
    max_size=30,
    unique_by=lambda row: row[0],
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(commits=st.lists(images_strategy, min_size=1, max_size=4), num_validation=st.integers(1, 4))
def test_nobody_ever_changes_sides(commits, num_validation):
    previous = None
    for rows in commits:
        images = frame([(f"i{n}", f"c{c}", kept, said) for n, c, kept, said in rows])
        result = assign(images, previous, num_validation)
        assert result["image_id"].to_list() == sorted(images.filter("kept")["image_id"])
        if previous is not None:
            both = result.join(previous, on="image_id").filter(pl.col("split_right").is_not_null())
            assert (both["split"] == both["split_right"]).all()
        torn = (
            result.filter(pl.col("split").is_null())
            .join(images, on="image_id")["cluster"]
            .to_list()
        )
        sides = (
            result.join(images, on="image_id")
            .group_by("cluster")
            .agg(pl.col("split").drop_nulls().n_unique())
        )
        assert set(sides.filter(pl.col("split") > 0)["cluster"]) >= set(torn)
        if previous is None:
            assert (sides["split"] <= 1).all()
            assert torn == []
        assert result.filter("stable").height <= 5
        assert set(result.filter("stable")["split"]) <= {"train"}
        previous = result


def test_a_growing_set_keeps_both_lists_and_fills_validation():
    first = assign(singles(100))
    second = assign(singles(200), first)
    assert len(held(first)) == 5
    assert held(first) < held(second)
    assert len(held(second)) == 10
    stable = [set(r.filter("stable")["image_id"]) for r in (first, second)]
    assert stable[0] == stable[1]
    assert len(stable[0]) == 5


def test_a_shrinking_set_keeps_what_is_still_there():
    first = assign(singles(100))
    rest = singles(50, start=50)
    second = assign(rest, first)
    survivors = held(first) & set(rest["image_id"])
    assert held(second) >= survivors
    assert not held(second) - held(first)
    was_stable = set(first.filter("stable")["image_id"]) & set(rest["image_id"])
    assert set(second.filter("stable")["image_id"]) >= was_stable
    assert second.filter("stable").height == 5


def test_clusters_are_never_parted():
    images = frame([(f"i{n}", f"c{n // 7}", True, None) for n in range(280)])
    result = assign(images).join(images, on="image_id")
    assert result.group_by("cluster").agg(pl.col("split").n_unique())["split"].max() == 1
    assert 1 <= len(held(result)) <= 14


def test_a_source_is_believed_and_takes_its_cluster_along():
    images = frame(
        [(f"i{n}", f"i{n}", True, "train") for n in range(20)]
        + [
            ("v", "c", True, "validation"),
            ("near", "c", True, "train"),
            ("free", "free", True, None),
        ]
    )
    assert held(assign(images)) == {"v", "near"}


def test_all_is_held_out_only_when_the_source_says_so():
    assert held(assign(frame([("a", "c", True, None), ("b", "c", True, None)]))) == set()
    assert held(assign(frame([("a", "a", True, "validation")]))) == {"a"}


def test_what_replaces_a_held_out_copy_is_held_out():
    first = assign(singles(40))
    (one, *_) = sorted(held(first))
    rows = [
        (name, "new" if name == one else name, name != one, None)
        for name in singles(40)["image_id"]
    ]
    images = frame([*rows, ("better_copy", "new", True, None)])
    assert "better_copy" in held(assign(images, first))


def test_a_copy_of_both_sides_trains_when_they_are_gone():
    previous = pl.DataFrame(
        {"image_id": ["t", "v"], "split": ["train", "validation"], "stable": [True, False]}
    )
    images = frame([("t", "c", False, None), ("v", "c", False, None), ("new", "c", True, None)])
    assert assign(images, previous).rows() == [("new", "train", True)]


def test_a_copy_of_both_sides_belongs_to_neither():
    previous = pl.DataFrame(
        {"image_id": ["t", "v"], "split": ["train", "validation"], "stable": [True, False]}
    )
    images = frame([("t", "c", True, None), ("v", "c", True, None), ("new", "c", True, None)])
    assert assign(images, previous).rows() == [
        ("new", None, False),
        ("t", "train", True),
        ("v", "validation", False),
    ]
