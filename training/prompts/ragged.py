"""Lists of different lengths in one array: what prompts of a block of rows are made of."""

from typing import NamedTuple

import numpy as np


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each list begins, and where the last one ends: `(len(lengths) + 1,)` int64."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    lengths.cumsum(out=starts[1:])
    return starts


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`starts[i]`, `starts[i] + 1`, ... as many as `lengths[i]`, for one i after the other:
    int64."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + (starts - ends + lengths).repeat(lengths)


def sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each list, `(len(starts) - 1,)` int64."""
    edges = offsets(values)[starts]
    return edges[1:] - edges[:-1]


class Ragged(NamedTuple):
    """A column of lists."""

    values: np.ndarray
    """Of all rows, one after the other."""
    starts: np.ndarray
    """`(N + 1,)` int64: row i is `values[starts[i]:starts[i + 1]]`."""

    def row(self, row: int) -> np.ndarray:
        """The list of one row."""
        return self.values[self.starts[row] : self.starts[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """How long the lists of rows are, `(len(rows),)` int64."""
        return self.starts[rows + 1] - self.starts[rows]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The lists of rows, one after the other."""
        return self.values[spans(self.starts[rows], self.lengths(rows))]
