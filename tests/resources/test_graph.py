"""Declarations of stages: the order that follows from them, and those that cannot stand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.graph import Reads, Scope, Stage, ordered
from training.errors import DeclarationError
from training.tables.schemas import TABLES

NAMES = sorted(TABLES)[:12]


def stage(name, *tables, body=None, **declared):
    """A stage with a body of its own, unless it shares one."""
    reads = tuple(Reads(table) for table in tables)
    declare = Stage(name=name, version=1, scope=Scope.ALL, reads=reads, **declared)
    return declare(body or (lambda: None))


@st.composite
def graphs(draw):
    """Stages in an order in which each stands after all that it reads."""
    found = []
    for place, name in enumerate(NAMES):
        tables = draw(st.lists(st.sampled_from(NAMES[:place]), unique=True)) if place else []
        found.append(stage(name, *tables))
    return found


@given(stages=graphs())
def test_an_order_that_is_valid_stays(stages):
    assert list(ordered(stages).values()) == stages


@given(stages=graphs(), data=st.data())
def test_each_stage_stands_after_all_that_it_reads(stages, data):
    shuffled = data.draw(st.permutations(stages))
    names = list(ordered(shuffled))
    assert sorted(names) == NAMES
    for one in stages:
        assert all(names.index(table) < names.index(one.name) for table in one.parents)


def test_all_that_write_a_table_stand_before_who_reads_it():
    sidecars, blip = stage("captions"), stage("blip", table="captions", model="blip")
    reader = stage("selected_images", "captions")
    assert list(ordered([sidecars, reader, blip])) == ["captions", "blip", "selected_images"]


def test_stages_of_one_body_stand_together():
    def body():
        """Makes two."""

    two = [stage("tags", "raw_images", body=body), stage("embeddings", body=body)]
    found = ordered([two[0], stage("raw_images"), two[1]])
    assert list(found) == ["raw_images", "tags", "embeddings"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage("tags"), stage("tags", table="captions")], "another stage has its name"),
        ([stage("captions"), stage("blip", table="captions")], "the same parts of table captions"),
        ([stage("image_tags")], "names table image_tags, which no schema has"),
        ([stage("tags", "raw_image")], "names table raw_image, which no schema has"),
        ([stage("tags", "raw_images")], "reads table 'raw_images'|raw_images, which no stage writes"),
        ([stage("tags", also=(Reads("raw_images", ("hight",)),))], "names column hight of table raw_images"),
        ([stage("tags", "captions"), stage("captions", "tags")], "tags, captions read each other in a circle"),
    ],
)  # fmt: skip
def test_declarations_that_cannot_stand_are_refused(stages, message):
    with pytest.raises(DeclarationError, match=message):
        ordered(stages)


def test_stages_of_one_body_have_one_scope():
    def body():
        """Makes two."""

    two = [stage("tags", body=body), replace(stage("embeddings", body=body), scope=Scope.SHARD)]
    with pytest.raises(DeclarationError, match="tags, embeddings have one body"):
        ordered(two)


def test_a_function_names_and_describes_its_stage():
    @Stage(version=1, scope=Scope.ALL)
    def tags():
        """One row per image."""

    assert (tags.name, tags.table, tags.description) == ("tags", "tags", "One row per image.")
    assert replace(tags, version=2).body is tags.body
