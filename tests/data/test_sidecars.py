"""Sidecars as people write them, and as nobody should."""

import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import sidecars
from training.data.geometry import Box


def read(tmp_path, **contents):
    """Sidecars by suffix; a value that is neither text nor bytes is written as JSON."""
    paths = []
    for suffix in sidecars.SUFFIXES:
        if (content := contents.get(suffix[1:])) is not None:
            path = tmp_path / f"a{suffix}"
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(path)
    metadata = sidecars.Metadata()
    return metadata, sidecars.read(paths, metadata)


@pytest.mark.parametrize(
    "text",
    ["A red circle.", "a red circle", "there is a dog on the beach with a ball",
     "1girl standing, in the rain at night.", "The old sea, blue", "Who is that?"],
)  # fmt: skip
def test_a_sentence_is_a_caption(tmp_path, text):
    metadata, problems = read(tmp_path, txt=text)
    assert (metadata.caption, metadata.tags, problems) == (text, {}, [])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1girl, long hair, looking at viewer", ["1girl", "long_hair", "looking_at_viewer"]),
        ("Red_Circle,  blue\tbackground ,,", ["red_circle", "blue_background"]),
        (r"photo \(medium\), o_o, !?", ["photo_(medium)", "o_o", "!?"]),
        ("circle", ["circle"]),
        ("\ufeffa\nb\r\nc", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_a_list_is_tags(tmp_path, text, names):
    metadata, problems = read(tmp_path, txt=text)
    assert list(metadata.tags) == names
    assert set(metadata.tags.values()) <= {"general"}
    assert metadata.caption is None
    assert problems == []


def test_json_holds_all_there_is(tmp_path):
    metadata, problems = read(
        tmp_path,
        txt="circle, red",
        json={
            "tags": {"artist": ["Some One"], "general": "blue, red", "species": ["cat"], "character": "circle"},
            "caption": " A picture. ",
            "rating": "q",
            "fav_count": 7,
            "created_at": "2020-02-03T04:05:06+02:00",
            "split": "validation",
            "crop_box": [1, 2, 3.5, 4],
        },
    )
    assert problems == []
    assert metadata.tags == {
        "circle": "character", "red": "general", "some_one": "artist", "blue": "general", "cat": "general",
    }  # fmt: skip
    assert metadata.caption == "A picture."
    assert (metadata.rating, metadata.favourites, metadata.split) == ("questionable", 7, "validation")
    assert metadata.created_at == datetime(2020, 2, 3, 2, 5, 6, tzinfo=UTC)
    assert metadata.crop_box == Box(1, 2, 3.5, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rating", "x"), ("rating", 3), ("favourites", -1), ("favourites", 1.5), ("favourites", True),
        ("favourites", 2**63), ("favourites", math.nan), ("fav_count", "7"), ("created_at", "yesterday"),
        ("created_at", 5), ("created_at", "0001-01-01T00:00:00+10:00"), ("caption", ["a"]), ("caption", "\ud800"),
        ("split", "test"), ("split", []), ("crop_box", [0, 0, 1]), ("crop_box", [0, 0, 0, 1]),
        ("crop_box", [0, 0, 1e999, 1]), ("crop_box", [0, 0, 10**400, 1]), ("crop_box", {"y0": 0}), ("tags", 5),
        ("tags", ["a", None]), ("tags", {"general": 7}),
    ],
)  # fmt: skip
def test_an_ill_typed_value_costs_that_value_only(tmp_path, key, value):
    other = "caption" if key == "rating" else "rating"
    metadata, problems = read(tmp_path, json={key: value, other: "general"})
    assert len(problems) == 1
    assert getattr(metadata, other) == "general" or "NaN" in problems[0] or "Infinity" in problems[0]
    assert metadata.favourites is None
    assert metadata.crop_box is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"tags": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("[1]", "must hold an object"),
        ("{", "sidecar .json"),
        ('{"favourites": ' + "9" * 10_000 + "}", "sidecar .json"),
        ('{"caption": "' + "a" * sidecars.MAX_BYTES + '"}', "larger than"),
        ('{"favourites": NaN}', "NaN is not a number"),
    ],
)
def test_an_unusable_sidecar_is_one_line(tmp_path, content, words):
    metadata, problems = read(tmp_path, json=content)
    assert metadata == sidecars.Metadata()
    assert len(problems) == 1
    assert words in problems[0]
    assert "\n" not in problems[0]


def test_an_unreadable_sidecar_is_one_line(tmp_path):
    (tmp_path / "real.txt").write_text("secret")
    (tmp_path / "a.txt").symlink_to(tmp_path / "real.txt")
    metadata = sidecars.Metadata()
    problems = sidecars.read([tmp_path / "a.txt", tmp_path / "none.json"], metadata)
    assert len(problems) == 2
    assert metadata.tags == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(["tags", "caption", "rating", "favourites", "created_at", "split", "crop_box"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.dictionaries(keys, json_values))
def test_no_json_kills_the_listing(tmp_path_factory, content):
    metadata, problems = read(tmp_path_factory.mktemp("sidecars"), json=content)
    assert all("\n" not in problem for problem in problems)
    assert metadata.favourites is None or metadata.favourites >= 0
