"""The card says what was counted, advises what was trained, and a hostile tag stays a word."""

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training.config.evaluation import (
    EvaluationConfig,
    LoraConfig,
    SamplingConfig,
    SecondPassConfig,
)
from training.config.run import LossConfig, OptimizerConfig, PromptConfig, RunConfig
from training.curation.vocabulary import Vocabulary
from training.reports import card_facts, card_markdown, model_card
from training.reports.card_advice import prompting, sampling_advice
from training.reports.model_card import Card, Image
from training.tables.schemas import TABLES


def training_set(*samples):
    """Rows of `(height, width, score, tags, caption, split)`; every image of score 9 is safe and
    has a watermark."""
    box = {"y0": 0.0, "x0": 0.0, "y1": 1.0, "x1": 1.0, "confidence": 0.9}
    rows = [
        {"image_id": f"{n:064x}", "shard": "s000000", "height": height, "width": width, "bucket_height": height,
         "bucket_width": width, "score": score, "caption": caption, "split": split, "stable": False,
         "words": ["safe"] if score == 9 else [], "boxes": [box] if score == 9 else [],
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
EVENTS = [
    {
        "event": "started",
        "time_ms": 0,
        "num_trained_parameters": 12_345,
        "num_ranks": 8,
        "device": "cuda:0",
    },
    *(
        {"event": "step", "time_ms": 1_000 * n, "images_per_s": rate}
        for n, rate in ((1, 50.0), (2, 70.0), (3, 71.0))
    ),
    {
        "event": "resumed",
        "time_ms": 9_000_000,
        "num_trained_parameters": 12_345,
        "num_ranks": 8,
        "device": "cuda:0",
    },
    {"event": "finished", "time_ms": 9_000_000 + 7_197_000},
]


def card(rows=SET, verdicts=None, **changes):
    values = {
        "checkpoint": "demo@48000", "base": "stable-diffusion-xl-base-1.0", "family": "sdxl",
        "prediction_type": "epsilon", "license_name": "openrail++", "license_files": ["LICENSE.md"],
        "lineage": {"weights": "d" * 64, "git revision": "abc"}, "training_set": card_facts.count_set(rows),
        "run": RunConfig(encoding="sdxl", prompts=PromptConfig(caption_prob=0.5)),
        "run_facts": card_facts.summarise_run(EVENTS), "evaluation": EvaluationConfig(), "summaries": [],
        "verdicts": TABLES["verdicts"].empty() if verdicts is None else verdicts, "images": [],
    }  # fmt: skip
    return Card(**{**values, **changes})


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_set_is_counted_by_hand():
    facts = card_facts.count_set(SET)
    assert (facts.num_train, facts.num_validation, facts.num_captions, facts.num_watermarked) == (
        3,
        1,
        1,
        1,
    )
    assert facts.buckets == (((64, 64), 2), ((96, 64), 1))
    assert facts.tags == (("cat", 2), ("red", 1))
    assert facts.words == (("safe", 1),)
    assert facts.scores == ((5, 2), (9, 1))


def test_a_tag_counts_once_an_image():
    assert card_facts.count_set(training_set((8, 8, 5, ["cat", "cat"], None, "train"))).tags == (
        ("cat", 1),
    )


def test_an_empty_set_is_counted_as_nothing_and_still_has_a_card():
    facts = card_facts.count_set(SET.clear())
    assert (facts.num_train, facts.buckets, facts.tags, facts.words, facts.scores) == (
        0,
        (),
        (),
        (),
        (),
    )
    assert "0 images for training" in model_card.render(card(SET.clear()))


def test_a_run_is_summed_up_over_its_attempts():
    facts = card_facts.summarise_run(EVENTS)
    assert facts.hours == pytest.approx(2.0)
    assert facts.images_per_s == 70.0
    assert (facts.num_attempts, facts.num_parameters, facts.device) == (2, 12_345, "8 x cuda")
    nothing = card_facts.summarise_run([])
    assert (nothing.hours, nothing.images_per_s, nothing.num_attempts) == (0, None, 0)


def test_the_card_says_what_was_counted():
    text = model_card.render(card())
    assert "# demo\n" in text
    assert "3 images for training, 1 held out" in text
    assert "| 5 | 2 | 66.7% | ████████████████████ |\n| 9 | 1 | 33.3% | ██████████ |" in text
    assert "| safe | 1 | 33.3% |" in text
    assert "| 64 × 64 | 2 | 66.7% |" in text
    assert "cat (2), red (1)" in text
    assert "Not compared with its base model yet." in text
    failed = [
        ("base.0@0", {"num_failed": 1.0}),
        ("demo@5", {"num_failed": 7.0}),
        ("demo@9", {"num_failed": 2.0}),
    ]
    told = model_card.render(card(summaries=failed))
    assert "Not compared with its base model: 3 images have no scores." in told
    assert "| weights | `" + "d" * 64 in text
    assert "| samples seen | `48,000 (16000.0 per image)` |" in text
    # What a clock says would make two equal releases differ.
    assert "hours" not in text
    assert "| averaged weights | `none` |" in text


def test_training_is_told_as_it_was_set():
    run = RunConfig(
        encoding="sdxl", train_text_encoder=False, precision="fp16_amp",
        optimizer=OptimizerConfig(name="lion", learning_rate=4e-5, ema_half_life_samples=5_000),
        loss=LossConfig(noise_offset=0.05),
    )  # fmt: skip
    text = model_card.render(card(run=run))
    for line in (
        "| optimizer | `lion, weight decay 0.1` |", "| peak learning rate | `4e-05 (cosine)` |", "| trained | `UNet` |",
        "| loss | `min_snr, gamma 5, noise offset 0.05` |", "| averaged weights | `half-life 5,000 samples` |",
        "| precision | `fp16_amp` |",
    ):  # fmt: skip
        assert line in text
    assert "learning rate of text encoders" not in text


@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (None, "| peak learning rate of text encoders | `0.0001` |"),
        (1e-5, "`1e-05` |"),
        (0.0, "| trained | `UNet` |"),
    ],
)
def test_the_rate_of_text_encoders_is_told_as_it_is(rate, told):
    run = RunConfig(encoding="sdxl", optimizer=OptimizerConfig(text_encoder_learning_rate=rate))
    text = model_card.render(card(run=run))
    assert told in text
    assert ("of text encoders" in text) == (rate != 0)


