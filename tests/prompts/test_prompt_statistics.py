"""Statistics count what the model sees, warn of what is odd, and measure what people write."""

from types import SimpleNamespace

import numpy as np
import pytest

from training.config.run import PromptConfig
from training.errors import DataError
from training.prompts import prompt_statistics
from training.prompts.maker import MadePrompt
from training.tables.schemas import TABLES


def made(num_tokens, num_chunks, kept=None, **trace):
    tokens = np.zeros(num_tokens if kept is None else kept, dtype=np.int32)
    ids = (np.zeros((num_chunks, 77), dtype=np.int64),)
    return MadePrompt(
        prompt=SimpleNamespace(trace=trace), tokens=tokens, ids=ids, num_tokens=num_tokens
    )


def tagged(*names, score_tags=(), **changes):
    return {
        "kind": "tags", "num_tags": len(names), "wanted": len(names), "tags": list(names),
        "score_tags": list(score_tags),
        "spelling": "spaces", "loose": False, "aliases": {}, "misspelled": {}, "dropped": [], **changes,
    }  # fmt: skip


SEEN = [
    made(0, 1, kind="empty", **{"as": "string"}),
    made(75, 1, kind="caption", caption="made", line=0),
    made(76, 2, **tagged("a", "b", score_tags=["score_7"])),
    made(500, 3, 220, **tagged("a", spelling="mixed")),
]


def test_statistics_count_what_the_model_sees():
    found = prompt_statistics.statistics(SEEN)
    assert found.schema == TABLES["prompt_statistics"].schema
    assert {(s, k): c for s, k, c in found.rows()} == {
        ("kind", "empty"): 1, ("kind", "caption"): 1, ("kind", "tags"): 2, ("num_tags", "2"): 1, ("num_tags", "1"): 1,
        ("num_tokens", "0"): 1, ("num_tokens", "75"): 1, ("num_tokens", "76"): 1, ("num_tokens", "500"): 1,
        ("num_chunks", "1"): 2, ("num_chunks", "2"): 1, ("num_chunks", "3"): 1, ("num_truncated", "280"): 1,
        ("tag", "a"): 2, ("tag", "b"): 1, ("tag", "score_7"): 1, ("caption", "made"): 1, ("spelling", "spaces"): 1,
        ("spelling", "mixed"): 1,
    }  # fmt: skip
    assert sorted(prompt_statistics.histogram_of(found, "num_chunks")) == [1, 1, 2, 3]


def test_the_mix_of_lengths_is_held_against_the_wanted_one():
    found = prompt_statistics.statistics(SEEN)
    wanted = PromptConfig(chunk_shares=(0.5, 0.5))
    assert prompt_statistics.chunk_mix(found, wanted) == [
        ("75", 0.5, 0.5),
        ("150", 0.25, 0.5),
        ("225", 0.25, 0.0),
    ]
    assert prompt_statistics.chunk_mix(found, PromptConfig()) == [
        ("75", 0.5, 0.5), ("150", 0.25, 0.25), ("225", 0.25, 0.25),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "config", "said"),
    [
        (SEEN, PromptConfig(), "25.0% of prompts are cut"),
        (SEEN[:1], PromptConfig(caption_prob=0.5), "no sample has one"),
        (SEEN[:1], PromptConfig(empty_prob=0), "empty_prob is 0"),
        (SEEN[2:3], PromptConfig(), "2.0 tags on average, asked for are 32"),
        ([made(0, 1, **tagged())], PromptConfig(mean_tags=0), "100.0% of prompts say nothing"),
        (
            SEEN,
            PromptConfig(chunk_shares=(0.5, 0.5)),
            "25% of prompts have 150 tokens, asked for are 50%",
        ),
    ],
)
def test_what_is_odd_is_said(prompts, config, said):
    lines = prompt_statistics.warnings(prompt_statistics.statistics(prompts), config)
    assert [line for line in lines if said in line]


def test_nothing_odd_is_no_warning():
    good = [made(60, 1, **tagged(*(f"t{number}" for number in range(32))))] * 9
    assert prompt_statistics.warnings(prompt_statistics.statistics(good), PromptConfig()) == []


def test_lengths_of_peoples_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a, b, c\n\nlong hair,,\n , \nd,e\n", encoding="utf-8")
    # 3, 1 and 2 tags.
    assert prompt_statistics.fit_lengths(path) == (2, 1)
    path.write_text("only one", encoding="utf-8")
    with pytest.raises(DataError, match="1 lines have a tag, must be 2"):
        prompt_statistics.fit_lengths(path)
    path.write_bytes(b"a,b\n\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        prompt_statistics.fit_lengths(path)
    with pytest.raises(DataError, match="No such file"):
        prompt_statistics.fit_lengths(tmp_path / "absent")


def test_a_trace_is_one_line():
    lines = [prompt_statistics.trace_line(one) for one in SEEN]
    assert lines == [
        "empty as string; 0 tokens in 1 chunks",
        "caption; made caption, line 1; 75 tokens in 1 chunks",
        "tags; 2 tags of 2 wanted, spaces; 76 tokens in 2 chunks",
        "tags; 1 tags of 1 wanted, mixed; 500 tokens in 3 chunks, 280 cut off",
    ]
    odd = tagged("a", aliases={"a": "b"}, misspelled={"c": "cc"}, dropped=["d"], loose=True)
    assert "loose separators; a as b; c as cc; without d" in prompt_statistics.trace_line(
        made(3, 1, **odd)
    )
