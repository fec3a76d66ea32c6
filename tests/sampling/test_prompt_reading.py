"""What is refused of prompts, what is warned of, and that both name the prompt before anything is
drawn."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import tomlkit
from tiny_sampling import prompt_frame

from assets import prompt_sets as prompt_sets_asset
from assets import selection
from resources.workspace.setup import RECIPES
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import toml
from training.config import recipes
from training.config.evaluation import PROMPT_GROUPS, SamplingConfig, SecondPassConfig
from training.config.workspace import WorkspaceConfig
from training.errors import EvaluationError
from training.evaluation import remote_sampling
from training.evaluation.prompt_groups import group_prompts, negative_prompt
from training.evaluation.prompt_sets import read_prompts
from training.sampling.prompt_reading import counted_calls, is_plain, read, read_set, remarks
from training.tables.schemas import TABLES

LENIENT = SamplingConfig(num_steps=20, prompt_weights="mean_restored")
STRICT = dataclasses.replace(LENIENT, prompt_syntax="strict")
OFF = dataclasses.replace(LENIENT, prompt_weights="off")

# Rules 9, 10, 12, 13 and 16 of A1111's reading, a time beyond the last call, and what each is told
# as.
ODD = [
    (
        "a | b [c:d:0.5]",
        r"'\|' \(character 3\) outside of any \[a\|b\] makes A1111 read every schedule",
    ),
    ("[c:d:0.5] (a|b)", r"'\|' \(character 13\) outside"),
    ("[c:d:0.5] [x|y", r"'\|' \(character 13\) outside"),
    ("[c:d:0.5] x\\", "a backslash at its end or before a line break"),
    ("[[a:b:0.5] c", r"'\[' \(character 1\): letters, as no \[from:to:when\]"),
    ("[re:zero:fate:0.5] x", r"'\[' \(character 1\), '\]' \(character 18\): letters"),
    ("[a:b:50%]", r"'\[' \(character 1\), '\]' \(character 9\): letters"),
    ("a) b", r"'\)' \(character 2\): letters"),
    ("x (y", r"'\(' \(character 3\): letters"),
    ("(a BREAK b)", "'BREAK' in brackets is a word and begins no chunk"),
    ("a cat, ratio 16:9", "':9' at the end is no text, but makes the guidance 9 times as strong"),
    (
        "1girl <lora:x:0.8>",
        "'<lora:x:0.8>' is read as words: LoRAs are named in evaluation.sampling.loras",
    ),
    ("[a:b:25]", "the time 25 lies beyond the last of 20 calls of the UNet"),
    ("[a:b:12.5]", "the time 12.5 lies beyond"),
]
PLAIN = (
    "a cat", "", "[a:b:0.5]", "[a|b] c", "(a:1.2) [b] ((c))", "[a [b|c]:0.2] d: e, 16:9 wide", "(re:zero:1.2)",
    r"momoko \(momopoco\), \[x\]", "a BREAK b", "（全角:1.2）", "aBREAK, SAND", "[a:b:0]", "[a:b:-1]", "[a:b:1.0]",
)  # fmt: skip


@pytest.mark.parametrize(("prompt", "told"), ODD)
def test_what_a1111_reads_otherwise_is_told_of_and_strict_refuses_it(prompt, told):
    found = read(prompt, LENIENT).remarks
    assert len(found) == 1
    with pytest.raises(EvaluationError, match=told) as error:
        read(prompt, STRICT)
    assert (
        str(error.value) == f'{found[0]}; evaluation.sampling.prompt_syntax="strict" refuses that'
    )
    assert "\n" not in found[0]


@pytest.mark.parametrize("prompt", PLAIN)
def test_what_is_read_as_it_looks_passes_both(prompt):
    assert read(prompt, LENIENT).remarks == ()
    assert read(prompt, STRICT) == read(prompt, LENIENT)


@pytest.mark.parametrize("config", [LENIENT, STRICT, OFF])
@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        (
            "a cat AND a dog",
            "'AND' joins several prompts to one image in A1111, which is not done here",
        ),
        (
            "[a:b:0.5]) c",
            r"'\[a:b:0.5\]\)': a schedule that touches a bracket .* put a space between",
        ),
        ("[a:b:1e999]", "the time 1e999 in a schedule is too large"),
    ],
)
def test_what_nobody_can_follow_is_refused_by_all(config, prompt, rule):
    with pytest.raises(EvaluationError, match=rule):
        read(prompt, config)


def test_a_weight_that_is_no_number_is_refused_where_weights_are_read():
    with pytest.raises(EvaluationError, match=r"':1\.2\.3\)': the weight 1\.2\.3 is no number"):
        read("(a:1.2.3)", LENIENT)
    assert read("(a:1.2.3)", OFF).texts["(a:1.2.3)"].runs == (("(a:1.2.3)", 1.0),)


@pytest.mark.parametrize(
    ("prompt", "text", "guidance"),
    [
        ("a cat, 12:30 ", "a cat, 12", 30.0), ("[a:b:0.5", "[a:b", 0.5), ("a : -1.5", "a", -1.5), ("a::5.", "a:", 5.0),
        (":2", "", 2.0), ("a:1:2", "a:1", 2.0), ("a:b", "a:b", 1.0), (" a \n", " a", 1.0), ("(a:2)", "(a:2)", 1.0),
    ],
)  # fmt: skip
def test_a_number_at_the_end_is_the_prompts_weight_and_of_a_negative_its_text(
    prompt, text, guidance
):
    found = read(prompt, LENIENT)
    assert (list(found.texts), found.guidance) == ([text], guidance)
    negative = read(prompt, LENIENT, is_negative=True)
    assert (list(negative.texts), negative.guidance) == ([prompt], 1.0)


def test_and_is_a_word_of_a_negative():
    found = read("bad AND worse", LENIENT, is_negative=True)
    assert list(found.texts) == ["bad AND worse"]
    assert found.remarks == ("'AND' is a mere word in a negative prompt",)
    with pytest.raises(EvaluationError, match=r"'AND' is a mere word .* refuses that"):
        read("bad AND worse", STRICT, is_negative=True)


def test_without_weights_schedules_are_drawn_and_marks_of_weights_told_of():
    found = read("by [(a:1.2):b:0.5] hatsune_miku_(cosplay)", OFF)
    assert [text for _, text in found.passes[0]] == [
        "by (a:1.2) hatsune_miku_(cosplay)", "by b hatsune_miku_(cosplay)",
    ]  # fmt: skip
    assert found.remarks == (
        "':1.2)' is read as letters, because prompt_weights = \"off\" reads no weights and no BREAK",
    )
    assert read("[a|b] hatsune_miku_(cosplay)", OFF).remarks == ()
    for prompt in ("a BREAK b", "[a] b", "((a))", r"a \(b\)"):
        with pytest.raises(
            EvaluationError, match=r"read as letters, because prompt_weights = \"off\""
        ):
            read(prompt, dataclasses.replace(OFF, prompt_syntax="strict"))


def test_calls_are_counted_as_a1111_counts_them():
    """Its samplers of second order have twice the steps, and both passes are counted so."""
    second = SecondPassConfig(num_steps=7)
    assert counted_calls(LENIENT) == (20, None)
    assert counted_calls(dataclasses.replace(LENIENT, second_pass=second)) == (20, 7)
    doubled = dataclasses.replace(LENIENT, sampler="dpmpp_sde", second_pass=second)
    assert counted_calls(doubled) == (40, 14)
    first, after = read("[a:b:12] [c:d:0.5] [e:f:50] [g:h:1.5]", doubled).passes
    assert [end for end, _ in first] == [12, 20, 40]
    assert [end for end, _ in after] == [7, 10, 14]
    old_first, old_after = read("[a:b:12]", dataclasses.replace(doubled, prompt_times="old")).passes
    assert old_first == old_after == ((12, "a"), (40, "b"))
    read("[a:b:50]", dataclasses.replace(doubled, prompt_syntax="strict"))
    with pytest.raises(
        EvaluationError,
        match="the time 55 lies beyond the last of 40 calls of the UNet and 14 of the",
    ):
        read("[a:b:55]", dataclasses.replace(doubled, prompt_syntax="strict"))


def test_a_set_names_the_prompt_and_tells_of_each_text_once():
    frame = prompt_frame(
        ("p1", "a | b", "bad (x", 32, 32), ("p2", "a", "bad (x", 32, 32), ("p3", "x:2", "", 32, 32),
        ("p4", "a | b", "", 32, 32),
    )  # fmt: skip
    rows = remarks(frame, read_set(frame, LENIENT))
    assert [(row["prompt_id"], row["text"]) for row in rows] == [
        ("p1", "prompt"),
        ("p1", "negative"),
        ("p3", "prompt"),
    ]
    assert "'(' (character 5)" in rows[1]["read as"]
    with pytest.raises(
        EvaluationError, match=r"^prompt 'p1' cannot be drawn: '\|' \(character 3\) .*\"strict\""
    ):
        read_set(frame, STRICT)
    with pytest.raises(
        EvaluationError, match=r"^the negative of prompt 'p2' cannot be drawn: '\(' \(character 5\)"
    ):
        read_set(frame[1:], STRICT)


def test_what_is_shipped_is_strict():
    strict = SamplingConfig(prompt_syntax="strict")
    for name in PROMPT_GROUPS:
        for _, text in group_prompts(name, ()):
            assert is_plain(text)
    for name in ("basic", "drawn", "realistic", "non_adult", "letter_box"):
        assert read(negative_prompt(name), strict, is_negative=True).remarks == ()
    frame = read_prompts(Path(__file__).parents[2] / "demo" / "prompts.csv")
    assert all(is_plain(text) for text in frame["text"])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a cat", True), ("hatsune_miku_(cosplay), 1girl", True), ("a cat: asleep", True), ("1girl, :)", False),
        ("it is 12:30", False), ("SALT AND PEPPER", False), ("[a|b]", False), ("[a:b:0.5]", False),
        ("a (b:1.2)", False), ("|_|", False), ("[signed]", False), ("TAKE A BREAK", False),
    ],
)  # fmt: skip
def test_plain_texts_are_what_every_reader_reads(text, plain):
    assert is_plain(text) == plain


@pytest.fixture
def store(tmp_path):
    """A workspace with a prompt file and no images."""
    (tmp_path / "prompts.csv").write_text(
        'prompt_id,text,height,width\np1,a cat,64,64\np2,"a | b",64,64\n'
    )
    (tmp_path / "foundry.toml").write_text(
        'format = 1\n[encodings.sdxl]\n[prompt_sets.standard]\nfile = "prompts.csv"\n[prompt_sets.other]\n'
        'file = "prompts.csv"\n[evaluation.sampling]\nprompt_syntax = "strict"\n'
    )
    store, empty = Store(tmp_path), pl.DataFrame(schema=TABLES["selected_images"].schema)
    store.writer.commit(
        selection.selected_images, "all", Made(frame=empty), {"inputs": {}, "models": {}}, seconds=0
    )
    return store


def test_a_set_that_cannot_be_drawn_is_refused_when_it_is_made(store):
    with pytest.raises(
        EvaluationError, match=r"^prompt 'p2' cannot be drawn: '\|' \(character 3\)"
    ):
        prompt_sets_asset._make(store, "standard")
    assert prompt_sets_asset._make(store, "other").height == 2  # nothing is drawn of it


def test_elsewhere_refuses_before_it_looks_at_the_checkpoint(tmp_path):
    remote_sampling.write_prompts(
        tmp_path / "prompts.json", prompt_frame(("p1", "a AND b", "", 64, 64)), LENIENT
    )
    with pytest.raises(EvaluationError, match=r"^prompt 'p1' cannot be drawn: 'AND' joins"):
        remote_sampling.draw(tmp_path / "no model", tmp_path / "prompts.json", tmp_path / "out")


def test_recipes_are_strict():
    for path in RECIPES.glob("*.toml"):
        if path.stem != "tiny":
            config = toml.build(
                WorkspaceConfig, tomlkit.parse(recipes.workspace_toml(path, [], tiny=None)).unwrap()
            )
            assert config.evaluation.sampling.prompt_syntax == "strict"


def test_reading_does_not_load_torch():
    code = "import sys, training.sampling.prompt_reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
