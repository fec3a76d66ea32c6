"""Names of checkpoints, generations, partitions and verdicts: each reads what it writes, and refuses
all else by name."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import DataError
from training.names import (
    NAME_PATTERN,
    CheckpointName,
    GenerationName,
    OwnedPart,
    ShardKey,
    VerdictName,
)

names = st.from_regex(NAME_PATTERN, fullmatch=True)
counts = st.integers(0, 10**12)
checkpoints = st.one_of(
    st.builds(CheckpointName, names, counts),
    st.builds(CheckpointName.of_base, st.text("0123456789abcdef", min_size=64, max_size=64)),
    st.builds(CheckpointName.of_external, names),
)
stems = st.from_regex(r"[a-z0-9_]+", fullmatch=True)
values = st.one_of(
    checkpoints,
    st.builds(GenerationName, counts),
    st.builds(ShardKey, names, stems),
    st.builds(VerdictName, checkpoints.map(str), checkpoints.map(str)),
    st.builds(VerdictName.against_base, checkpoints.map(str)),
    st.builds(OwnedPart, stems, names),
)


@given(values)
def test_a_name_reads_what_it_writes(value):
    assert type(value).parse(str(value)) == value
    assert f"{value}" == str(value)


@given(
    st.sampled_from([CheckpointName, GenerationName, ShardKey, VerdictName, OwnedPart]),
    st.one_of(st.text(), st.text("g0123456789@|~.as", max_size=9)),
)
def test_a_text_is_read_as_exactly_one_name_or_refused_by_name(kind, text):
    try:
        value = kind.parse(text)
    except DataError as error:
        value, message = None, str(error)
    assert repr(text) in message if value is None else str(value) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (CheckpointName, "demo"),
        (CheckpointName, "@5"),
        (CheckpointName, "demo@"),
        (CheckpointName, "demo@007"),
        (CheckpointName, "demo@-1"),
        (CheckpointName, "demo@\N{SUPERSCRIPT TWO}"),
        (GenerationName, "g3"),
        (GenerationName, "g00012"),
        (GenerationName, "g0003.json"),
        (ShardKey, "sdxl"),
        (ShardKey, "sdxl|"),
        (ShardKey, "a|b|c"),
        (VerdictName, "a"),
        (VerdictName, "a~b~c"),
        (OwnedPart, "s000012"),
        (OwnedPart, ".joytag"),
    ],
)
def test_what_is_no_name_is_refused(kind, text):
    with pytest.raises(DataError, match=re.escape(repr(text))):
        kind.parse(text)


def test_names_stand_in_files_and_tables_as_they_always_did():
    assert str(CheckpointName("demo", 2560)) == "demo@2560"
    assert str(CheckpointName.of_base("7d8632a3" + "0" * 56)) == "base.7d8632a3@0"
    assert str(CheckpointName.of_external("other")) == "rival.other@0"
    assert GenerationName(3).manifest == "g0003.json"
    assert str(ShardKey("sdxl", "s000012")) == "sdxl|s000012"
    assert str(VerdictName.against_base("demo@2560")) == "base~demo@2560"
    assert str(VerdictName("demo@1", "rival.other@0")) == "demo@1~rival.other@0"
    assert str(OwnedPart("s000012", "joytag")) == "s000012.joytag"


@pytest.mark.parametrize(
    ("text", "is_base", "is_external", "is_of_run", "external_name"),
    [
        ("demo@5", False, False, True, ""),
        ("base.7d8632a3@0", True, False, False, ""),
        ("rival.other.2@0", False, True, False, "other.2"),
        ("based@0", False, False, True, ""),
    ],
)
def test_a_checkpoint_knows_who_made_it(text, is_base, is_external, is_of_run, external_name):
    name = CheckpointName.parse(text)
    found = (name.is_base, name.is_external, name.is_of_run, name.external_name)
    assert found == (is_base, is_external, is_of_run, external_name)


@given(st.lists(counts, min_size=1))
def test_checkpoints_of_a_run_sort_in_the_order_of_training(samples_seen):
    texts = [str(CheckpointName("demo", count)) for count in samples_seen]
    ordered = sorted(texts, key=CheckpointName.parse)
    assert [CheckpointName.parse(text).samples_seen for text in ordered] == sorted(samples_seen)


@pytest.mark.parametrize(
    ("file_name", "number"),
    [("g0003.json", 3), ("g12345.json", 12345), ("g0003", None), ("g3.json", None),
     ("g0003-1024x1024-0a1b2c3d.safetensors", None), (".tmp-1-g0003.json.tmp", None)],
)  # fmt: skip
def test_a_generation_is_told_by_the_file_name_of_its_manifest(file_name, number):
    found = GenerationName.of_manifest(file_name)
    assert (found and found.number) == number
