"""What a sample's prompt says in one epoch: bigASP's recipe, with a trace of every choice.

A pure function of the sample, the recipe and the generator, which the caller keys by (epoch, image_id).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from training.data.tables import TABLES
from training.data.tokens import count_chunks
from training.run_config import PromptConfig

WATERMARK = "watermark"
"""The tag that is always in a prompt whose image has one."""
_MAX_SCORE_TAGS = 3
_SHORT_TAG = 3
"""Tags of at most this many characters are faces (o_o, ^_^) and keep their underscore. Kohaku's rule."""


def make_prompt(sample: Mapping[str, Any], config: PromptConfig, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The prompt of one sample.

    In order: the empty string with `empty_prob`; the caption with `caption_prob` when there is one (always when
    there is nothing else); else tags: their number from a normal distribution, at least 1, a uniform choice of
    so many of the image's tags and words, the watermark's always in, shuffled; one to three of `score_1_up` …
    `score_N_up`, `score_N` before them; spaces for underscores with `spaces_prob`, in the whole prompt.

    Args:
        sample: tags (rows of TAG), words, caption, score and watermark boxes, as in `training_set`.
        config: The recipe.
        rng: Draws everything.

    Returns:
        The prompt, and a trace: kind (empty, caption or tags), and for tags also num_tags, tags, score_tags
        (canonical names in the order of the prompt) and spaces.

    Source: bigASP v1's page and data.py; it floors the number of tags at 5, its page names no floor.
    """
    if rng.random() < config.empty_prob:
        return "", {"kind": "empty"}
    names = {tag["name"] for tag in sample["tags"]} | set(sample["words"])
    if sample["boxes"]:
        names.add(WATERMARK)
    caption = sample["caption"]
    use_caption = rng.random() < config.caption_prob
    if caption and (use_caption or not names):
        return caption, {"kind": "caption"}
    tags = _choose_tags(names, config, rng)
    score_tags = _choose_score_tags(sample["score"], rng) if config.score_tags else []
    spaces = rng.random() < config.spaces_prob
    written = [_write(name, spaces) for name in (*score_tags, *tags)]
    trace = {"kind": "tags", "num_tags": len(tags), "tags": tags, "score_tags": score_tags, "spaces": spaces}
    return ", ".join(written), trace


def _choose_tags(names: set[str], config: PromptConfig, rng: random.Random) -> list[str]:
    wanted = max(1, int(rng.gauss(config.mean_tags, config.std_tags)))
    always = names & {WATERMARK}
    others = sorted(names - always)
    count = min(max(wanted, len(always)), len(names)) - len(always)
    chosen = [*always, *rng.sample(others, count)]
    rng.shuffle(chosen)
    return chosen


def _choose_score_tags(score: int | None, rng: random.Random) -> list[str]:
    """One to three of `score_1_up` to `score_N_up` and `score_N`, so that each alone comes to mean something."""
    if not score:
        return []
    candidates = [*(f"score_{step}_up" for step in range(1, score + 1)), f"score_{score}"]
    return rng.sample(candidates, rng.randint(1, min(_MAX_SCORE_TAGS, len(candidates))))


def _write(name: str, spaces: bool) -> str:
    return name.replace("_", " ") if spaces and len(name) > _SHORT_TAG else name


def statistics(traces: Sequence[Mapping[str, Any]], token_counts: Sequence[int], max_chunks: int) -> pl.DataFrame:
    """What the model will see: counts over prompts.

    Args:
        traces: Second results of `make_prompt`.
        token_counts: Tokens of each prompt, without BOS, EOS and pads.
        max_chunks: Chunks of 75 tokens at most.

    Returns:
        `prompt_statistics`: kind, num_tags (of tag prompts), num_tokens, num_chunks, and tag (also score tags).
    """
    counts: Counter[tuple[str, str]] = Counter()
    for trace, num_tokens in zip(traces, token_counts, strict=True):
        counts["kind", trace["kind"]] += 1
        counts["num_tokens", str(num_tokens)] += 1
        counts["num_chunks", str(count_chunks(num_tokens, max_chunks))] += 1
        if trace["kind"] == "tags":
            counts["num_tags", str(trace["num_tags"])] += 1
            counts.update(("tag", name) for name in (*trace["score_tags"], *trace["tags"]))
    rows = [(statistic, key, count) for (statistic, key), count in counts.items()]
    table = TABLES["prompt_statistics"]
    return table.conform(pl.DataFrame(rows, schema=table.schema, orient="row"))
