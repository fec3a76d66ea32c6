"""What a source of images is: whatever can say what it holds, and give the bytes of each candidate.

`training.sources.kinds` makes one from its configuration; `docs/extending.md` shows a whole one.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import polars as pl

from training.sources.sidecars import Metadata
from training.tables.schemas import TABLES

if TYPE_CHECKING:
    from training.config.workspace import SourceConfig

LISTED = tuple(
    name for name in TABLES["source_listing"].columns if name not in ("shard", "gone_at")
)
"""Columns of a listing: those of `source_listing` that a source knows."""
_ROWS = 50_000
"""Rows held as Python objects at a time."""


class Problem(NamedTuple):
    """Something beside or around the candidates that was not used."""

    path: str
    """The sidecar or folder, relative to the root."""
    reason: str
    """A value of `tables.Reason`."""
    source_id: str
    """The candidate that it belongs to, which goes on; empty for none."""
    detail: str
    """One line."""


class Listing(NamedTuple):
    """All that a source holds now."""

    candidates: pl.DataFrame
    """Columns `LISTED`; in an order that is equal for equal content."""
    problems: Sequence[Problem]
    """What was not used, sorted."""


class Source(Protocol):
    """One `[[sources]]` of a workspace.

    It is made from `(config: SourceConfig, path: Path, limits: DecodeConfig)`, where `path` is the
    configured one as an absolute path. Making it is cheap and raises `DataError` where there is
    nothing at `path`. Images are opened by several threads at a time and in other processes, so it
    can be pickled and `open` keeps no state.
    """

    def fingerprint(self) -> str:
        """SHA-256 of all that a listing follows from, without reading an image: it changes whenever
        `list` could give another result."""
        ...

    def list(self) -> Listing:
        """The candidates that there are now, whatever their bytes turn out to be."""
        ...

    def open(self, locator: str) -> Path | bytes:
        """Where the bytes of a candidate lie, or the bytes themselves: no more than
        `limits.max_bytes` of them are read.

        Raises:
            Unusable: this one cannot be had; it becomes a row of `rejected_images` with the reason.
        """
        ...


def own_metadata(config: "SourceConfig") -> Metadata:
    """What holds for every candidate of a source: its configured tags."""
    metadata = Metadata()
    for tag in config.tags:
        metadata.add_tag(tag)
    return metadata


def candidate(
    config: "SourceConfig",
    source_id: str,
    metadata: Metadata,
    *,
    locator: str,
    num_bytes: int,
    modified_ns: int,
) -> dict[str, object]:
    """A row of a listing.

    Args:
        config: Of the source.
        source_id: Identity within the source, clean printable text.
        metadata: What is known of the image.
        locator: What `open` is asked for.
        num_bytes: Size of the content; 0 where only opening it tells.
        modified_ns: When the content changed last: another value makes it be read anew.
    """
    return {
        "source": config.name,
        "source_id": source_id,
        "locator": locator,
        "bytes": num_bytes,
        "modified_ns": modified_ns,
        "tags": [{"name": name, "category": metadata.tags[name]} for name in sorted(metadata.tags)],
        "rating": metadata.rating,
        "favourites": metadata.favourites,
        "created_at": metadata.created_at,
        "caption": metadata.caption,
        "split": metadata.split,
        "crop_box": metadata.crop_box and metadata.crop_box._asdict(),
    }


def candidates_frame(rows: Iterable[dict[str, object]]) -> pl.DataFrame:
    """Rows as `candidate` makes them, as the frame of a listing."""
    schema = {name: TABLES["source_listing"].schema[name] for name in LISTED}
    frames, waiting = [pl.DataFrame(schema=schema)], iter(rows)
    while block := list(islice(waiting, _ROWS)):
        frames.append(pl.DataFrame(block, schema=schema, orient="row"))
    return pl.concat(frames)
