"""Progress bars for the demo's builders, and plain lines now and then where no one watches a
terminal."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 30.0


class Steps:
    """Counts to a total; `note` shows running means beside the bar."""

    def __init__(self, total: int, title: str) -> None:
        self.total = total
        self.title = title
        self.notes: dict[str, float] = {}

    def __iter__(self) -> Iterator[int]:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        printed = time.monotonic()
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console
        ) as progress:
            task = progress.add_task(self.title, total=self.total)
            for step in range(self.total):
                yield step
                text = " ".join(
                    [self.title, *(f"{name}={value:.4f}" for name, value in self.notes.items())]
                )
                progress.update(task, advance=1, description=text)
                if not console.is_terminal and time.monotonic() - printed > LINE_EVERY_S:
                    printed = time.monotonic()
                    console.print(f"{text}: {step + 1} of {self.total}")

    def note(self, **values: float) -> None:
        """Take these values into the running means."""
        for name, value in values.items():
            self.notes[name] = 0.98 * self.notes.get(name, value) + 0.02 * value


def steps(total: int, title: str) -> Steps:
    """A bar over `range(total)`."""
    return Steps(total, title)
