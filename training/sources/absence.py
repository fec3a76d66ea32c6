"""When files that are missing from a source mean that something is wrong: absence is not
deletion."""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

MAX_MISSING_SHARE = 0.2
"""A larger share of a source's candidates is not taken as deleted without being asked for."""
MIN_MISSING = 10
"""Fewer are taken as deleted, unless they are all that the source had."""


class Loss(NamedTuple):
    """What one source has lost since its last listing."""

    source: str
    num_missing: int
    num_known: int
    """Candidates that were there."""
    num_new: int
    """Candidates that were not."""

    def __str__(self) -> str:
        """The counts as a person reads them."""
        new = f", and {self.num_new} are new" if self.num_new else ""
        return f"source {self.source!r}: {self.num_missing} of {self.num_known} image files are missing{new}"


def losses(previous: pl.DataFrame, listed: pl.DataFrame, sources: Sequence[str]) -> list[Loss]:
    """The sources that have lost most of what they had: all of it, or more than a fifth and ten or
    more.

    Args:
        previous: `source_listing` so far; may be empty.
        listed: What is there now, columns source and source_id at least.
        sources: Names of those that were listed.
    """
    key = ["source", "source_id"]
    known = previous.filter(pl.col("gone_at").is_null()).select(key)
    found = []
    for source in sources:
        before, now = (
            known.filter(pl.col("source") == source),
            listed.select(key).filter(pl.col("source") == source),
        )
        missing, new = (
            before.join(now, on=key, how="anti").height,
            now.join(before, on=key, how="anti").height,
        )
        many = missing >= MIN_MISSING and missing > MAX_MISSING_SHARE * before.height
        if missing and (many or missing == before.height):
            found.append(Loss(source, missing, before.height, new))
    return found
