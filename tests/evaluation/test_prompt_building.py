"""Sets that are made hold nothing that was trained on, stay as the data set grows, and fill each group."""

import hashlib

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.geometry import Size
from training.data.tables import TABLES
from training.errors import ConfigError, EvaluationError
from training.evaluation import prompt_building, prompt_groups, prompt_sets
from training.evaluation_config import PromptSetConfig

SIZES = (Size(64, 64), Size(96, 64), Size(64, 96))


def selected(rows):
    schema = {
        name: TABLES["selected_images"].schema[name]
        for name in ("image_id", "height", "width", "split", "tags", "caption", "made_caption")
    }
    return pl.DataFrame(
        [
            {"image_id": key, "height": h, "width": w, "split": split, "caption": caption, "made_caption": None,
             "tags": [{"name": tag, "category": "general"} for tag in tags]}
            for key, h, w, split, caption, tags in rows
        ],
        schema=schema,
    )  # fmt: skip


def test_held_out_images_become_prompts_that_were_never_trained():
    rows = [
        ("t1", 100, 100, "train", "a red circle", ["circle", "red"]),
        ("t2", 100, 100, "train", None, ["blue", "square"]),
        ("v1", 90, 200, "validation", "a green star", ["star"]),
        ("v2", 200, 90, "validation", None, ["star", "tree"]),
        ("v3", 90, 90, "validation", "A RED circle", []),
        ("v4", 90, 90, "validation", None, ["square", "blue"]),
        ("v5", 90, 90, "validation", None, []),
        ("v6", 90, 90, "validation", "a green star.", []),
        ("d1", 90, 90, None, "a dropped one", []),
    ]
    sizes = (Size(64, 128), Size(96, 96), Size(128, 64))
    frame = prompt_building.from_validation(selected(rows), sizes, 10)
    assert frame.schema == TABLES["prompt_sets"].schema
    assert {(row["text"].rstrip("."), row["group"]) for row in frame.iter_rows(named=True)} == {
        ("a green star", "caption"),
        ("star, tree", "tags"),
    }
    by_id = {row["prompt_id"]: row for row in frame.iter_rows(named=True)}
    assert (by_id["v2"]["height"], by_id["v2"]["width"]) == (128, 64)
    assert prompt_sets.overlap(frame, ["a red circle", "blue, square"]) == []
    assert prompt_building.from_validation(selected(rows), sizes, 1).height == 1


def test_texts_that_a_ui_reads_otherwise_are_left_out():
    """Nobody wrote them as prompts, and one of them would have a strict protocol refuse the set."""
    captions = ("a star at 12:30", "SALT AND PEPPER", "[signed:1999:3] print", "a | b", "(a star:1.2)", "a star: red")
    rows = [(f"c{n}", 90, 90, "validation", caption, []) for n, caption in enumerate(captions)]
    rows += [("t1", 90, 90, "validation", None, ["star", ":)"]), ("t2", 90, 90, "validation", None, ["fox_(animal)"])]
    frame = prompt_building.from_validation(selected(rows), SIZES, 99)
    assert sorted(frame["text"]) == ["a star: red", "fox_(animal)"]
    kept = pl.concat([frame, prompt_sets.make_frame([{**frame.drop("seed").row(0, named=True), "text": "SALT AND X"}])])
    again = prompt_building.from_validation(selected(rows), SIZES, 99, previous=kept[1:])
    assert sorted(again["text"]) == ["a star: red", "fox_(animal)"]


def test_more_images_keep_the_prompts_that_are_first_by_hash():
    few = [(f"v{n}", 90, 90, "validation", f"picture number {n}", []) for n in range(20)]
    more = few + [(f"w{n}", 90, 90, "validation", f"another picture {n}", []) for n in range(5)]
    sizes = (Size(64, 64),)
    sets = [prompt_building.from_validation(selected(rows), sizes, 10) for rows in (few, more)]
    first, second = (set(frame["prompt_id"]) for frame in sets)
    assert len(first & second) >= 5


def test_prompts_stay_when_more_images_come_and_go_when_their_image_does():
    few = [(f"v{n:02}", 90, 90, "validation", f"picture number {n}", []) for n in range(20)]
    more = [*few, *((f"w{n:02}", 90, 90, "validation", f"another picture {n}", []) for n in range(30))]
    first = prompt_building.from_validation(selected(few), SIZES, 15)
    grown = prompt_building.from_validation(selected(more), SIZES, 15, first)
    assert grown.equals(first)
    assert not prompt_building.from_validation(selected(more), SIZES, 15).equals(first)  # alone, others come first
    gone = first["prompt_id"][3]
    left = prompt_building.from_validation(selected([row for row in more if row[0] != gone]), SIZES, 15, first)
    assert left.height == 15
    assert set(first["prompt_id"]) - set(left["prompt_id"]) == {gone}
    trained = [*more, ("t1", 90, 90, "train", first["text"][5], [])]
    assert (
        first["prompt_id"][5] not in prompt_building.from_validation(selected(trained), SIZES, 15, first)["prompt_id"]
    )


