"""A process that commits a table of one part, and dies by SIGKILL at a change of the file
system."""

import json
import os
from pathlib import Path

import polars as pl
from kill_walk import kill_at_new_points

from training import commit, manifests


def write(folder: Path, generation: int, style: str, journal: Path | None) -> None:
    """Commit fifty rows; with a journal die at the first point that is not in it."""
    frame = pl.DataFrame({"x": list(range(generation, generation + 50))})
    digests = commit.column_digests(frame)
    if journal is not None:
        kill_at_new_points(folder, "toy", journal, every=True)
    if style == "in place":  # the negative control: what commits must not do
        path = folder / "t-fixed.parquet"
        with path.open("wb") as file:
            frame.write_parquet(file)
        entry = manifests.Entry(
            name=path.name, sha256=commit.sha256_file(path), bytes=path.stat().st_size
        )
    else:
        entry = manifests.write_parquet(folder, "t", frame)
    manifest = manifests.Manifest(
        table="toy",
        part="t",
        version=generation,
        files=(entry,),
        rows=50,
        digest=commit.logical_digest(digests, 50),
    )
    if style == "in place":
        (folder / "t.json").write_text(json.dumps({**manifest.to_json(), "format": 1}))
    else:
        manifests.commit_manifest(folder / "t.json", manifest)
    os._exit(0)
