"""Sidecars as people write them, and as no one should."""

import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.buckets.geometry import Box
from training.sources import sidecars


def read(tmp_path, words="auto", **contents):
    """Sidecars by suffix; a value that is neither text nor bytes is written as JSON."""
    paths = []
    for suffix in sidecars.SUFFIXES:
        if (content := contents.get(suffix[1:])) is not None:
            path = tmp_path / f"a{suffix}"
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(path)
    metadata = sidecars.Metadata()
    return metadata, [
        f"{flaw.reason}: {flaw.detail}" for flaw in sidecars.read(paths, metadata, words)
    ]


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


def test_each_line_is_judged_by_itself(tmp_path):
    sentence = "A girl with long hair and blue eyes wears a red dress in a sunny garden."
    for tags in (
        "1girl, long_hair, blue_eyes, red_dress",
        "1girl, long hair, blue eyes, red dress",
    ):
        for text in (f"{tags}\n{sentence}\n", f"{sentence}\r\n\r\n{tags}", f"{tags}\r{sentence}"):
            metadata, problems = read(tmp_path, txt=text)
            assert list(metadata.tags) == ["1girl", "long_hair", "blue_eyes", "red_dress"]
            assert (metadata.caption, problems) == (sentence, [])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_sentences_stand_a_line_each(tmp_path, end):
    lines = ["A red star on a wall.", "A star, red, in front of a wall."]
    metadata, _ = read(tmp_path, txt=end.join(lines) + end)
    assert (metadata.caption, metadata.tags) == ("\n".join(lines), {})


def test_caption_files_are_prose_unless_told_otherwise(tmp_path):
    assert read(tmp_path, caption="red_star, blue circle")[0].caption == "red_star, blue circle"
    assert (
        read(tmp_path, caption="two dogs playing outside\n")[0].caption
        == "two dogs playing outside"
    )
    told = read(tmp_path, words="tags", caption="red_star, blue circle")[0]
    assert (told.caption, list(told.tags)) == (None, ["red_star", "blue_circle"])
    told = read(tmp_path, words="captions", txt="red star, blue circle")[0]
    assert (told.caption, told.tags) == ("red star, blue circle", {})


def test_booru_records_are_read(tmp_path):
    record = {
        "tag_string": "red_star blue_circle somebody saber_(fate)", "tag_string_artist": "somebody",
        "tag_string_character": "saber_(fate)", "tag_string_meta": "", "rating": "s", "fav_count": 3,
    }  # fmt: skip
    metadata, problems = read(tmp_path, json=record)
    assert problems == []
    assert metadata.tags == {
        "red_star": "general", "blue_circle": "general", "somebody": "artist", "saber_(fate)": "character",
    }  # fmt: skip
    assert metadata.rating == "sensitive"
    spaces, _ = read(tmp_path, json={"tags": "red_star blue_circle long_hair"})
    assert list(spaces.tags) == ["red_star", "blue_circle", "long_hair"]
    assert len(read(tmp_path, json={"tag_string": ["a"], "rating": "g"})[1]) == 1


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
)
@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_encodings_that_can_be_told_are_read(tmp_path, encoding, suffix):
    text = "caf\u00e9, red_star" if suffix == "txt" else '{"tags": ["caf\u00e9", "red_star"]}'
    metadata, problems = read(tmp_path, **{suffix: text.encode(encoding)})
    assert (list(metadata.tags), problems) == (["caf\u00e9", "red_star"], [])


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "euc_jp", "big5"])
def test_encodings_that_cannot_be_told_are_named_and_not_guessed(tmp_path, encoding):
    metadata, problems = read(
        tmp_path, txt="\u4e00\u4eba\u306e\u5973\u5b50".encode(encoding, "ignore") + b", 1girl"
    )
    assert (metadata.tags, metadata.caption) == ({}, None)
    assert len(problems) == 1
    assert problems[0].startswith("sidecar_unreadable: not UTF-8")


def test_zeros_and_control_characters_are_removed(tmp_path):
    metadata, problems = read(
        tmp_path, txt=b"red_star\0, blue\x07 circle\x7f\nA star\0 on\x1b a wall."
    )
    assert (list(metadata.tags), metadata.caption) == (
        ["red_star", "blue_circle"],
        "A star on a wall.",
    )
    assert problems == []
    metadata, _ = read(tmp_path, json={"tags": ["red\0_star"], "caption": "A\x08 star\0."})
    assert (list(metadata.tags), metadata.caption) == (["red_star"], "A star.")


def test_json_holds_all_there_is(tmp_path):
    metadata, problems = read(
        tmp_path,
        txt="circle, red",
        json={
            "tags": {
                "artist": ["Some One"],
                "general": "blue, red",
                "species": ["cat"],
                "character": "circle",
            },
            "caption": " An image. ",
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
    assert metadata.caption == "An image."
    assert (metadata.rating, metadata.favourites, metadata.split) == (
        "questionable",
        7,
        "validation",
    )
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
    assert (
        getattr(metadata, other) == "general" or "NaN" in problems[0] or "Infinity" in problems[0]
    )
    assert metadata.favourites is None
    assert metadata.crop_box is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "sidecar_unreadable: not UTF-16"),
        ("[" * 100_000, "nested too deeply"),
        ('{"tags": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("[1]", "must hold an object"),
        ("{", "sidecar_malformed"),
        ('{"favourites": ' + "9" * 10_000 + "}", "sidecar_malformed"),
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
    assert [flaw.reason for flaw in problems] == ["sidecar_unreadable"] * 2
    assert metadata.tags == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    ["tags", "caption", "rating", "favourites", "created_at", "split", "crop_box"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.dictionaries(keys, json_values))
def test_no_json_kills_the_listing(tmp_path_factory, content):
    metadata, problems = read(tmp_path_factory.mktemp("sidecars"), json=content)
    assert all("\n" not in problem for problem in problems)
    assert metadata.favourites is None or metadata.favourites >= 0
