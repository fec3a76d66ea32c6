"""What becomes of listings: one table that only grows, in which each candidate keeps its shard, and
what is said of what was not used.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import polars as pl

from training.sources.source import Problem, own_metadata
from training.tables.schemas import TABLES
from training.tables.table import Reason

if TYPE_CHECKING:
    from training.config.workspace import SourceConfig

_EXAMPLES = 3
_UNUSED_WORDS = {
    Reason.SIDECAR_UNMATCHED: "sidecars without an image of their name",
    Reason.SIDECAR_UNREADABLE: "sidecars that cannot be read",
    Reason.SIDECAR_MALFORMED: "sidecars that are used in part, or hold nothing that is known",
    Reason.UNREADABLE: "folders and files that cannot be looked at",
}


def rejection(source: str, problem: Problem) -> dict[str, object]:
    """What was not used as a row of `rejected_images`."""
    return {
        "source": source, "source_id": problem.source_id or None, "reason": problem.reason, "value": problem.path,
        "detail": problem.detail,
    }  # fmt: skip


def num_with_words(listed: pl.DataFrame, sources: Sequence["SourceConfig"]) -> int:
    """How many candidates have a caption, or a tag that is not their source's."""
    count = 0
    for source in sources:
        own = pl.col("tags").list.len() > len(own_metadata(source).tags)
        count += listed.filter(
            pl.col("source") == source.name, own | pl.col("caption").is_not_null()
        ).height
    return count


def notes(num_candidates: int, num_with_words: int, unused: pl.DataFrame) -> list[str]:
    """What a listing says to whoever started it: how many images have words, and which words were
    not used.

    Args:
        num_candidates: Files that are there now.
        num_with_words: Those of them with words.
        unused: The listing's rows of `rejected_images`.
    """
    lines = [
        f"words: {num_with_words} of {num_candidates} image files have tags or a caption beside them"
    ]
    for reason, what in _UNUSED_WORDS.items():
        rows = unused.filter(pl.col("reason") == reason)
        if rows.height:
            examples = "; ".join(
                f"{row['value']}: {row['detail']}" if row["source_id"] else str(row["value"])
                for row in rows.head(_EXAMPLES).iter_rows(named=True)
            )
            lines.append(f"{what}: {rows.height}, such as {examples}")
    if unused.height:
        lines.append(
            "see them with `foundry sql \"from rejected_images where stage = 'source_listing'\"`"
        )
    return lines


def merge_listing(
    previous: pl.DataFrame, found: pl.DataFrame, *, shard_size: int, now: datetime
) -> pl.DataFrame:
    """The next `source_listing`: it only grows.

    Args:
        previous: `source_listing` so far; may be empty.
        found: What is there now, all sources, without shard and gone_at, in the order of listing.
        shard_size: Candidates in a shard at most.
        now: Time of the listing, UTC: set where a candidate is missed for the first time.

    Returns:
        `source_listing`. A candidate keeps its shard. New ones fill their source's last shard, then
        open the next; shards are numbered over all sources and hold one source each.
    """
    table = TABLES["source_listing"]
    key = list(table.key)
    known = previous.select(*key, "shard")
    present = found.join(known, on=key, how="left", maintain_order="left")
    new = present.filter(pl.col("shard").is_null()).drop("shard")
    new = new.with_columns(_new_shards(previous, new, shard_size))
    gone = previous.join(found.select(key), on=key, how="anti")
    gone = gone.with_columns(
        pl.col("gone_at").fill_null(pl.lit(now, dtype=table.schema["gone_at"]))
    )
    here = pl.concat([present.filter(pl.col("shard").is_not_null()), new])
    here = here.with_columns(gone_at=pl.lit(None, dtype=table.schema["gone_at"]))
    return table.conform(pl.concat([here.select(list(table.columns)), gone]))


def _new_shards(previous: pl.DataFrame, new: pl.DataFrame, shard_size: int) -> pl.Series:
    """A shard for each new candidate, in order."""
    sizes = previous.group_by("source", "shard").len()
    fill: dict[str, tuple[int, int]] = {}  # source -> its last shard and how many it holds
    for source, shard, size in sizes.iter_rows():
        fill[source] = max(fill.get(source, (-1, 0)), (int(shard[1:]), size))
    last = max((number for number, _ in fill.values()), default=-1)
    shards = []
    for source in new["source"]:
        number, size = fill.get(source, (-1, shard_size))
        if size >= shard_size:
            last += 1
            number, size = last, 0
        fill[source] = number, size + 1
        shards.append(f"s{number:06d}")
    return pl.Series("shard", shards, dtype=pl.String)