def test_front_matter_holds_what_hugging_face_documents():
    images = [Image(file="pictures/1.png", text="a: cat # [x]", negative="dog")]
    images.append(Image(file="2.png", text="é猫🐱", negative=""))
    assert front(model_card.render(card(images=images))) == {
        "license": "openrail++",
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion-xl", "fine-tuned"],
        "widget": [
            {
                "text": "a: cat # [x]",
                "output": {"url": "pictures/1.png"},
                "parameters": {"negative_prompt": "dog"},
            },
            {"text": "é猫🐱", "output": {"url": "2.png"}},
        ],
    }


def test_a_licence_that_hugging_face_does_not_know_is_named_and_linked():
    found = front(
        model_card.render(card(license_name="Fair AI Public License 1.0-SD", base="/my/base"))
    )
    assert (found["license"], found["license_name"]) == ("other", "fair-ai-public-license-1.0-sd")
    assert found["license_link"] == "LICENSE.md"
    assert "base_model" not in found  # only identifiers of the hub may stand there
    assert card_markdown.licence_fields("猫", None) == {
        "license": "other",
        "license_name": "unnamed",
    }


def test_a_missing_licence_text_is_said():
    assert "Its text: [LICENSE\\.md](LICENSE.md)" in model_card.render(card())
    bare = model_card.render(card(license_name="my own", license_files=[]))
    assert "Its text is missing" in bare
    assert "license_link" not in front(bare)


@given(st.text(max_size=80))
def test_front_matter_is_yaml_whatever_it_holds(text):
    written = card_markdown.front_matter({"a": text, "b": [{"c": text}], "left out": None})
    assert yaml.safe_load(written.split("---\n")[1]) == {"a": text, "b": [{"c": text}]}
    assert written.isascii()