def test_every_line_of_a_caption_counts_as_trained():
    rows = [("t", 9, 9, "train", "a red kite\na kite that is red", ["kite"]), ("v", 9, 9, "validation", "kite", [])]
    assert list(prompt_building.trained_texts(selected(rows))) == ["a red kite", "a kite that is red", "kite"]
    assert prompt_building.from_validation(selected(rows), SIZES, 5).is_empty()


tag_names = st.from_regex(r"[a-z]{1,6}(_[a-z]{1,4})?(_\([a-z]{1,3}\))?", fullmatch=True)


@given(tags=st.lists(tag_names, min_size=1, max_size=30, unique=True), data=st.data())
def test_a_prompt_of_trained_tags_is_found_however_it_is_spelled(tags, data):
    typed = [
        data.draw(
            st.sampled_from([tag, tag.replace("_", " "), tag.upper(), tag.replace("(", r"\(").replace(")", r"\)")])
        )
        for tag in data.draw(st.permutations(tags))
    ]
    text = data.draw(st.sampled_from([", ", ",", " ,  "])).join(typed)
    trained = list(prompt_building.trained_texts(selected([("t", 9, 9, "train", None, sorted(tags))])))
    prompts = prompt_sets.make_frame([prompt_building._row("p", text, "g", SIZES[0])])
    assert prompt_sets.overlap(prompts, trained) == ["p"]
    more = prompt_sets.make_frame([prompt_building._row("p", f"{text}, another tag", "g", SIZES[0])])
    assert prompt_sets.overlap(more, trained) == []


def test_twenty_trained_tags_are_known_as_a_whole_and_as_the_twelve_that_a_prompt_is_made_of():
    tags = [f"tag_{n:02}" for n in range(20)]
    rows = [("t", 9, 9, "train", None, tags), ("v", 9, 9, "validation", None, [*tags[:12], "x"])]
    assert list(prompt_building.trained_texts(selected(rows))) == [", ".join(tags), ", ".join(tags[:12])]
    assert prompt_building.from_validation(selected(rows), SIZES, 5).is_empty()


@pytest.mark.parametrize("group", prompt_groups.NAMES)
def test_a_group_is_large_enough_for_a_verdict_and_names_nothing_twice(group):
    frame = prompt_building.from_groups([group], SIZES, ["kayak", "beehive_oven"])
    assert frame.height == prompt_groups.SIZE >= 30
    assert frame["text"].n_unique() == frame["prompt_id"].n_unique() == frame.height
    assert frame["group"].unique().to_list() == [group]
    assert {(row["height"], row["width"]) for row in frame.iter_rows(named=True)} == set(SIZES)
    assert not frame["text"].str.contains("kayak|beehive").any()


def test_words_that_the_data_set_knows_are_no_unknown_words():
    known = [word.replace(" ", "_") for word in prompt_groups._RARE]
    with pytest.raises(EvaluationError, match="tags for all but 3 of 48 rare words"):
        prompt_building.from_groups(["unknown_words"], SIZES, known[3:])


def test_parti_prompts_are_imported_by_text(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    lines = ["Prompt\tCategory\tChallenge\tNote", 'a "quoted" cat\tAnimals\tBasic\t', "bond\tWorld Knowledge\tx\t"]
    path.write_text("\n".join(lines) + "\n")
    assert prompt_building.is_parti(path)
    frame = prompt_building.read_parti(path, SIZES)
    assert dict(frame.select("text", "group").iter_rows()) == {'a "quoted" cat': "animals", "bond": "world_knowledge"}
    assert hashlib.sha256(b"bond").hexdigest()[:16] in frame["prompt_id"].to_list()
    path.write_text("\n".join([lines[0], "a new one\tArts\t\t", *lines[1:], "bond\tArts\t\t"]))
    longer = prompt_building.read_parti(path, SIZES)
    assert longer.height == 4
    assert frame.join(longer, on=frame.columns, how="anti").is_empty()
    assert longer["seed"].n_unique() == 4
    path.write_text("\n".join([*lines, "broken line without a tab"]))
    with pytest.raises(EvaluationError, match=r"PartiPrompts.tsv:4: Prompt 'broken line"):
        prompt_building.read_parti(path, SIZES)
    path.write_text(lines[0])
    with pytest.raises(EvaluationError, match="holds no prompt"):
        prompt_building.read_parti(path, SIZES)


@pytest.mark.parametrize(
    ("values", "said"),
    [({}, "either a file"), ({"file": "a.csv", "held_out": 3}, "either a file"), ({"held_out": -1}, "must be >= 0"),
     ({"groups": ("hands", "feet")}, r"\['feet'\] are unknown; there are hands, ")],
)  # fmt: skip
def test_a_set_is_either_read_or_made(values, said):
    with pytest.raises(ConfigError, match=said):
        PromptSetConfig(**values)


def test_negatives_have_names_or_are_themselves():
    assert prompt_groups.negative_prompt("letter_box").startswith("letterboxed")
    assert prompt_groups.negative_prompt("ugly") == "ugly"
    assert len(set(prompt_groups.NEGATIVES.values())) == 5
    assert prompt_sets.seed_of("hands-1") != prompt_sets.seed_of("hands-2")
