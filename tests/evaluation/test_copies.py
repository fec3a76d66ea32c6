"""The nearest training image, against a search over all pairs; and what the comparison says of
copies."""

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation import copies, overbaked
from training.evaluation.references import BaseImages, References, TrainingImages, sample


def units(rng, count, width=8):
    found = rng.normal(size=(count, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def blocks_of(vectors, borders, dtype=np.float32):
    ids = [f"{number:064x}" for number in range(len(vectors))]
    edges = [0, *sorted(borders), len(vectors)]
    return [(ids[a:b], vectors[a:b].astype(dtype)) for a, b in itertools.pairwise(edges)]


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    borders=st.lists(st.integers(0, 40), max_size=4),
)
def test_the_nearest_is_that_of_a_search_over_all_pairs(seed, count, borders):
    rng = np.random.default_rng(seed)
    queries, images = units(rng, 7), units(rng, count)
    found = copies.nearest(queries, blocks_of(images, [min(border, count) for border in borders]))
    for number, query in enumerate(queries):
        cosines = [float(np.dot(query.astype(np.float64), image)) for image in images]
        assert found.similarity[number] == pytest.approx(max(cosines), abs=1e-6)
        assert cosines[int(found.image_ids[number], 16)] == pytest.approx(max(cosines), abs=1e-6)


def test_blocks_and_half_precision_change_nothing_that_counts(monkeypatch):
    rng = np.random.default_rng(0)
    queries, images = units(rng, 50, 32), units(rng, 300, 32)
    whole = copies.nearest(queries, blocks_of(images, []))
    monkeypatch.setattr(copies, "BLOCK_ROWS", 7)
    monkeypatch.setattr(copies, "_QUERY_ROWS", 11)
    small = copies.nearest(queries, blocks_of(images, [100]))
    assert small.image_ids.tolist() == whole.image_ids.tolist()
    assert small.similarity == pytest.approx(whole.similarity, abs=1e-6)
    half = copies.nearest(queries, blocks_of(images, [], np.float16))
    assert half.similarity == pytest.approx(whole.similarity, abs=1e-3)


def test_without_images_there_is_no_nearest():
    assert copies.nearest(np.eye(3, dtype=np.float32), []) is None
    assert copies.nearest(np.eye(3, dtype=np.float32), [([], np.empty((0, 3), np.float32))]) is None


def test_of_equal_images_the_first_is_named():
    image = np.eye(4, dtype=np.float32)[:1]
    assert copies.nearest(image, [(["b"], image), (["a"], image)]).image_ids.tolist() == ["b"]


def test_the_summary_is_quantiles_and_shares_above_the_baseline():
    samples, validation = np.array([0.2, 0.4, 0.95, 0.99]), np.linspace(0, 0.9, 101)
    found = copies.summarise(samples, {"validation": validation, "base": np.array([0.1, 0.3])})
    assert found["train_similarity_p50"] == pytest.approx(np.percentile(samples, 50))
    assert found["train_similarity_p95"] == pytest.approx(np.percentile(samples, 95))
    assert found["train_similarity_max"] == 0.99
    assert found["train_similarity_validation_p95"] == pytest.approx(0.855)
    assert found["train_similarity_base_max"] == 0.3
    assert found["train_similarity_above_p95"] == found["train_similarity_above_max"] == 0.5
    assert "train_similarity_above_max" not in copies.summarise(samples, {})


def set_of(train, validation, num_shards=3):
    """A training set with embeddings, and what was asked of them."""
    vectors = np.concatenate([train, validation])
    images = pl.DataFrame(
        {
            "image_id": [f"{number:064x}" for number in range(len(vectors))],
            "shard": [f"s{number % num_shards}" for number in range(len(vectors))],
            "split": ["train"] * len(train) + ["validation"] * len(validation),
        }
    )

    def read(wanted):
        for (_,), rows in sorted(wanted.partition_by("shard", as_dict=True).items()):
            ids = rows["image_id"].to_list()
            yield ids, vectors[[int(image_id, 16) for image_id in ids]]

    levels = {name: np.linspace(0, 1, 5) for name in overbaked.ALL}
    return TrainingImages(images=images, embeddings_of=read, levels=levels)


EVERY = np.ones(12, dtype=bool)


def level(count):
    return {name: np.full(count, 0.5) for name in overbaked.ALL}


def test_a_memorised_image_is_found_and_named_and_stands_out():
    rng = np.random.default_rng(1)
    train, validation = units(rng, 60, 16), units(rng, 20, 16)
    pictures = np.concatenate([units(rng, 9, 16), train[41:42]])
    base = BaseImages(embeddings=units(rng, 10, 16), levels=level(10))
    found = References(base=base, training=set_of(train, validation)).compare(
        pictures, level(10), EVERY[:10]
    )
    assert found.nearest.image_ids[9] == f"{41:064x}"
    assert found.summary["train_similarity_max"] == pytest.approx(1, abs=1e-6)
    assert found.summary["train_similarity_above_max"] >= 0.1
    assert found.summary["train_similarity_validation_max"] < 0.99
    nearest = [max(float(np.dot(query, image)) for image in train) for query in base.embeddings]
    assert found.summary["train_similarity_base_p50"] == pytest.approx(np.median(nearest), abs=1e-6)
    assert found.nearest.similarity.shape == (10,)


def test_distances_are_to_the_validation_images_with_a_floor_of_as_many_real_ones():
    from training.evaluation import distances

    rng = np.random.default_rng(2)
    train, validation, pictures = units(rng, 60, 16), units(rng, 20, 16), units(rng, 12, 16)
    found = (
        References(training=set_of(train, validation))
        .compare(pictures, level(12), EVERY[:12])
        .summary
    )
    assert found["cmmd"] == pytest.approx(distances.cmmd(pictures, validation))
    assert found["kid"] == pytest.approx(distances.kid(pictures, validation))
    # The 12 smallest ids of the training images, whatever shard they are in.
    assert found["cmmd_floor"] == pytest.approx(distances.cmmd(train[:12], validation))
    assert (found["num_floor_images"], found["num_validation_images"]) == (12, 20)
    assert "cmmd_base" not in found


@given(counts=st.lists(st.booleans(), min_size=12, max_size=12).filter(any))
def test_images_that_do_not_count_have_a_neighbour_and_no_part_in_the_summary(counts):
    rng, counts = np.random.default_rng(4), np.array(counts)
    levels = {name: np.linspace(0, 1, 12) for name in overbaked.ALL}
    train, validation, pictures = units(rng, 60, 16), units(rng, 20, 16), units(rng, 12, 16)
    base = BaseImages(embeddings=units(rng, 5, 16), levels=level(5))
    references = References(base=base, training=set_of(train, validation))
    every = references.compare(pictures, levels, EVERY)
    found = references.compare(pictures, levels, counts)
    own = {name: values[counts] for name, values in levels.items()}
    alone = references.compare(pictures[counts], own, EVERY[: counts.sum()])
    assert found.summary == pytest.approx(alone.summary, rel=1e-6)
    assert found.nearest.image_ids.tolist() == every.nearest.image_ids.tolist()


def test_what_is_not_there_is_left_out():
    rng = np.random.default_rng(3)
    pictures, none = units(rng, 4, 16), np.empty((0, 16), dtype=np.float32)
    assert "cmmd" not in References().compare(pictures, level(4), EVERY[:4]).summary
    alone = References(training=set_of(units(rng, 5, 16), none)).compare(
        pictures, level(4), EVERY[:4]
    )
    assert "train_similarity_p50" in alone.summary
    assert "cmmd" not in alone.summary
    assert "train_similarity_above_p95" not in alone.summary
    empty = References(training=set_of(none, units(rng, 5, 16))).compare(
        pictures, level(4), EVERY[:4]
    )
    assert empty.nearest is None
    assert "cmmd" in empty.summary
    assert "cmmd_floor" not in empty.summary


def test_the_sample_of_images_is_keyed_by_their_ids():
    ids = [f"{number * 7919 % 1000:064x}" for number in range(1000)]
    images = pl.DataFrame({"image_id": ids})
    few = sample(images, 10)["image_id"].to_list()
    assert few == sorted(ids)[:10]
    more = sample(pl.concat([images, pl.DataFrame({"image_id": ["f" * 64]})]), 10)[
        "image_id"
    ].to_list()
    assert more == few
