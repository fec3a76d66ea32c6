"""Sentences and lists of tags as people and tools write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.sources import wording

SENTENCES = [
    "A girl with long hair and blue eyes wears a red dress in a sunny garden.",
    "A photo of my_dog sitting in front of a small red house with a green door.",
    "A photo of the user sks_dog sitting in front of a small red house.",
    "A girl with a happy ^_^ face stands in a garden full of flowers.",
    "A girl with a happy ^_^ face stands in a garden full of flowers and looks up.",
    "a happy ^_^ girl",
    "sks, a photo of a dog on the beach, the sea behind it is calm",
    "sks_dog, a photo of a dog on the beach",
    "The image shows a dog.",
    "In the background, there is a red house with a green door, and some trees.",
    "a {red|blue|green} star on a wall",
    "there is a dog on the beach with a ball",
    "1girl standing, in the rain at night.",
    "Ein roter Stern steht vor einer Wand.",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u661f\u661f\u5728\u84dd\u8272\u7684\u80cc\u666f\u4e0a\u3002",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u661f\u661f\u5728\u84dd\u8272\u7684\u80cc\u666f\u4e0a",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u661f\u661f\u5728\u84dd\u8272\u7684\u80cc\u666f\u4e0a\uff0c\u65c1\u8fb9\u6709\u4e00\u4e2a\u5706\u3002",
    "\u8d64\u3044\u661f\u304c\u58c1\u306e\u524d\u306b\u3042\u308a\u307e\u3059\u3002",
    "\u0e14\u0e32\u0e27\u0e2a\u0e35\u0e41\u0e14\u0e07\u0e2d\u0e22\u0e39\u0e48\u0e2b\u0e19\u0e49\u0e32\u0e01\u0e33\u0e41\u0e1e\u0e07\u0e2a\u0e35\u0e02\u0e32\u0e27\u0e43\u0e2b\u0e0d\u0e48",
]
LISTS = {
    "1girl, long_hair, blue_eyes, red_dress": ["1girl", "long_hair", "blue_eyes", "red_dress"],
    "1girl, long hair, blue eyes": ["1girl", "long hair", "blue eyes"],
    "red_star blue_circle long_hair 1girl": ["red_star", "blue_circle", "long_hair", "1girl"],
    "1girl solo smile saber_(fate)": ["1girl", "solo", "smile", "saber_(fate)"],
    "red_star": ["red_star"],
    "red star": ["red star"],
    "^_^, o_o, !?": ["^_^", "o_o", "!?"],
    "red_star, solo, looking at the viewer.": ["red_star", "solo", "looking at the viewer"],
    "1girl, solo, smile, long hair, sword, the legend of zelda: breath of the wild":
        ["1girl", "solo", "smile", "long hair", "sword", "the legend of zelda: breath of the wild"],
    "\u7ea2\u8272\u661f\u661f\uff0c\u84dd\u8272\u80cc\u666f\uff0c\u5706\u5f62":
        ["\u7ea2\u8272\u661f\u661f", "\u84dd\u8272\u80cc\u666f", "\u5706\u5f62"],
    "\u7d05\u3044\u661f\u3001\u9752\u3044\u4e38\uff0c\u72ac": ["\u7d05\u3044\u661f", "\u9752\u3044\u4e38", "\u72ac"],
    "\u957f\u53d1": ["\u957f\u53d1"],
    "": [],
    " , ,": [],
}  # fmt: skip


@pytest.mark.parametrize("line", SENTENCES)
def test_a_sentence_is_one(line):
    assert wording.reads_as_sentence(line)


@pytest.mark.parametrize(("line", "tags"), LISTS.items())
def test_a_list_is_one_and_holds_its_tags(line, tags):
    assert not wording.reads_as_sentence(line)
    assert wording.split_tags(line) == tags


names = st.from_regex(r"[a-z]{2,8}(_[a-z]{2,8}){1,3}", fullmatch=True)


@given(
    tags=st.lists(names, min_size=1, max_size=30),
    separator=st.sampled_from([", ", ",", " ", "  ", "\uff0c"]),
)
def test_underscored_names_are_a_list_however_they_are_parted(tags, separator):
    line = separator.join(tags)
    assert not wording.reads_as_sentence(line)
    assert wording.split_tags(line) == tags


@given(st.text(max_size=200))
def test_no_line_is_too_odd(line):
    assert isinstance(wording.reads_as_sentence(line), bool)
    assert all(name and name == name.strip() for name in wording.split_tags(line))
