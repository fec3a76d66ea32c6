"""Which checkpoint is the best so far. It gives way only to one that is better, and the best of
many is tested twice: chosen on one half of the prompts, judged on the other, because the best of
many equals looks better than it is.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from training.evaluation import verdict
from training.evaluation.prompt_groups import counted
from training.evaluation.verdict import ALL, HELD_OUT, Scores
from training.records import read_record, write_record
from training.tables.schemas import TABLES

FILE = "champion.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """`champion.json`: the workspace's best checkpoint; the base model until something is
    better."""

    checkpoint: str
    digest: str
    """Of its weights."""
    verdict: str = ""
    """Part of table `verdicts` that made it champion; empty for the base model."""
    sentence: str = ""
    """The verdict in words."""
    challenged: Mapping[str, str] = field(default_factory=dict)
    """Every checkpoint that has stood against a champion, with the digest of the scores it stood
    with."""


def read(home: Path) -> Champion | None:
    """The champion of a workspace; None while there is none.

    Raises:
        DamageError: the file cannot be read.
    """
    damaged = "{subject} is damaged ({error}); remove it, and the next verdict begins from the base"
    try:
        return read_record(home / FILE, _FORMAT, lambda values: Champion(**values), damaged=damaged)
    except FileNotFoundError:
        return None


def write(home: Path, champion: Champion) -> None:
    """Replace the champion of a workspace."""
    values: dict[str, Any] = {name: getattr(champion, name) for name in Champion.__slots__}
    write_record(home / FILE, _FORMAT, {**values, "challenged": dict(champion.challenged)})


def halves(prompt_ids: Collection[str]) -> tuple[set[str], set[str]]:
    """The half that winners are chosen on and the half that they are judged on: by turns in the
    order of SHA-256."""
    ordered = sorted(prompt_ids, key=lambda prompt_id: hashlib.sha256(prompt_id.encode()).digest())
    return set(ordered[::2]), set(ordered[1::2])


def choose(champion: Scores, challengers: Sequence[Scores], margins: Mapping[str, float]) -> Scores:
    """Of several challengers the one with the greatest gain over the champion on the first half of
    the prompts.

    Args:
        champion: Whom they challenge.
        challengers: At least one.
        margins: Metric -> difference that matters, the unit in which gains of unlike metrics are
            added.
    """

    def gain(side: Scores) -> float:
        rows = verdict.compare(_part(champion, 0), _part(side, 0), margins).filter(
            pl.col("group") == ALL
        )
        return float((rows["difference"] / rows["margin"]).sum())

    return max(sorted(challengers, key=lambda side: side.checkpoint), key=gain)


def challenge(
    champion: Scores, challenger: Scores, margins: Mapping[str, float], *, one_of_many: bool
) -> pl.DataFrame:
    """The verdict that decides: rows of table `verdicts`, with those of the held-out half for the
    best of many.

    Of these `num_needed` counts the prompts of the whole set, of which the half is judged.
    """
    rows = verdict.compare(champion, challenger, margins)
    if not one_of_many:
        return rows
    judged = verdict.compare(_part(champion, 1), _part(challenger, 1), margins).filter(
        pl.col("group") == ALL
    )
    held_out = judged.with_columns(group=pl.lit(HELD_OUT), num_needed=pl.col("num_needed") * 2)
    return TABLES["verdicts"].conform(pl.concat([rows, held_out]))


def wins(rows: pl.DataFrame, metrics: Collection[str]) -> bool:
    """Whether a challenge moves the champion: better in one of the deciding metrics or more, worse
    in none.

    Args:
        rows: Of `challenge`; the held-out half decides where it was judged.
        metrics: Those that decide.
    """
    words = decisive(rows).filter(pl.col("metric").is_in(list(metrics)))["verdict"].to_list()
    return "better" in words and "worse" not in words


def decisive(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the prompts that a challenge is decided on: the held-out half where it was judged,
    else all."""
    return rows.filter(pl.col("group") == (HELD_OUT if HELD_OUT in rows["group"] else ALL))


def _part(side: Scores, half: int) -> Scores:
    """A side with one half of the prompts that count."""
    prompts = side.metrics.select("prompt_id").drop_nulls().unique()
    ids = counted(prompts)["prompt_id"].to_list()
    return replace(side, metrics=side.metrics.filter(pl.col("prompt_id").is_in(halves(ids)[half])))
