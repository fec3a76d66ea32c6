"""Progress bars for the demo's builders."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Steps:
    """Counts to a total with a bar on stderr; plain lines every 30 s where stderr is no terminal."""

    def __init__(self, total: int, title: str) -> None:
        self.total = total
        self.title = title
        self.notes: dict[str, float] = {}
        terminal = sys.stderr.isatty()
        self.bar: Any = tqdm(total=total, desc=title, mininterval=0.5 if terminal else 30.0, ascii=not terminal)
        self.shown = time.monotonic()

    def __iter__(self) -> Iterator[int]:
        for step in range(self.total):
            yield step
            self.bar.update()
        self.bar.close()

    def note(self, **values: float) -> None:
        """Show running means of these values beside the bar."""
        for name, value in values.items():
            self.notes[name] = 0.98 * self.notes.get(name, value) + 0.02 * value
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in self.notes.items()}, refresh=False)


def steps(total: int, title: str) -> Steps:
    """A bar over `range(total)`."""
    return Steps(total, title)
