"""Versioned JSON files: what is written is read, and all else is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import ConfigError, DamageError
from training.records import read_record, write_record

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def exactly(a, b=0):
    return a, b


def build(values):
    return exactly(**values)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "thing.json"


@given(values=st.dictionaries(st.text().filter(lambda key: key != "format"), plain))
def test_a_record_is_read_as_it_was_written(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "thing.json"
    write_record(path, 3, values)
    assert read_record(path, 3, dict) == values
    assert json.loads(path.read_bytes()) == {"format": 3, **values}


def test_a_record_has_one_text(path):
    write_record(path, 1, {"b": 2, "a": "ä"})
    assert path.read_bytes() == b'{\n "a": "\xc3\xa4",\n "b": 2,\n "format": 1\n}\n'


def test_another_format_is_refused_before_its_keys(path):
    write_record(path, 2, {"of a newer version": True})
    with pytest.raises(DamageError) as refused:
        read_record(path, 1, build)
    assert str(refused.value) == f"{path} has format 2, this version reads 1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"format": 1}', "'a'"),
        ('{"format": 1, "a": 1, "c": 2}', "'c'"),
        ('{"a": 1}', "'format'"),
        ("[1]", "list"),
        ("7", "int"),
        ('{"format": 1, "a"', "delimiter"),
        ("", "Expecting value"),
    ],
)
def test_damage_names_the_file_and_what_is_wrong(path, text, named):
    path.write_text(text)
    with pytest.raises(DamageError) as refused:
        read_record(path, 1, build)
    assert str(refused.value).startswith(f"{path} is damaged: ")
    assert named in str(refused.value)


def test_bytes_that_are_no_text_are_damage(path):
    path.write_bytes(b'{"format": \xff}')
    with pytest.raises(DamageError, match="is damaged"):
        read_record(path, 1, build)


def test_a_reader_chooses_the_words_and_the_error(path):
    write_record(path, 1, {})
    with pytest.raises(ConfigError) as refused:
        read_record(
            path,
            1,
            lambda values: values["a"],
            subject="the thing {x}",
            damaged="{subject} cannot be read ({error})",
            error=ConfigError,
        )
    assert str(refused.value) == "the thing {x} cannot be read ('a')"


def test_a_missing_file_is_left_to_the_reader(path):
    with pytest.raises(FileNotFoundError):
        read_record(path, 1, build)
