"""Spelling, aliases and counting of tags, on odd names and broken tables."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.curation import tags
from training.errors import DataError
from training.tables.schemas import TABLES
from training.tables.table import SCORED_TAG, TAG


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Long Hair", "long_hair"), ("  a\t b\n c ", "a_b_c"), (r"photo \(medium\)", "photo_(medium)"), ("o_o", "o_o"),
        ("^_^", "^_^"), ("cafe\u0301", "café"), (r"a\\(b", "a(b"),
        ("'; DROP TABLE tags;--", "';_drop_table_tags;--"), ("{{7*7}}", "{{7*7}}"),
        ("100%s", "100%s"), ("🦊 girl", "🦊_girl"), ("", ""), (" _ ", ""), ("x" * 5000, "x" * 5000), ("|_|", "|_|"),
    ],
)  # fmt: skip
def test_canonical(name, expected):
    assert tags.canonical(name) == expected


@given(st.text())
def test_canonical_is_idempotent_and_one_word(name):
    once = tags.canonical(name)
    assert tags.canonical(once) == once
    assert len(once.split()) <= 1


def table(tmp_path, text):
    path = tmp_path / "aliases.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tags.load_aliases(path)


def test_aliases_resolve_in_one_step_and_what_does_not_is_counted(tmp_path):
    aliases = table(
        tmp_path,
        """\ufefffull_moon,0,100,"Fullmoon,/fm,full_moon"
Some Artist,1,50,"s. artist"
a,0,9,"b,both"
b,4,8,"a"
c,0,7,"d,both"
d,3,6,"e"
f,5,5,"g"
g,0,4,
no_category
x,17,3,"y"
full_moon,0,1,"again"
""",
    )
    assert aliases.to_tag == {"fullmoon": "full_moon", "s._artist": "some_artist", "e": "d"}
    assert aliases.problems == {
        "ambiguous": 2, "chain": 1, "cycle": 2, "is_tag": 1, "malformed": 3, "self": 1, "shortcut": 1,
    }  # fmt: skip
    assert aliases.category["some_artist"] == "artist"
    assert aliases.category["d"] == "copyright"


def test_an_open_quote_or_a_huge_field_costs_its_line(tmp_path):
    huge = "y" * (tags._MAX_FIELD_BYTES + 1)
    aliases = table(tmp_path, f'a,0,1,"open\nb,0,1,"bb"\nc,0,1,"{huge}"\nd,0,1,"dd"\n')
    assert aliases.to_tag == {"open": "a", "bb": "b", "dd": "d"}
    assert aliases.problems == {"malformed": 1}


def test_an_alias_table_that_is_none(tmp_path):
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        table(tmp_path, b"\xff\xfea\0")
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        tags.load_aliases(tmp_path / "none.csv")


names = st.sampled_from(["a", "b", "c", "d", "/e", "A b"])


@given(rows=st.lists(st.tuples(names, st.lists(names, max_size=4)), max_size=6))
def test_no_table_leads_in_circles(tmp_path_factory, rows):
    text = "".join(f'{name},0,1,"{",".join(listed)}"\n' for name, listed in rows)
    aliases = table(tmp_path_factory.mktemp("aliases"), text)
    assert not set(aliases.to_tag) & set(aliases.to_tag.values())
    assert not set(aliases.to_tag) & set(aliases.category)
    assert set(aliases.to_tag.values()) <= set(aliases.category)


ALIASES = tags.Aliases(
    to_tag={"see-through": "see-through_clothes", "moon": "full_moon"},
    category={"see-through_clothes": "general", "full_moon": "general", "alice": "character"},
)


def tag(name, category="general"):
    return {"name": name, "category": category}


def scored(name, probability):
    return {"name": name, "probability": probability}


def test_source_and_tagger_are_joined():
    found = tags.resolve(
        [tag("Moon"), tag("someone", "artist"), tag("bad"), tag("alice")],
        [
            scored("full_moon", 0.9),
            scored("see-through", 0.4),
            scored("weak", 0.39),
            scored("someone", 0.8),
        ],
        threshold=0.4,
        aliases=ALIASES,
        blacklist=["bad"],
    )
    assert found == [
        tag("alice", "character"), tag("full_moon"), tag("see-through_clothes"), tag("someone", "artist"),
    ]  # fmt: skip
    assert tags.resolve([], [], threshold=0.4, aliases=ALIASES) == []


def test_probabilities_at_the_threshold_count_in_single_precision():
    # Tables hold float32: 0.4 as float32 is 0.4000000059, and 0.7 is 0.699999988.
    for threshold in (0.4, 0.7, 0.1):
        found = tags.resolve(
            [], [scored("a", threshold)], threshold=threshold, aliases=tags.Aliases()
        )
        assert found == [tag("a")], threshold


def frames():
    source = pl.DataFrame(
        {
            "image_id": ["1", "1", "2", "3"],
            "tags": [[tag("moon")], [tag("Moon"), tag("x", "artist")], [tag("x")], []],
        },
        {"image_id": pl.String, "tags": pl.List(TAG)},
    )
    tagger = pl.DataFrame(
        {
            "image_id": ["1", "2", "4"],
            "tags": [[scored("moon", 0.5)], [scored("moon", 0.1)], [scored("x", 1.0)]],
        },
        {"image_id": pl.String, "tags": pl.List(SCORED_TAG)},
    )
    return source, tagger


def test_the_vocabulary_counts_images_once():
    found = tags.vocabulary(
        *frames(),
        threshold=0.4,
        aliases=ALIASES,
        pieces=lambda words: [[w[:1], w[1:]] for w in words],
    )
    assert found.to_dicts() == [
        {"tag": "full_moon", "tag_id": 0, "category": "general", "aliases": ["moon"], "num_images": 1,
         "num_source": 1, "num_tagger": 1, "pieces": ["f", "ull_moon"]},
        {"tag": "x", "tag_id": 1, "category": "general", "aliases": [], "num_images": 3, "num_source": 2,
         "num_tagger": 1, "pieces": ["x", ""]},
    ]  # fmt: skip


def test_a_vocabulary_of_nothing_and_without_a_tokenizer():
    empty = tags.vocabulary(*(f.clear() for f in frames()), threshold=0.4, aliases=ALIASES)
    assert empty.schema == TABLES["tag_vocabulary"].schema
    assert tags.vocabulary(*frames(), threshold=0.4, aliases=ALIASES)["pieces"].to_list() == [
        None,
        None,
    ]


def test_all_at_once_is_one_by_one():
    source, tagger = frames()
    together = tags.resolve_all(source, tagger, threshold=0.4, aliases=ALIASES)
    assert together["image_id"].to_list() == ["1", "2", "4"]
    for image_id, found in together.iter_rows():
        mine = [t for row in source.filter(image_id=image_id)["tags"] for t in row.to_list()]
        theirs = [t for row in tagger.filter(image_id=image_id)["tags"] for t in row.to_list()]
        assert found == tags.resolve(mine, theirs, threshold=0.4, aliases=ALIASES)
