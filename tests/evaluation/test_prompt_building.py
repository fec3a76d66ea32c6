"""Sets that are made hold nothing that was trained on, stay as the data set grows, and fill each
group."""

import hashlib
import tomllib
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_table import make_prompts, repeated

from assets import prompt_sets as prompt_sets_asset
from resources.graph import Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.buckets.geometry import Size
from training.config import recipes
from training.config.evaluation import PROMPT_GROUPS, HeldOutPromptsConfig, PromptSetConfig
from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.errors import ConfigError, EvaluationError
from training.evaluation import prompt_building, prompt_groups, prompt_sets
from training.tables.schemas import TABLES

SIZES = (Size(64, 64), Size(96, 64), Size(64, 96))
CAPTIONS = HeldOutPromptsConfig(prefix="", caption_prob=1.0)
"""Captions where there are any, else tags alone."""


def selected(rows):
    schema = {name: TABLES["selected_images"].schema[name] for name in prompt_building.HELD_OUT}
    return pl.DataFrame(
        [
            {"image_id": key, "height": h, "width": w, "split": split, "caption": caption, "made_caption": None,
             "words": None, "tags": [{"name": tag, "category": "general"} for tag in tags]}
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
    frame = prompt_building.from_validation(selected(rows), sizes, 10, CAPTIONS)
    assert frame.schema == TABLES["prompt_sets"].schema
    assert {(row["text"].rstrip("."), row["group"]) for row in frame.iter_rows(named=True)} == {
        ("a green star", "caption"),
        (next(text for text in frame["text"] if "tree" in text), "tags"),
    }
    assert set(next(text for text in frame["text"] if "tree" in text).split(", ")) == {
        "star",
        "tree",
    }
    by_id = {row["prompt_id"]: row for row in frame.iter_rows(named=True)}
    assert (by_id["v2"]["height"], by_id["v2"]["width"]) == (128, 64)
    assert prompt_sets.overlap(frame, ["a red circle", "blue, square"]) == []
    assert prompt_building.from_validation(selected(rows), sizes, 1, CAPTIONS).height == 1


def test_texts_that_a_ui_reads_otherwise_are_left_out():
    """No one wrote them as prompts, and one of them would have a strict protocol refuse the set."""
    captions = (
        "a star at 12:30",
        "SALT AND PEPPER",
        "[signed:1999:3] print",
        "a | b",
        "(a star:1.2)",
        "a star: red",
    )
    rows = [(f"c{n}", 90, 90, "validation", caption, []) for n, caption in enumerate(captions)]
    rows += [
        ("t1", 90, 90, "validation", None, ["star", ":)"]),
        ("t2", 90, 90, "validation", None, ["fox_(animal)"]),
    ]
    frame = prompt_building.from_validation(selected(rows), SIZES, 99, CAPTIONS)
    assert sorted(frame["text"]) == ["a star: red", "fox_(animal)"]
    kept = pl.concat(
        [
            frame,
            prompt_sets.make_frame(
                [{**frame.drop("seed").row(0, named=True), "text": "SALT AND X"}]
            ),
        ]
    )
    again = prompt_building.from_validation(selected(rows), SIZES, 99, CAPTIONS, previous=kept[1:])
    assert sorted(again["text"]) == ["a star: red", "fox_(animal)"]


def test_more_images_keep_the_prompts_that_are_first_by_hash():
    few = [(f"v{n}", 90, 90, "validation", f"image number {n}", []) for n in range(20)]
    more = few + [(f"w{n}", 90, 90, "validation", f"another image {n}", []) for n in range(5)]
    sizes = (Size(64, 64),)
    sets = [
        prompt_building.from_validation(selected(rows), sizes, 10, CAPTIONS) for rows in (few, more)
    ]
    first, second = (set(frame["prompt_id"]) for frame in sets)
    assert len(first & second) >= 5


def test_prompts_stay_when_more_images_come_and_go_when_their_image_does():
    few = [(f"v{n:02}", 90, 90, "validation", f"image number {n}", []) for n in range(20)]
    more = [
        *few,
        *((f"w{n:02}", 90, 90, "validation", f"another image {n}", []) for n in range(30)),
    ]
    first = prompt_building.from_validation(selected(few), SIZES, 15, CAPTIONS)
    grown = prompt_building.from_validation(selected(more), SIZES, 15, CAPTIONS, first)
    assert grown.equals(first)
    assert not prompt_building.from_validation(selected(more), SIZES, 15, CAPTIONS).equals(
        first
    )  # alone, others come first
    gone = first["prompt_id"][3]
    left = prompt_building.from_validation(
        selected([row for row in more if row[0] != gone]), SIZES, 15, CAPTIONS, first
    )
    assert left.height == 15
    assert set(first["prompt_id"]) - set(left["prompt_id"]) == {gone}
    trained = [*more, ("t1", 90, 90, "train", first["text"][5], [])]
    assert (
        first["prompt_id"][5]
        not in prompt_building.from_validation(selected(trained), SIZES, 15, CAPTIONS, first)[
            "prompt_id"
        ]
    )


def test_every_line_of_a_caption_counts_as_trained():
    rows = [
        ("t", 9, 9, "train", "a red kite\na kite that is red", ["kite"]),
        ("v", 9, 9, "validation", "kite", []),
    ]
    assert list(prompt_building.trained_texts(selected(rows))) == [
        "a red kite",
        "a kite that is red",
        "kite",
    ]
    assert prompt_building.from_validation(selected(rows), SIZES, 5, CAPTIONS).is_empty()


tag_names = st.from_regex(r"[a-z]{1,6}(_[a-z]{1,4})?(_\([a-z]{1,3}\))?", fullmatch=True)


@given(tags=st.lists(tag_names, min_size=1, max_size=30, unique=True), data=st.data())
def test_a_prompt_of_trained_tags_is_found_however_it_is_spelled(tags, data):
    typed = [
        data.draw(
            st.sampled_from(
                [
                    tag,
                    tag.replace("_", " "),
                    tag.upper(),
                    tag.replace("(", r"\(").replace(")", r"\)"),
                ]
            )
        )
        for tag in data.draw(st.permutations(tags))
    ]
    text = data.draw(st.sampled_from([", ", ",", " ,  "])).join(typed)
    trained = list(
        prompt_building.trained_texts(selected([("t", 9, 9, "train", None, sorted(tags))]))
    )
    prompts = prompt_sets.make_frame([prompt_building._row("p", text, "g", SIZES[0])])
    assert prompt_sets.overlap(prompts, trained) == ["p"]
    more = prompt_sets.make_frame(
        [prompt_building._row("p", f"{text}, another tag", "g", SIZES[0])]
    )
    assert prompt_sets.overlap(more, trained) == []


def tagged(key, tags, split="validation", caption=None):
    return (key, 9, 9, split, caption, tags)


def build(rows, **style):
    """Texts by id, of a style whose captions play no part unless named."""
    frame = prompt_building.from_validation(
        selected(rows), SIZES, 99, HeldOutPromptsConfig(**style)
    )
    return {row["prompt_id"]: (row["group"], row["text"]) for row in frame.iter_rows(named=True)}


MANY = [f"tag_{n:02}" for n in range(40)]


def test_tags_are_not_the_alphabets_first_and_follow_from_the_image_alone():
    one, other = (
        build([tagged("v", MANY)]),
        build([tagged("v", MANY[::-1]), tagged("w", MANY[:39])]),
    )
    assert one["v"] == other["v"]
    group, text = one["v"]
    prefix, *names = text.split(", ")
    assert (group, prefix, len(set(names)), set(names) <= set(MANY)) == (
        "tags",
        "score_7_up",
        32,
        True,
    )
    assert names != sorted(names)
    assert max(names) > "tag_32"
    assert [name for name in names if name in MANY[:39]] != other["w"][1].split(", ")[1:], (
        "each image has its own order"
    )
    assert set(build([tagged("v", MANY)], num_tags=0)["v"][1].split(", ")) == {"score_7_up", *MANY}
    assert build([tagged("v", ["a_b_c", "o_o"])], spaces=True, prefix="")["v"][1] in (
        "a b c, o_o",
        "o_o, a b c",
    )


@pytest.mark.parametrize("mean_tags", [0.0, 6.0])
@pytest.mark.parametrize("order", ["shuffled", "kohaku"])
def test_prompts_are_ordered_as_the_training_prompts_of_the_recipe(order, mean_tags):
    # The oracle is the maker of training prompts: of each pair of tags whose order the recipe
    # fixes, both have one.
    config = PromptConfig(order=order, mean_tags=mean_tags, std_tags=0, first_tags=("photo_(medium)",), always_tags=(),
                          alias_prob=0, spaces_prob=0, mixed_prob=0, loose_separators_prob=0, empty_prob=0)  # fmt: skip
    names = {"photo_(medium)": "meta", "2girls": "general", "bow": "general", "ann": "character", "zoe": "character",
             "saga": "copyright", "painter": "artist", "apple": "general", "cup": "general"}  # fmt: skip
    kinds = {name: "people" if name == "2girls" else kind for name, kind in names.items()}
    rows = [tagged(f"{n:064d}", sorted(names)) for n in range(24)]
    frame = selected(rows).with_columns(
        tags=pl.Series(
            [[{"name": name, "category": names[name]} for name in sorted(names)]] * len(rows)
        )
    )
    style = recipes.held_out_prompts(config)
    made = prompt_building.from_validation(frame[:1], SIZES, 1, style)["text"].to_list()
    made += [prompt_building._write(row, style).text for row in frame.iter_rows(named=True)]
    train = make_prompts(repeated({"tags": sorted(names)}, 24), Vocabulary(kinds, {}), config)
    for text in (*made, *(prompt.text for prompt in train)):
        tags = [tag for tag in text.split(", ") if not tag.startswith("score_")]
        assert text.startswith("score_")
        assert tags[0] == "photo_(medium)"
        placed = [
            tag for tag in tags if kinds[tag] in ("people", "character", "copyright", "artist")
        ]
        ranks = [("people", "character", "copyright", "artist").index(kinds[tag]) for tag in placed]
        if order == "kohaku":
            assert tags[1 : 1 + len(placed)] == placed
            assert ranks == sorted(ranks)
        assert len(tags) == (len(names) if not mean_tags else 6)
    assert len({tuple(text.split(", ")[-2:]) for text in made}) > 3


def test_captions_are_used_by_the_recipes_shares():
    rows = [
        tagged(f"v{n:03}", ["kite", "sky", f"extra_{n}"], caption=f"kite number {n}.")
        for n in range(200)
    ]
    assert {group for group, _ in build(rows).values()} == {"tags"}
    assert {group for group, _ in build(rows, caption_prob=1.0).values()} == {"caption"}
    mixed = build(rows, caption_prob=0.3, caption_and_tags_prob=0.4)
    groups = Counter(group for group, _ in mixed.values())
    assert 15 < groups["caption"] < 45  # of 99, by 30 and 40 %
    assert 24 < groups["caption_and_tags"] < 55
    both = next(text for group, text in mixed.values() if group == "caption_and_tags")
    assert both.startswith("score_7_up, kite number ")
    assert ". " in both
    alone = next(text for group, text in mixed.values() if group == "caption")
    assert "score" not in alone
    assert build([tagged("v", [], caption="a kite")]) == {"v": ("caption", "a kite")}


def test_many_trained_tags_are_known_whichever_of_them_a_prompt_has():
    rows = [tagged("t", MANY, "train"), tagged("v", MANY), tagged("w", [*MANY, "other"])]
    assert build(rows).keys() == {"w"}
    assert build([tagged("t", ["a", "b"], "train"), tagged("v", ["b", "a"])]) == {}
    prompts = prompt_sets.make_frame([prompt_building._row("p", "score_7_up, b, a", "g", SIZES[0])])
    assert prompt_sets.overlap(prompts, ["a, b"]) == ["p"], "score tags make no other prompt"


def test_a_recipes_prompts_reach_the_workspace_that_it_begins(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[workspace]\nformat = 1\n[workspace.encodings.sdxl]\n[workspace.prompt_sets.standard]\nheld_out = 9\n"
        '[workspace.prompt_sets.own]\nheld_out = 9\nprompts = { prefix = "best" }\n'
        '[run]\n[run.prompts]\norder = "kohaku"\nscore_tags = false\nmean_tags = 0.0\nspaces_prob = 1.0\n'
        "mixed_prob = 0.0\n"
    )
    values = tomllib.loads(recipes.workspace_toml(path, [], tiny=None))["prompt_sets"]
    assert values["standard"]["prompts"] == {
        "prefix": "",
        "num_tags": 0,
        "order": "kohaku",
        "spaces": True,
    }
    assert values["own"]["prompts"] == {"prefix": "best"}
    assert recipes.held_out_prompts(PromptConfig()) == HeldOutPromptsConfig()


@pytest.mark.parametrize("group", PROMPT_GROUPS)
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
    lines = [
        "Prompt\tCategory\tChallenge\tNote",
        'a "quoted" cat\tAnimals\tBasic\t',
        "bond\tWorld Knowledge\tx\t",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert prompt_building.is_parti(path)
    frame = prompt_building.read_parti(path, SIZES)
    assert dict(frame.select("text", "group").iter_rows()) == {
        'a "quoted" cat': "animals",
        "bond": "world_knowledge",
    }
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
     ({"groups": ("hands",), "prompts": CAPTIONS}, "but held_out=0"),
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


def test_a_set_is_written_anew_when_its_style_changes_and_stays_when_images_come(tmp_path):
    def store(style):
        held_out = f"format = 1\n[encodings.sdxl]\n[prompt_sets.standard]\nheld_out = 15\n{style}"
        (tmp_path / "foundry.toml").write_text(held_out)
        return Store(tmp_path)

    def commit(stage, key, frame, opened):
        basis = opened.currency.basis(stage, key)
        opened.writer.commit(stage, key, Made(frame=frame), basis, seconds=0)
        return frame

    def images(count):
        frame = selected([tagged(f"{n:064d}", [f"tag_{n}", "kite"]) for n in range(count)])
        whole = TABLES["selected_images"]
        missing = [
            pl.lit(None, dtype).alias(name)
            for name, dtype in whole.schema.items()
            if name not in frame.columns
        ]
        return frame.with_columns(missing)

    selection = Stage(name="selected_images", version=1, scope=Scope.ALL)
    opened = store("")
    commit(selection, "all", images(20), opened)
    first = commit(
        prompt_sets_asset.prompt_sets,
        "standard",
        prompt_sets_asset._make(opened, "standard"),
        opened,
    )
    assert first["text"].str.starts_with("score_7_up, ").all()
    commit(selection, "all", images(60), opened)
    assert prompt_sets_asset._make(store(""), "standard").equals(first)
    other = prompt_sets_asset._make(store('prompts = { prefix = "best" }\n'), "standard")
    assert other["text"].str.starts_with("best, ").all()
