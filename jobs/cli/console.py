"""What the command line shows: progress bars while stages run, and a summary afterwards."""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import polars as pl
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from jobs.pipeline import Outcome
from resources.graph import Scope
from resources.workspace.staleness import StageStatus, grouped
from resources.workspace.store import Store
from training.evaluation import champion, verdict
from training.names import VerdictName
from training.progress import listen, told
from training.runs.run_folder import is_away

if TYPE_CHECKING:
    from jobs.comparison import Comparison

_WRAPPED = 16
"""Least width of a column that wraps: longer words are folded."""


class _RateColumn(ProgressColumn):
    """How many a second, lately."""

    def render(self, task: Task) -> Text:
        """`12.3/s`, or nothing while it is unknown."""
        return Text(f"{task.speed:.3g}/s" if task.speed else "", style="progress.data.speed")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, Sequence[str]], None]]:
    """For the stage at work: its partitions, why they are stale, and how far it is; bars on a
    terminal, else lines."""
    columns = (
        TextColumn("{task.description:20}"), BarColumn(12), MofNCompleteColumn(), _RateColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    console = Console(stderr=True)

    def say(stage: str, num_partitions: int, reasons: Sequence[str] = ()) -> None:
        plural = "" if num_partitions == 1 else f", {num_partitions} partitions"
        console.print(
            Text.assemble((stage, "bold"), plural, f": {'; '.join(reasons)}" if reasons else "")
        )

    if not console.is_terminal:  # a log has no bars: a line at most every 30 s
        with told(lambda line: console.print(f"  {line}", markup=False, soft_wrap=True)):
            yield say
        return
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def announce(stage: str, num_partitions: int, reasons: Sequence[str] = ()) -> None:
            for task in tasks.values():
                bars.remove_task(task)  # type: ignore[arg-type]
            tasks.clear()
            say(stage, num_partitions, reasons)

        def advance(what: str, done: int, total: int, note: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"  {what}", total=total, note=note)
            bars.update(tasks[what], completed=done, total=total, note=note)  # type: ignore[arg-type]

        unlisten = listen(advance)
        try:
            yield announce
        finally:
            unlisten()


def _table(first: str, *others: str, gap: int = 2) -> Table:
    """A table that fits 80 columns: no frame, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show(table: Table, console: Console) -> None:
    """Print a table, or where the terminal is too narrow for it each row as lines with the names of their columns."""
    columns = table.columns
    needed = [
        max(console.measure(cell).maximum for cell in (column.header, *column.cells))
        if column.no_wrap
        else _WRAPPED
        for column in columns
    ]
    gap = max(table.padding)
    if sum(needed) + gap * (len(columns) - 1) <= console.width:
        console.print(table)
        return
    for first, *others in zip(*(column.cells for column in columns), strict=True):
        if str(first):
            console.print(first)
        for column, cell in zip(columns[1:], others, strict=True):
            if str(cell):
                console.print(Padding(Text.assemble(f"{column.header}: ", cell), (0, 0, 0, 2)))


def status(found: Sequence[StageStatus], *, why: bool) -> None:
    """One line a stage: how many partitions are stale, why, and the expected time; then what to
    run."""
    console = Console()
    table = _table("stage", "stale")
    table.add_column("reason", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    for item in found:
        counted = (
            f"{len(item.stale)} of {item.num_partitions}"
            if item.num_partitions != 1
            else str(len(item.stale))
        )
        reason = Text(
            item.error or "; ".join(grouped(item.stale)) or "current",
            style="" if item.stale or item.error else "dim",
        )
        if not item.stale and not item.error and item.follows:
            reason = Text(f"may follow {item.follows[-1]}", style="dim")
        table.add_row(item.stage, counted if item.stale else "", reason, _expected(item))
        if why:
            for partition in item.stale:
                table.add_row("", "", Text(f"{partition.key}: {'; '.join(partition.reasons)}"), "")
    _show(table, console)
    stale = [item for item in found if item.stale]
    known = sum(item.seconds or 0 for item in stale)
    unknown = [item.stage for item in stale if item.seconds is None]
    unjudged = [item.stage for item in found if item.error]
    if unjudged:
        console.print(f"cannot be judged: {', '.join(unjudged)}")
    if stale:
        times = [f"about {_duration(known)}"] if len(unknown) < len(stale) else []
        times += [f"{', '.join(unknown)}, which never ran"] if unknown else []
        console.print(f"bring up to date with `foundry run`: {', and '.join(times)}")
    elif not unjudged:
        console.print("everything is up to date")


def _expected(item: StageStatus) -> str:
    if not item.stale:
        return ""
    return "?" if item.seconds is None else _duration(item.seconds)


def _duration(seconds: float) -> str:
    """`12 s`, `3 min`, `4.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(store: Store, outcomes: list[Outcome], seconds: float) -> None:
    """Rows in, out and rejected, and seconds, per stage; then base against fine-tuned, and what to
    do next."""
    console = Console()
    table = _table("stage", "made now", "rows in", "rows out", "rejected", "seconds")
    for item in outcomes:
        made = f"{item.num_made} of {item.num_partitions}" if item.num_made else "current"
        table.add_row(
            item.stage, made, str(item.rows_in or ""), str(item.rows_out), str(item.rows_rejected or ""),
            f"{item.seconds:.1f}" if item.num_made else "",
        )  # fmt: skip
    _show(table, console)
    made_now = sum(outcome.num_made for outcome in outcomes)
    if not made_now and not any(outcome.failed for outcome in outcomes):
        console.print("everything selected is up to date: nothing was done")
    for item in outcomes:
        if (
            item.stage == "source_listing"
            and (listing := store.manifest("source_listing", "all")) is not None
        ):
            for note in listing.report.get("notes", []):
                console.print(note, soft_wrap=True, markup=False, highlight=False)
        if item.unfinished:
            console.print(
                f"{item.stage}: time is up, {len(item.unfinished)} partitions are left for the next run"
            )
        for key, reason in item.failed.items():
            console.print(f"{key} is not evaluated: {reason}", markup=False)
    for run in store.currency.keys(Scope.RUN):
        if is_away(store.paths.run_folder(run)):
            console.print(
                f"run {run} is away: it was bundled to be trained elsewhere, and is not trained here"
            )
    _verdicts(store, console)
    if seconds:
        console.print(f"took {seconds:.0f} s")


def _verdicts(store: Store, console: Console) -> None:
    """Base against fine-tuned, once there is a verdict."""
    runs = store.checkpoints.finished_runs()
    last = [name for run in runs if (name := store.checkpoints.last(run))]
    parts = [
        part
        for name in last
        if (part := str(VerdictName.against_base(name))) in store.tables.parts("verdicts")
    ]
    if not parts:
        return
    _against_base(store, parts, ("base", "fine-tuned"), console)
    _champion(store, console)
    console.print(f"sample images: {store.home / 'sample_images'}", soft_wrap=True, markup=False)
    console.print(f"model and card: {store.home / 'release'}", soft_wrap=True, markup=False)
    console.print(
        f"open the pages: foundry up --home {shlex.quote(str(store.home))}",
        soft_wrap=True,
        markup=False,
    )


def _against_base(
    store: Store, parts: Sequence[str], names: tuple[str, str], console: Console
) -> None:
    """Verdicts against the base, and why there is none where images failed."""
    _verdict_tables(store.read("verdicts", parts=parts), names, console)
    for part in parts:
        manifest = store.manifest("verdicts", part)
        if (
            manifest is not None
            and not manifest.rows
            and VerdictName.parse(part).b != store.checkpoints.base()
        ):
            console.print(manifest.report["numbers"]["note"], soft_wrap=True, markup=False)


def _verdict_tables(frame: pl.DataFrame, names: tuple[str, str], console: Console) -> None:
    """One table per pair of checkpoints."""
    ordered = frame.sort("b", "metric", pl.col("group") != verdict.ALL, "group")
    for (a, b), rows in ordered.group_by("a", "b", maintain_order=True):
        console.print(f"\n{b} against {a}, paired by prompt, 95 % intervals", markup=False)
        table = _table("metric (prompts)", *names, "difference", "verdict", gap=1)
        for row in rows.iter_rows(named=True):
            table.add_row(
                Text(f"{row['metric']}, {row['group']} ({row['num_prompts']})"),
                f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}",
                Text(f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"),
                row["verdict"].replace("too_few_prompts", "too few").replace("_", " "),
            )  # fmt: skip
        _show(table, console)


def _champion(store: Store, console: Console) -> None:
    now = champion.read(store.home)
    if now is not None:
        why = f" ({now.sentence})" if now.sentence else ", nothing is better yet"
        console.print(f"champion: {now.checkpoint}{why}", markup=False)


def evaluated(store: Store, names: Sequence[str]) -> None:
    """Verdicts of checkpoints against the base, and the champion."""
    console = Console()
    parts = [
        part
        for name in names
        if (part := str(VerdictName.against_base(name))) in store.tables.parts("verdicts")
    ]
    _against_base(store, parts, ("base", "judged"), console)
    _champion(store, console)


def compared(found: "Comparison") -> None:
    """The verdict in words, the table, and where the page is."""
    console = Console()
    overall = found.verdicts.filter(pl.col("group") == verdict.ALL)
    for row in overall.iter_rows(named=True):
        console.print(verdict.sentence(row), soft_wrap=True, markup=False)
    _verdict_tables(found.verdicts, ("first", "second"), console)
    console.print(f"report: {found.report}", soft_wrap=True, markup=False)


def rows(frame: pl.DataFrame, format: Literal["table", "jsonl", "csv"]) -> None:
    """Print a frame: a table for people, JSON lines or CSV for programs (what a spreadsheet would
    run is quoted)."""
    if format == "jsonl":
        for row in frame.iter_rows(named=True):
            print(json.dumps(row, ensure_ascii=False, default=str))
        return
    plain = frame.select(_as_text(column) for column in frame.get_columns())
    if format == "csv":
        sys.stdout.write(
            plain.with_columns(pl.col(pl.String).str.replace(r"^([=+\-@\t\r])", "'$1")).write_csv()
        )
        return
    table = Table()
    for name in plain.columns:
        table.add_column(name)
    for values in plain.iter_rows():
        table.add_row(*("" if value is None else str(value) for value in values))
    Console().print(table, markup=False)
    print(f"{frame.height} rows")


def _as_text(column: pl.Series) -> pl.Series:
    if not isinstance(column.dtype, (pl.List, pl.Struct, pl.Array)):
        return column
    texts = [
        None if value is None else json.dumps(value, ensure_ascii=False, default=str)
        for value in column.to_list()
    ]
    return pl.Series(column.name, texts, dtype=pl.String)
