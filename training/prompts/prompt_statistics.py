"""What a model will really read, counted over the prompts of an epoch before a GPU-hour is spent on
them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import polars as pl

from training.config.run import PromptConfig
from training.errors import DataError
from training.models.tokens import CHUNK_TOKENS
from training.prompts.maker import MadePrompt
from training.tables.schemas import TABLES

_MANY_TRUNCATED = 0.01
_MIX_OFF = 0.1
"""Shares from which a warning is worth a line."""


def statistics(made: Sequence[MadePrompt]) -> pl.DataFrame:
    """`prompt_statistics` of prompts: kind, caption (given or made), num_tags and spelling (of
    those with tags), num_tokens (of whole prompts), num_chunks, num_truncated (of those that were
    cut), and tag (also score tags)."""
    counts: Counter[tuple[str, str]] = Counter()
    for one in made:
        trace = one.prompt.trace
        counts["kind", trace["kind"]] += 1
        counts["num_tokens", str(one.num_tokens)] += 1
        counts["num_chunks", str(one.num_chunks)] += 1
        if one.num_truncated:
            counts["num_truncated", str(one.num_truncated)] += 1
        if "caption" in trace:
            counts["caption", trace["caption"]] += 1
        if "num_tags" in trace:
            counts["num_tags", str(trace["num_tags"])] += 1
            counts["spelling", trace["spelling"]] += 1
            counts.update(("tag", name) for name in (*trace["score_tags"], *trace["tags"]))
    rows = [(statistic, key, count) for (statistic, key), count in counts.items()]
    table = TABLES["prompt_statistics"]
    return table.conform(pl.DataFrame(rows, schema=table.schema, orient="row"))


def histogram_of(found: pl.DataFrame, statistic: str) -> list[int]:
    """The values of a statistic whose keys are numbers, each as often as it was counted."""
    rows = found.filter(pl.col("statistic") == statistic).select("key", "count").iter_rows()
    return [int(key) for key, count in rows for _ in range(count)]


def chunk_mix(found: pl.DataFrame, config: PromptConfig) -> list[tuple[str, float, float]]:
    """Share of prompts with 1, 2, ... chunks: how many tokens those hold, the share found, and the
    one wanted.

    Where the recipe has no shares, what is found is what is wanted.
    """
    chunks = Counter(histogram_of(found, "num_chunks"))
    total = max(chunks.total(), 1)
    return [
        (
            f"{number * CHUNK_TOKENS}",
            chunks[number] / total,
            (config.chunk_shares[number - 1] if number <= len(config.chunk_shares) else 0.0)
            if config.chunk_shares
            else chunks[number] / total,
        )
        for number in range(1, config.max_chunks + 1)
    ]


def warnings(found: pl.DataFrame, config: PromptConfig) -> list[str]:
    """What the owner of a recipe should know before training, a line each; empty when nothing is
    odd."""
    total = len(histogram_of(found, "num_chunks"))
    kinds = dict(found.filter(pl.col("statistic") == "kind").select("key", "count").iter_rows())
    truncated = len(histogram_of(found, "num_truncated"))
    tags = histogram_of(found, "num_tags")
    said = []
    if truncated > _MANY_TRUNCATED * total:
        said.append(
            f"{truncated / total:.1%} of prompts are cut to their chunks: raise max_chunks, or lower mean_tags"
        )
    if (
        config.caption_prob + config.caption_and_tags_prob > 0
        and not {"caption", "caption_and_tags"} & kinds.keys()
    ):
        said.append("captions are asked for, and no sample has one")
    if config.empty_prob == 0:
        said.append(
            "empty_prob is 0: classifier-free guidance will have nothing to be guided away from"
        )
    if tags and config.mean_tags and sum(tags) / len(tags) < 0.75 * config.mean_tags:
        said.append(f"prompts have {sum(tags) / len(tags):.1f} tags on average, asked for are {config.mean_tags:g}: "
                    "images have no more")  # fmt: skip
    if bare := tags.count(0):
        said.append(f"{bare / total:.1%} of prompts say nothing of their image, which has no tag")
    for label, share, wanted in chunk_mix(found, config):
        if abs(share - wanted) > _MIX_OFF:
            said.append(f"{share:.0%} of prompts have {label} tokens, asked for are {wanted:.0%}")
    return said


def fit_lengths(path: Path) -> tuple[float, float]:
    """Mean and standard deviation of the number of tags in prompts that people wrote: `mean_tags`,
    `std_tags`.

    Args:
        path: A prompt a line in UTF-8; commas part the tags, lines without a tag do not count.

    Raises:
        DataError: the file cannot be read, or fewer than two lines have a tag.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"prompts {path}: not UTF-8 at byte {error.start}") from None
    counts = [
        count for line in lines if (count := sum(bool(tag.strip()) for tag in line.split(",")))
    ]
    if len(counts) < 2:
        raise DataError(
            f"prompts {path}: {len(counts)} lines have a tag, must be 2 at least; commas part the tags"
        )
    return mean(counts), stdev(counts)


def trace_line(one: MadePrompt) -> str:
    """How a prompt came about, in short."""
    trace = one.prompt.trace
    said = [trace["kind"] + (f" as {trace['as']}" if "as" in trace else "")]
    if "caption" in trace:
        said.append(f"{trace['caption']} caption, line {trace['line'] + 1}")
    if "num_tags" in trace:
        loosely = ", loose separators" if trace["loose"] else ""
        said.append(
            f"{trace['num_tags']} tags of {trace['wanted']} wanted, {trace['spelling']}{loosely}"
        )
    for name in ("aliases", "misspelled"):
        said += [f"{tag} as {written}" for tag, written in trace.get(name, {}).items()]
    said += [f"without {tag}" for tag in trace.get("dropped", ())]
    cut = f", {one.num_truncated} cut off" if one.num_truncated else ""
    return "; ".join([*said, f"{one.num_tokens} tokens in {one.num_chunks} chunks{cut}"])
