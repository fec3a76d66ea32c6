"""Weights in prompts: read as the UIs read them, on the tokens of the same prompt without marks."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_sampling import encoder_of, latents_of, prompt_frame

from training.errors import EvaluationError
from training.models.tokens import tokenize, tokenize_sections
from training.models.unet import load_pipeline_parts
from training.sampling.prompt_weights import apply_weights, read_text, token_weights, unread_marks


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    return load_pipeline_parts(tiny_sdxl, "cpu")


def pieces(prompt):
    """Runs of equal weight as `[(text, weight)]`, to four digits."""
    return [(text, round(weight, 4)) for text, weight in read_text(prompt, "plain").runs]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((tag))", [("tag", 1.21)]),
        ("(tag:1.5), x", [("tag", 1.5), (", x", 1)]),
        ("[tag]", [("tag", 0.9091)]),
        ("[[tag]]", [("tag", 0.8264)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("([x])", [("x", 1)]),
        (r"hat \(blue\), (hat \(red\):1.3)", [("hat (blue), ", 1), ("hat (red)", 1.3)]),
        (r"\[x\] a\\b \m", [(r"[x] a\b m", 1)]),
        ("time 10:30, a: b", [("time 10:30, a: b", 1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:.5) (b:2.)", [("a", 0.5), (" ", 1), ("b", 2)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:1e1)", [("a:1e1", 1.1)]),
        # What is opened and never closed reaches to the end; what is closed and never opened is a
        # letter.
        ("x (y", [("x ", 1), ("y", 1.1)]),
        ("x [y (z", [("x ", 1), ("y ", 0.9091), ("z", 1)]),
        ("x) y] :1) z", [("x) y] :1) z", 1)]),
        (":) (smile:2)", [(":) ", 1), ("smile", 2)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        # What looks like a schedule and is none only weakens.
        ("[re:zero:fate:0.5]", [("re:zero:fate:0.5", 0.9091)]),
        ("[a:b:+5]", [("a:b:+5", 0.9091)]),
        ("[a|b]", [("a|b", 0.9091)]),
        # BREAK is a mark of weight -1 with nothing but what stands before and behind it.
        ("a cat  BREAK a dog", [("a cat", 1), ("BREAK", -1), ("a dog", 1)]),
        ("aBREAK b, BREAKER", [("aBREAK b, BREAKER", 1)]),
        ("(a BREAK b:1.2)", [("a", 1.2), ("BREAK", -1.2), ("b", 1.2)]),
        ("a BREAK BREAK", [("a", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("", 1)]),
    ],
)
def test_marks_are_read_as_the_uis_read_them(prompt, wanted):
    assert pieces(prompt) == wanted


@given(text=st.text(alphabet="ab ()[]\\:.1,", max_size=30))
def test_off_and_escaped_texts_are_literal(text):
    assert read_text(text, "off").runs == ((text, 1.0),)
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)
    assert read_text(escaped, "plain").runs == ((text, 1.0),)


tree = st.recursive(
    st.text(alphabet="abc ,_", max_size=6).map(
        lambda text: (text, [(letter, 1.0) for letter in text])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(
            lambda items: (
                "".join(text for text, _ in items),
                [pair for _, letters in items for pair in letters],
            )
        ),
        inner.map(lambda i: (f"({i[0]})", [(letter, weight * 1.1) for letter, weight in i[1]])),
        inner.map(lambda i: (f"[{i[0]}]", [(letter, weight / 1.1) for letter, weight in i[1]])),
        st.tuples(inner, st.sampled_from([0.5, 1.25, 2.0])).map(
            lambda pair: (
                f"({pair[0][0]}:{pair[1]})",
                [(letter, weight * pair[1]) for letter, weight in pair[0][1]],
            )
        ),
    ),
    max_leaves=8,
)


@given(tree)
def test_weights_multiply_however_they_nest(built):
    prompt, letters = built
    (read,) = read_text(prompt, "plain").sections
    assert read.text == "".join(letter for letter, _ in letters)
    assert read.weights == pytest.approx([weight for _, weight in letters])


@pytest.mark.parametrize("weight", ["1.2.3", ".", "+.", "1..", "..5"])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(
        EvaluationError,
        match=rf"':{re.escape(weight)}\)': the weight {re.escape(weight)} is no number",
    ):
        read_text(f"a (b:{weight})", "plain")
    assert read_text(f"b:{weight})", "plain").runs == (
        (f"b:{weight})", 1.0),
    )  # no bracket, no weight


def test_a_break_parts_sections_and_one_in_brackets_is_a_word():
    read = read_text("(a:2) b BREAK (c BREAK d:1.5) BREAK", "plain")
    assert read.num_words == 1
    assert [section.text for section in read.sections] == ["a b", "cBREAKd", ""]
    assert read.sections[0].weights == (2.0, 1.0, 1.0)
    assert read.sections[1].weights == (1.5, *[-1.5] * 5, 1.5)
    assert read_text("a BREAK b", "off").sections[0].text == "a BREAK b"


def test_marks_that_off_reads_as_letters_are_found():
    assert unread_marks("hatsune_miku_(cosplay), :), x") == []
    assert unread_marks(r"(a:1.2) (b: .5 ) [c] ((d)) \(e\) BREAK, (f:1.2)") == [
        ":1.2)", ": .5 )", "[", "((", r"\(", r"\)", "BREAK",
    ]  # fmt: skip


def test_tokens_are_those_of_the_prompt_without_marks(parts):
    for tokenizer in parts.tokenizers:
        (prompt,) = read_text(
            "a (r)ed  (CAT, hat \\(x\\):1.5) [é猫] " + "(z:2)" * 80, "plain"
        ).sections
        assert prompt.text == "a red  CAT, hat (x) é猫 " + "z" * 80
        (tokens,) = tokenize([prompt.text], tokenizer, min_chunks=2)
        weights = token_weights([[prompt]], tokenizer, 2)
        assert weights.shape == (1, 2, 77)
        # The tiny tokenizer has a token per byte, so each character's bytes carry its weight.
        per_token = [
            weight
            for letter, weight in zip(prompt.text, prompt.weights, strict=True)
            if letter != " "
            for _ in letter.encode()
        ]
        assert tokens.num_tokens == len(per_token)
        inner = weights[0, :, 1:76].ravel()
        assert inner.tolist() == pytest.approx((per_token + [1.0] * 150)[:150])
        assert (weights[0, :, [0, 76]] == 1).all()


def test_sections_have_chunks_of_their_own_with_their_weights(parts):
    for tokenizer in parts.tokenizers:
        sections = read_text("(ab:2) c BREAK" + " z" * 80 + " BREAK (d:3)", "plain").sections
        (tokens,) = tokenize_sections(
            [[section.text for section in sections]], tokenizer, max_chunks=4
        )
        alone = [tokenize([section.text], tokenizer)[0] for section in sections]
        assert tokens.ids == tuple(itertools.chain.from_iterable(one.ids for one in alone))
        weights = token_weights([sections], tokenizer, 4)[0]
        assert weights[:, :5].tolist() == [[1, 2, 2, 1, 1], [1] * 5, [1] * 5, [1, 3, 1, 1, 1]]
        assert (weights[:, 5:] == 1).all()


def test_each_token_is_multiplied_and_the_mean_restored():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn((2, 2 * 77, 6), generator=rng) + 0.3
    weights = torch.ones((2, 2, 77))
    weights[0, 1, 5:9], weights[1, 0, 3] = 1.7, 0.2
    plain = apply_weights(states, weights, restore_mean=False).numpy()
    wanted = states.numpy() * weights.numpy().reshape(2, 154, 1)
    np.testing.assert_allclose(plain, wanted, rtol=1e-6)
    restored = apply_weights(states, weights, restore_mean=True).numpy()
    for row in range(2):
        for chunk in range(2):
            part = np.s_[row, chunk * 77 : (chunk + 1) * 77]
            factor = states.numpy()[part].mean() / wanted[part].mean()
            np.testing.assert_allclose(restored[part], wanted[part] * factor, rtol=1e-5)
            assert restored[part].mean() == pytest.approx(states.numpy()[part].mean(), rel=1e-5)
    assert np.array_equal(
        restored[0, :77], states.numpy()[0, :77]
    )  # a chunk without weights stays as it is


def encoded(parts, text, mode, negative=""):
    frame = prompt_frame(("a", text, negative, 32, 32))
    (shown,) = encoder_of(parts, frame, prompt_weights=mode).encode([negative], [text])
    return shown.at(0)


def test_each_encoder_has_its_own_mean_and_the_pooled_text_no_weights(parts):
    text, marked = "red cat, tree " * 8, "red (cat:1.5), tree " + "red cat, tree " * 7
    plain, off = encoded(parts, marked, "plain"), encoded(parts, text, "off")
    restored = encoded(parts, marked, "mean_restored")
    assert plain.hidden_states.shape == off.hidden_states.shape == (2, 2 * 77, 24)
    assert torch.equal(plain.pooled, off.pooled)
    assert torch.equal(restored.pooled, off.pooled)
    ratio = plain.hidden_states[1] / off.hidden_states[1]
    assert (ratio[4:7] - 1.5).abs().max() < 1e-5  # c, a, t
    assert (torch.cat([ratio[:4], ratio[7:]]) - 1).abs().max() < 1e-5
    for columns in (slice(0, 8), slice(8, 24)):
        factor = restored.hidden_states[1, :77, columns] / plain.hidden_states[1, :77, columns]
        mean = (
            off.hidden_states[1, :77, columns].mean() / plain.hidden_states[1, :77, columns].mean()
        )
        torch.testing.assert_close(factor, mean.expand_as(factor), rtol=1e-4, atol=0)
    assert torch.equal(restored.hidden_states[0], off.hidden_states[0])  # the negative is empty


def test_negatives_have_weights_too(parts):
    plain, off = encoded(parts, "cat", "plain", "(ugly:1.4)"), encoded(parts, "cat", "off", "ugly")
    ratio = plain.hidden_states[0] / off.hidden_states[0]
    assert (ratio[1:5] - 1.4).abs().max() < 1e-5
    assert torch.equal(plain.hidden_states[1], off.hidden_states[1])


def test_images_follow_the_mode(parts):
    frame = prompt_frame(("a", "red (cat:1.5)", "", 32, 32))
    off, plain, restored = (
        latents_of(parts, frame, prompt_weights=m) for m in ("off", "plain", "mean_restored")
    )
    assert (off - plain).abs().max() > 1e-4
    assert (plain - restored).abs().max() > 1e-4
    unmarked = prompt_frame(("a", "red cat", "", 32, 32))
    assert torch.equal(
        latents_of(parts, unmarked, prompt_weights="mean_restored"), latents_of(parts, unmarked)
    )
