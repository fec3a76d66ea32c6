"""The tokenizer that needs no transformers, against transformers' own on the same folder."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import ModelError
from training.models.clip_tokenizer import ClipTokenizer
from training.models.text_encoders import load_tokenizer

BASE = Path(__file__).resolve().parents[2] / "demo" / "models" / "base"
# What CLIP's rules are about: case, white space, endings, digits, other scripts, combining marks,
# special tokens.
TEXTS = [
    "", " ", "A red CAT!!", "it's they've we're I'd", "score_9,  score_8_up\n\t1girl 2024",
    "<|endoftext|> <|StartOfText|>", "!",
    "naïve café e\u0301 ﬁ İstanbul ß", "日本語 한국어 עברית", "😀👍🏽", "a" * 400, "wow! such(detail:1.2)",
    "\x00\u200b", "<|pad|>x",
]  # fmt: skip
PUBLISHED = {
    "0": {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True},
    "-2": {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False,
           "special": True},
    "-1": {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False,
           "special": True},
}  # fmt: skip
"""`added_tokens_decoder` of SDXL's tokenizer_2/tokenizer_config.json; negative ids count from the
vocabulary's end."""


def ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def assert_same(folder, texts):
    ours, theirs = ClipTokenizer.load(folder), load_tokenizer(folder)
    assert ids(ours, texts) == ids(theirs, texts)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.fixture(
    scope="module", params=["pair", "pair as published", "one file", "one file without settings"]
)
def folder(request, tmp_path_factory, clip_tokenizers):
    """SDXL's second tokenizer, which pads with `!`, in each form that folders have."""
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer = clip_tokenizers[1]
    if request.param.startswith("one file"):
        tokenizer.save_pretrained(made)
        if request.param.endswith("settings"):
            (made / "tokenizer_config.json").write_text('{"pad_token": "!"}')
        return made
    tokenizer.backend_tokenizer.model.save(str(made))
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        **special,
    }
    if request.param == "pair":
        options = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        special["bos_token"] = {"content": "<|startoftext|>", **options}
        (made / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    else:
        size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        settings["added_tokens_decoder"] = {
            str(int(key) % size): {**token, "content": token["content"]}
            for key, token in PUBLISHED.items()
        }
        settings["pad_token"] = "!"
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def test_every_form_of_folder_gives_the_librarys_ids(folder):
    assert_same(folder, TEXTS)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_the_demos_tokenizers_give_the_librarys_ids(name):
    assert_same(BASE / name, TEXTS)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_any_text_gives_the_librarys_ids(texts):
    ours, theirs = _loaded()
    assert ids(ours, texts) == ids(theirs, texts)


@functools.cache
def _loaded():
    return ClipTokenizer.load(BASE / "tokenizer_2"), load_tokenizer(BASE / "tokenizer_2")


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither tokenizer.json nor vocab.json and merges.txt"):
        ClipTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not JSON"):
        ClipTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": 7}}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClipTokenizer.load(tmp_path)


def test_it_needs_neither_transformers_nor_torch():
    code = "import sys, training.models.clip_tokenizer; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
