"""The one handle on a workspace: its parts, each of which knows one thing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from resources.workspace.checkpoints import Checkpoints
from resources.workspace.currency import Currency
from resources.workspace.models import Models
from resources.workspace.paths import Paths
from resources.workspace.slices import Slices
from resources.workspace.tables import Tables
from resources.workspace.writer import Writer
from training.config.workspace import WorkspaceConfig
from training.manifests import Manifest


@dataclass(frozen=True)
class Store:
    """One workspace. What almost everyone asks is asked here; all else of the part that knows it."""

    home: Path
    run_id: str = ""
    """Dagster run on whose behalf parts are committed."""

    @property
    def config(self) -> WorkspaceConfig:
        """The workspace's foundry.toml."""
        return self.paths.config

    def manifest(self, table: str, part: str) -> Manifest | None:
        """The committed manifest of a part, or None."""
        return self.tables.manifest(table, part)

    def read(
        self, table: str, columns: Sequence[str] = (), parts: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Rows of the given parts (default: all), sorted by the table's key; null in columns
        younger than a part."""
        return self.tables.read(table, columns, parts)

    @cached_property
    def paths(self) -> Paths:
        """Configuration and folders."""
        return Paths(self.home)

    @cached_property
    def tables(self) -> Tables:
        """Manifests, parts and rows."""
        return Tables(self.paths)

    @cached_property
    def models(self) -> Models:
        """Folders and digests of models."""
        return Models(self.paths)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints of runs, the base model and external models."""
        return Checkpoints(self.paths, self.tables, self.models)

    @cached_property
    def slices(self) -> Slices:
        """What stages read of the tables."""
        return Slices(self.tables)

    @cached_property
    def currency(self) -> Currency:
        """What is current."""
        return Currency(
            paths=self.paths,
            tables=self.tables,
            models=self.models,
            checkpoints=self.checkpoints,
            slices=self.slices,
            others=lambda stage, key: stage.others(self, key),
        )

    @cached_property
    def writer(self) -> Writer:
        """Commits."""
        return Writer(self.paths, self.tables, self.run_id)
