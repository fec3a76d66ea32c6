"""The worked example of docs/prompts.md, made again by the code that it explains."""

from pathlib import Path

import pytest
from prompt_table import table

from training.config.run import PromptConfig
from training.curation.vocabulary import Vocabulary
from training.models.clip_tokenizer import ClipTokenizer
from training.prompts import prompt_statistics
from training.prompts.draws import PerSample
from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "prompts.md").read_text("utf-8")
TAGS = ["1girl", "long_hair", "red_scarf", "outdoors", "snow", ":d"]
CONFIG = PromptConfig(
    mean_tags=4, std_tags=0.0, alias_prob=0.5, caption_prob=0.0, caption_and_tags_prob=0.5
)


@pytest.fixture(scope="module")
def example():
    """The prompt of the page: seed 5, epoch 1."""
    vocabulary = Vocabulary(
        category={tag: "people" if tag == "1girl" else "general" for tag in TAGS},
        aliases={"red_scarf": ("crimson_scarf",)},
    )
    samples = Samples(table([{"tags": TAGS, "caption": "A girl walks through snow", "score": 7}]))
    tokenizer = ClipTokenizer.load(ROOT / "demo" / "models" / "base" / "tokenizer")
    (made,) = PromptMaker(samples, vocabulary, CONFIG, 5, [tokenizer]).make([0], 1)
    return made


def test_the_page_shows_the_prompt_and_its_trace(example):
    assert f"\n{example.text}\n" in PAGE
    assert f"\n{prompt_statistics.trace_line(example)}\n" in PAGE


def test_the_page_shows_the_numbers_that_were_drawn(example):
    draws = example.prompt.block.draws
    for choice in (PerSample.EMPTY, PerSample.KIND, PerSample.SPELLING, PerSample.LOOSE):
        assert f"| {choice.name} | {float(draws.per_sample(choice)[0]):.3f} |" in PAGE


def test_the_page_shows_pieces_and_tokens(example):
    assert " · ".join(f"`{piece}`" for piece in example.prompt.pieces) in PAGE
    ids = example.ids[0][0]
    assert len(ids) == 77
    assert f"{example.num_tokens} tokens" in PAGE
    assert f"BOS {ids[0]}, EOS {ids[1 + example.num_tokens]}" in PAGE
