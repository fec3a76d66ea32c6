"""Prompt sets: what a file may hold, seeds that stand still, and no prompt that was trained on."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import EvaluationError
from training.evaluation import prompt_sets
from training.tables.schemas import TABLES

HEADER = "prompt_id,text,negative,group,height,width\n"


def write(tmp_path, content):
    path = tmp_path / "prompts.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_file_becomes_rows_of_the_table(tmp_path):
    path = write(
        tmp_path, "\ufeff" + HEADER + 'b,"red, cat",blurry,colours,128,96\na,a dog,,,64,64\n'
    )
    frame = prompt_sets.read_prompts(path)
    assert frame.schema == TABLES["prompt_sets"].schema
    assert frame.drop("seed").rows() == [
        ("a", "a dog", "", "general", 64, 64),
        ("b", "red, cat", "blurry", "colours", 128, 96),
    ]


def test_negative_and_group_may_be_missing(tmp_path):
    frame = prompt_sets.read_prompts(
        write(tmp_path, "height,width,prompt_id,text\n64,72,a,a dog\n")
    )
    assert frame.drop("seed").rows() == [("a", "a dog", "", "general", 64, 72)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt_id,text,height\n", r"missing \['width'\]"),
        (HEADER.replace("group", "grup") + "a,b,,,8,8\n", r"unknown \['grup'\]"),
        ("prompt_id,text,height,width,text\n", "each once"),
        (HEADER, "holds no prompt"),
        ("", "columns none"),
        (
            HEADER + "a,one,,,64,64\nb,two,,,64,64\na,three,,,64,64\n",
            r"csv:4: prompt_id 'a' stands in line 2 already",
        ),
        (HEADER + "a,one,,,100,64\n", r"csv:2: height='100' of prompt 'a' must be a multiple of 8"),
        (HEADER + "a,one,,,64,-64\n", "width='-64'"),
        (HEADER + "a,one,,,0,64\n", "height='0'"),
        (HEADER + "a,one,,,64,8200\n", "at most 8192"),
        (HEADER + "a,one,,,6e1,64\n", "height='6e1'"),
        (HEADER + "a, ,,,64,64\n", "csv:2: text is empty"),
        (HEADER + ",one,,,64,64\n", "prompt_id is empty"),
        (HEADER + "a,one,64,64\n", "csv:2: the line has more or fewer fields"),
        (HEADER + "a,one, two,,,64,64\n", "more or fewer fields"),
        (HEADER + 'a,"one,,,64,64\n', "no valid CSV"),
        (b"prompt_id,text\n\xff", "not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, content, message):
    with pytest.raises(EvaluationError, match=message):
        prompt_sets.read_prompts(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"nowhere\.csv does not exist"):
        prompt_sets.read_prompts(tmp_path / "nowhere.csv")


words = (
    st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)


@given(
    st.dictionaries(
        words,
        st.tuples(words, words, st.integers(1, 200), st.integers(1, 200)),
        min_size=1,
        max_size=8,
    )
)
def test_writing_and_reading_gives_the_same_set(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("set") / "prompts.csv"
    frame = TABLES["prompt_sets"].conform(
        pl.DataFrame(
            [
                {"prompt_id": key, "text": text, "negative": "", "group": group, "height": 8 * h, "width": 8 * w,
                 "seed": prompt_sets.seed_of(key)}
                for key, (text, group, h, w) in rows.items()
            ],
            schema=TABLES["prompt_sets"].schema,
        )
    )  # fmt: skip
    prompt_sets.write_prompts(path, frame)
    assert prompt_sets.read_prompts(path).equals(frame)
    assert prompt_sets.digest(prompt_sets.read_prompts(path)) == prompt_sets.digest(frame.reverse())


def test_inserting_a_prompt_moves_no_seed(tmp_path):
    one = prompt_sets.read_prompts(write(tmp_path, HEADER + "b,x,,,64,64\nc,y,,,64,64\n"))
    two = prompt_sets.read_prompts(
        write(tmp_path, HEADER + "a,z,,,64,64\nb,x,,,64,64\nc,y,,,64,64\n")
    )
    assert two.filter(pl.col("prompt_id") != "a").equals(one)
    assert two["seed"].n_unique() == 3
    # Pinned: another seed means that no image compares with an older one.
    assert prompt_sets.seed_of("p01") == 626859795568351200


def test_overlap_sees_through_spelling_and_order(tmp_path):
    frame = prompt_sets.read_prompts(
        write(
            tmp_path,
            HEADER
            + 'a,"red_cat,  Green dog",,,8,8\nb,A red circle.,,,8,8\nc,a blue circle,,,8,8\n',
        )
    )
    trained = ["green_dog, red cat", "a red  circle", "blue circle"]
    assert prompt_sets.overlap(frame, trained) == ["a", "b"]
    with pytest.raises(EvaluationError, match=r"2 of 3 prompts were trained on \(a, b\)"):
        prompt_sets.refuse_overlap(frame, trained)
    prompt_sets.refuse_overlap(frame, ["blue circle"])
