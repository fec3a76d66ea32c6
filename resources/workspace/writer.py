"""Commits what stages made: content first, and then the manifest that names it."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from resources.graph import Stage
from resources.workspace.layouts import layout_of
from resources.workspace.paths import CODE_ROOT, Paths
from resources.workspace.tables import Tables
from training.commit import atomic_file, column_digests, lock, logical_digest
from training.errors import DataError
from training.manifests import Entry, Manifest, commit_manifest, read_parquet, write_parquet
from training.names import OwnedPart
from training.tables.schemas import TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage made of one partition."""

    frame: pl.DataFrame
    """Rows of the stage's table."""
    rejected: pl.DataFrame | None = None
    """Rows of `rejected_images`; None where the stage cannot reject."""
    rows_in: int | None = None
    """Rows it was given: checked against rows out plus rejected."""
    files: tuple[Entry, ...] = ()
    """Further content files in the table's folder."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Numbers, images and links for the UI."""


@dataclass(frozen=True)
class Writer:
    """Writes the tables of one workspace."""

    paths: Paths
    tables: Tables
    run_id: str = ""
    """Dagster run on whose behalf parts are committed."""

    @contextlib.contextmanager
    def holding(self, table: str, part: str) -> Iterator[None]:
        """Hold the part's lock: one writer at a time, and a dead one holds nothing."""
        what = f"{table} {part} in {self.paths.home}"
        with lock(self.paths.lock_file(table, part), what):
            yield

    def commit(
        self, stage: Stage, key: str, made: Made, basis: Mapping[str, Any], seconds: float
    ) -> Manifest:
        """Write content, then replace the manifest of partition `key`.

        Raises:
            DataError: rows do not add up, or do not fit the table's schema.
        """
        part, layout = stage.part(key), layout_of(stage.table)
        frame = TABLES[stage.table].conform(made.frame)
        num_rejected = 0 if made.rejected is None else made.rejected.height
        if made.rows_in is not None and made.rows_in != frame.height + num_rejected:
            raise DataError(
                f"{stage.name} {key}: {made.rows_in} rows in, but {frame.height} out and {num_rejected} rejected"
            )
        config = stage.section(self.paths.config, key)
        rejected = {}
        if made.rejected is not None:
            rejected = self.commit_rejected(
                stage.name, stage.version, key, made.rejected, config=config, basis=basis
            )
        folder, stem = self.tables.folder(stage.table, part), layout.stem(part, made.report)
        digests = column_digests(frame)
        manifest = Manifest(
            table=stage.table,
            part=part,
            version=stage.version,
            files=(write_parquet(folder, stem, frame), *made.files),
            rows=frame.height,
            digest=logical_digest(digests, frame.height),
            columns=digests,
            inputs=basis["inputs"],
            config=config,
            models=basis["models"],
            rejected=rejected,
            report={
                **made.report,
                "rows_in": made.rows_in,
                "rows_rejected": num_rejected,
                "seconds": round(seconds, 2),
            },
            provenance=self._provenance(),
        )
        commit_manifest(folder / f"{stem}.json", manifest)
        self.paths.attempts_file(stage.name, part).unlink(missing_ok=True)
        return manifest

    def commit_rejected(
        self,
        stage: str,
        version: int,
        key: str,
        rejected: pl.DataFrame,
        *,
        config: Any,
        basis: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Commit what a stage could not use of a partition; returns what the stage's manifest says
        of it.

        Both manifests carry what they follow from: equal where they were made together.
        """
        table = TABLES["rejected_images"]
        part = str(OwnedPart(stage, key))
        frame = table.conform(rejected).sort(list(table.columns), nulls_last=True)
        digests = column_digests(frame)
        digest = logical_digest(digests, frame.height)
        folder = self.tables.folder("rejected_images", part)
        manifest = Manifest(
            table="rejected_images",
            part=part,
            version=version,
            files=(write_parquet(folder, part, frame),),
            rows=frame.height,
            digest=digest,
            columns=digests,
            inputs=basis["inputs"],
            config=config,
            models=basis["models"],
            provenance=self._provenance(),
        )
        commit_manifest(self.tables.manifest_path("rejected_images", part), manifest)
        return {"part": part, "digest": digest, "rows": frame.height}

    def _provenance(self) -> dict[str, Any]:
        return {
            "git": git_revision(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "dagster_run": self.run_id,
        }

    def resume_batches(
        self,
        table: str,
        key: str,
        identity: str,
        batches: Sequence[Any],
        run: Callable[[Iterable[Any]], Iterator[pl.DataFrame]],
    ) -> Iterator[pl.DataFrame]:
        """Yield the frame of every batch in order; those that an earlier, killed attempt finished
        are read back.

        Args:
            table: What is being made.
            key: Its partition.
            identity: Digest of everything the frames follow from; finished batches of another
                identity are dropped.
            batches: All batches, in order.
            run: Works off the batches it is given, in order.
        """
        folder = self._partial_folder(table, key)
        mine = folder / identity[:16]
        if folder.is_dir():
            for other in folder.iterdir():
                if other != mine:
                    shutil.rmtree(other)
        paths = [mine / f"{number:06d}.parquet" for number in range(len(batches))]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        fresh = run([batches[number] for number in missing])
        for number, path in enumerate(paths):
            if number not in missing:
                yield read_parquet(path)
                continue
            frame = next(fresh)
            with atomic_file(path) as temporary:
                frame.write_parquet(temporary)
            yield frame

    def clear_partial(self, table: str, key: str) -> None:
        """Drop the finished batches of a partition: it is committed."""
        shutil.rmtree(self._partial_folder(table, key), ignore_errors=True)

    def _partial_folder(self, table: str, key: str) -> Path:
        return self.paths.home / "tables" / table / f"{key}.partial"


def git_revision() -> str:
    """Revision of the code that runs, or an empty string outside a checkout."""
    command = ["git", "-C", str(CODE_ROOT), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
