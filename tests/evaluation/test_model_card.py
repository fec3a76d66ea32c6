"""The card counts right, and a hostile tag stays a word."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.geometry import Size
from training.data.tables import TABLES
from training.evaluation import model_card
from training.evaluation.model_card import Card
from training.evaluation_config import EvaluationConfig
from training.run_config import PromptConfig, RunConfig


def training_set(*samples):
    """Rows of `(height, width, score, tags, caption, split)`."""
    rows = [
        {"image_id": f"{n:064x}", "shard": "s000000", "height": height, "width": width, "bucket_height": height,
         "bucket_width": width, "score": score, "caption": caption, "words": [], "boxes": [], "split": split,
         "stable": False,
         "tags": [{"name": tag, "category": "general"} for tag in tags]}
        for n, (height, width, score, tags, caption, split) in enumerate(samples)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=TABLES["training_set"].schema)


SET = training_set(
    (64, 64, 5, ["cat", "red"], "a red cat", "train"),
    (64, 64, 9, ["cat"], None, "train"),
    (96, 64, 5, [], None, "train"),
    (64, 96, 1, ["dog"], "a dog", "validation"),
)


def card(rows=SET, verdicts=None, **changes):
    values = {
        "checkpoint": "demo@48000", "digest": "d" * 64, "base": "stable-diffusion-xl-base-1.0", "base_digest": "b" * 64,
        "family": "sdxl", "license_name": "openrail++", "fingerprint": "f" * 64,
        "training_set": model_card.count_set(rows),
        "run": RunConfig(encoding="sdxl", prompts=PromptConfig(caption_prob=0.5)), "evaluation": EvaluationConfig(),
        "verdicts": TABLES["verdicts"].empty() if verdicts is None else verdicts,
    }  # fmt: skip
    return Card(**{**values, **changes})


def test_a_set_is_counted_by_hand():
    facts = model_card.count_set(SET)
    assert (facts.num_train, facts.num_validation, facts.num_captions) == (3, 1, 1)
    assert facts.buckets == ((Size(64, 64), 2), (Size(96, 64), 1))
    assert facts.tags == (("cat", 2), ("red", 1))
    assert facts.scores == ((5, 2), (9, 1))


def test_an_empty_set_is_counted_as_nothing():
    facts = model_card.count_set(SET.clear())
    assert facts == model_card.SetFacts(num_train=0, num_validation=0, num_captions=0, buckets=(), tags=(), scores=())


def test_the_card_says_what_was_counted():
    text = model_card.render(card())
    front = text.split("---\n")[1]
    assert 'license: "openrail++"\nbase_model: "stable-diffusion-xl-base-1.0"\n' in front
    assert "# demo\n" in text
    assert "3 images for training, 1 held out" in text
    assert "Images by quality score (9 is best): 5: 2, 9: 1." in text
    assert "| 64 × 64 | 2 |" in text
    assert "cat (2), red (1)" in text
    assert "`score_9`" in text
    assert "Sentences work too: 50%" in text
    assert "Sampler DPM++ 2M Karras, 30 steps, guidance 6" in text
    assert "Not compared with its base model yet." in text
    assert "| weights | " + "d" * 64 in text


def test_tags_stand_in_bands():
    facts = model_card.count_set(SET)
    many = (*tuple((f"t{n}", 5000 - n) for n in range(150)), ("middle", 500), ("rare", 3))
    text = model_card.render(
        card(
            training_set=model_card.SetFacts(
                **{name: getattr(facts, name) for name in facts.__slots__} | {"tags": many}
            )
        )
    )
    assert "t99 (4,901), and 50 more" in text
    assert "t100 " not in text
    assert "**With emphasis (100 to 999):** middle (500)" in text
    assert "**Weak (fewer than 100):** rare (3)" in text


def test_verdicts_are_sentences():
    row = {
        "metric": "clip_score", "group": "all", "a": "base.abc@0", "b": "demo@48000", "num_prompts": 50, "mean_a": 0.2,
        "mean_b": 0.3, "difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "p_holm": 0.02, "margin": 0.003,
        "win_rate": 0.7, "verdict": "better", "num_needed": None,
    }  # fmt: skip
    text = model_card.render(card(verdicts=pl.DataFrame([row], schema=TABLES["verdicts"].schema)))
    assert r"- clip\_score \(all\)\: better, \+0\.1000 \[\+0\.0500, \+0\.1500\] over 50 prompts" in text


HOSTILE = [
    "[x](http://evil)",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "`c`\n\n# head",
    "![i](data:x)",
    "*b* _u_ ~s~",
    "http://evil.example",
    "&lt;b&gt;",
]


def test_a_hostile_tag_stays_a_word():
    markdown = pytest.importorskip("markdown_it")
    rows = training_set((64, 64, 5, HOSTILE, None, "train"))
    html = (
        markdown.MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(model_card.render(card(rows, base=HOSTILE[1])).split("---\n", 2)[2])
    )
    assert "<a " not in html
    assert "<img" not in html
    assert "<em>" not in html
    for tag in HOSTILE:
        shown = (
            " ".join(tag.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
        )
        assert f"{shown} (1)" in html


@given(st.text(max_size=60))
def test_escaped_text_is_one_line_without_active_markup(text):
    shown = model_card.escape(text)
    assert "\n" not in shown
    assert "<" not in shown
    for place, letter in enumerate(shown):
        if letter in "`*_[]()|#":
            assert shown[place - 1] == "\\"