ADVICE = {
    "mean_tags": (0.0, "training prompts had all tags of their image"),
    "order": ("kohaku", "in this order: people, character"),
    "caption_prob": (0.25, "25% of the captioned images"),
    "caption_and_tags_prob": (0.125, "a sentence and then tags: 12%"),
    "first_tags": (("photo_(medium)",), r"where they apply: photo\_\(medium\)"),
    "max_chunks": (1, "Prompts of up to 75 tokens."),
    "alias_prob": (0.5, "50% of the tags that have some"),
    "empty_as": ("zeros", "zeros in place of its encoding"),
    "empty_prob": (0.3, "30% of the prompts were empty"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_follows_the_recipe(name):
    value, sentence = ADVICE[name]
    facts = card_facts.count_set(SET)
    assert sentence in "\n".join(prompting(PromptConfig(**{name: value}), facts))
    assert sentence not in "\n".join(prompting(PromptConfig(), facts))


def test_advice_follows_the_training_set():
    plain = "\n".join(prompting(PromptConfig(), card_facts.count_set(SET)))
    assert "`score_9` or `score_7_up`" in plain
    assert "negative prompt: `score" not in plain
    assert "Parentheses" not in plain
    rows = training_set((8, 8, 2, ["watermark", "letterboxed", "photo_(medium)"], None, "train"))
    advice = "\n".join(prompting(PromptConfig(caption_prob=0.5), card_facts.count_set(rows)))
    assert "In the negative prompt: `score_2`." in advice
    assert "`score_2_up`" in advice
    assert "In the negative prompt as well: watermark, letterboxed." in advice
    assert r"photo\_\\\(medium\\\)" in advice
    assert "Sentences" not in advice
    assert "score_" not in "\n".join(
        prompting(PromptConfig(score_tags=False), card_facts.count_set(SET))
    )


def test_samplers_are_named_with_all_that_made_the_images():
    config = SamplingConfig(
        sampler="euler_a", schedule="exponential", num_steps=28, guidance_scale=7.5, pag_scale=3.0, weights="ema",
        second_pass=SecondPassConfig(scale=1.5, strength=0.4),
        loras=(LoraConfig(path="x/style_1.safetensors", weight=0.7),),
    )  # fmt: skip
    drawn = sampling_advice(config, "sd1")
    assert len(drawn) == 1
    assert drawn[0].startswith(
        "Euler a Exponential, 28 steps, guidance 7.5, perturbed-attention guidance 3, a second pass"
    )
    assert r"LoRA style\_1 at 0.7" in drawn[0]
    assert "averaged weights" in drawn[0]
    assert "Avoid the plain one" in sampling_advice(SamplingConfig(), "sdxl")[1]


def test_what_uis_must_be_told_is_told():
    run = RunConfig(encoding="sd1", clip_skip=2, prediction_type="v_prediction", loss=LossConfig(weighting="plain"),
                    zero_terminal_snr=True)  # fmt: skip
    text = model_card.render(card(run=run, prediction_type="v_prediction", family="sd1"))
    assert "Clip skip 2" in text
    assert "predicts v with zero terminal SNR" in text
    assert "predicts v" not in model_card.render(card())


def test_tags_stand_in_bands():
    facts = card_facts.count_set(SET)
    many = (*tuple((f"t{n}", 5000 - n) for n in range(150)), ("middle", 999), ("rare", 99))
    changed = {name: getattr(facts, name) for name in facts.__slots__} | {"tags": many}
    text = model_card.render(card(training_set=card_facts.SetFacts(**changed)))
    assert "t99 (4,901), and 50 more" in text
    assert "t100 " not in text
    assert "**With emphasis (100 to 999), such as `(tag:1.5)`:** middle (999)" in text
    assert "**Weak (fewer than 100):** rare (99)" in text
    assert [card_facts.band(count) for count in (1000, 100, 99)] == [
        "reliable",
        "with emphasis",
        "weak",
    ]


def test_all_tags_are_listed_with_category_band_and_aliases():
    words = Vocabulary(category={"cat": "character"}, aliases={"cat": ("kitty", 'to"m')})
    assert card_facts.tags_csv(card_facts.count_set(SET), words) == (
        'tag,category,images,band,aliases\ncat,character,2,weak,"kitty, to""m"\nred,general,1,weak,\n'
    )


VERDICT = {
    "metric": "clip_score", "group": "all", "a": "base.abc@0", "b": "demo@48000", "num_prompts": 50, "mean_a": 0.2,
    "mean_b": 0.3, "difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "p_holm": 0.02, "margin": 0.003,
    "win_rate": 0.7, "verdict": "better", "num_needed": None,
}  # fmt: skip


def test_verdicts_are_sentences_and_the_summary_has_the_guide_s_columns():
    summary = {"count_LAIONScore": 50.0, "Clipscore_mean": 0.25, "num_failed": 3.0}
    text = model_card.render(
        card(
            verdicts=pl.DataFrame([VERDICT], schema=TABLES["verdicts"].schema),
            summaries=[("base.abc@0", summary), ("demo@48000", {**summary, "Clipscore_mean": 0.3})],
        )
    )
    assert (
        r"- clip\_score \(all\)\: better, \+0\.1000 \[\+0\.0500, \+0\.1500\] over 50 prompts"
        in text
    )
    assert "|  | base | demo@48000 |" in text
    assert "| `count_LAIONScore` | 50 | 50 |" in text
    assert "| `Clipscore_mean` | 0.2500 | 0.3000 |" in text
    assert "| `skew_LAIONScore` | – | – |" in text


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
    images = [Image(file="1.png", text=text, negative="") for text in HOSTILE]
    text = model_card.render(
        card(rows, base=HOSTILE[1], images=images, summaries=[(HOSTILE[0], {})])
    )
    html = (
        markdown.MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(text.split("---\n", 2)[2])
    )
    assert 'href="http' not in html
    assert html.count("<img") == len(HOSTILE)  # the card's own images
    assert "<em>" not in html
    for tag in HOSTILE:
        shown = (
            " ".join(tag.split())
            .replace("&", "&amp;")
            .replace("<", "&lt;")
            .replace(">", "&gt;")
            .replace('"', "&quot;")
        )
        assert f"{shown} (1)" in html
        assert f"<td>{shown}</td>" in html


@given(st.text(max_size=60))
def test_escaped_text_is_one_line_without_active_markup(text):
    shown = card_markdown.escape(text)
    assert "\n" not in shown
    assert "<" not in shown
    for place, letter in enumerate(shown):
        if letter in "`*_[]()|#$":
            assert shown[place - 1] == "\\"
