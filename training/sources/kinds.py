"""The one place where a source's kind chooses its code."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from training.config.workspace import SOURCE_KINDS
from training.sources.source import Source

if TYPE_CHECKING:
    from training.config.workspace import DecodeConfig, SourceConfig


def make_source(config: "SourceConfig", path: Path, limits: "DecodeConfig") -> Source:
    """The source that a `[[sources]]` table means.

    Args:
        config: The table.
        path: Its `path`, absolute.
        limits: What may be an image: a source that opens to bytes reads no more.

    Raises:
        DataError: there is no such source at `path`.
    """
    module, _, name = SOURCE_KINDS[config.kind].partition(":")
    return cast(Source, getattr(importlib.import_module(module), name)(config, path, limits))
