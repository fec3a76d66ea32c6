"""Where a workspace lies, what its foundry.toml says, and where its folders are: the only code that
builds their paths."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training import toml
from training.commit import sha256_file
from training.config.workspace import FORMAT, SourceConfig, WorkspaceConfig
from training.errors import ConfigError, DataError, WorkspaceError
from training.names import check_name
from training.sources.kinds import make_source
from training.sources.source import Source

CONFIG_FILE = "foundry.toml"
CODE_ROOT = Path(__file__).resolve().parents[2]
DEMO_PREFIX = "demo:"
_NO_PATH = re.compile(r"[?%\\\x00-\x1f\x7f]")


def find_home(home: Path | None = None, start: Path | None = None) -> Path:
    """The workspace a command works on: `home`, else FOUNDRY_HOME, else the nearest parent with
    foundry.toml, else `./workspace`."""
    if home is not None:
        return home.expanduser().resolve()
    if named := os.environ.get("FOUNDRY_HOME"):
        return Path(named).expanduser().resolve()
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return start / "workspace"


def check_home(home: Path) -> None:
    """Refuse a path that a part of the workspace could not use: DuckDB and the URLs of SQLite give
    some characters a meaning of their own.

    Raises:
        WorkspaceError: names the path and what it must not hold.
    """
    text = str(home)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WorkspaceError(
            f"the path of a workspace must be UTF-8, {os.fsencode(home)!r} is not"
        ) from None
    if found := _NO_PATH.search(text):
        raise WorkspaceError(
            f"the path of a workspace must hold no ?, %, backslash or control character, {text!r} holds {found[0]!r}; "
            "choose or rename a folder"
        )


@dataclass(frozen=True)
class Paths:
    """The places of one workspace."""

    home: Path

    @cached_property
    def config(self) -> WorkspaceConfig:
        """The workspace's foundry.toml.

        Raises:
            WorkspaceError: there is no workspace here, its path cannot be used, or a newer version
                made it.
            ConfigError: a key or value is wrong.
        """
        check_home(self.home)
        path = self.home / CONFIG_FILE
        if not path.is_file():
            raise WorkspaceError(
                f"{self.home} is no workspace ({CONFIG_FILE} is missing); make one with `foundry init`"
            )
        values = toml.load(path)
        found = values.get("format")
        if not isinstance(found, int) or found > FORMAT:
            raise WorkspaceError(
                f"{path}: format={found!r}, this version reads format {FORMAT}; "
                "install the version of Diffusion Foundry that made the workspace, or a newer one"
            )
        return toml.build(WorkspaceConfig, values, origin=path)

    def runs(self) -> list[str]:
        """All runs that have a configuration, sorted."""
        return sorted(path.parent.name for path in (self.home / "runs").glob("*/config.toml"))

    def run_folder(self, run: str) -> Path:
        """Folder of a training run."""
        return self.home / "runs" / check_name("run", run)

    def sample_folder(self, checkpoint: str) -> Path:
        """Folder of a checkpoint's sample images."""
        return self.home / "sample_images" / checkpoint

    def sheet_file(self, run: str) -> Path:
        """Contact sheet of all that the report on a run shows."""
        return self.home / "sample_images" / f"{run}_contact_sheet.jpg"

    def lock_file(self, table: str, part: str) -> Path:
        """What the writer of a part holds."""
        return self.home / "locks" / f"{table}.{part}.lock"

    def attempts_file(self, table: str, part: str) -> Path:
        """How often a part was begun and not committed."""
        return self.home / "cache" / "attempts" / f"{table}.{part}.json"

    def source(self, name: str) -> Source:
        """A source, to be listed and opened.

        Raises:
            ConfigError: none has that name.
            DataError: it is not there.
        """
        config = next((item for item in self.config.sources if item.name == name), None)
        if config is None:
            raise ConfigError(f"{self.home / CONFIG_FILE}: no source is named {name!r}")
        try:
            return make_source(config, self.source_path(config), self.config.decode)
        except DataError as error:
            raise DataError(f"{error}; mend its path in {self.home / CONFIG_FILE}") from None

    def source_path(self, source: SourceConfig) -> Path:
        """Where a source lies, whether or not it is there."""
        return self.inside(source.path)

    def resource(self, name: str) -> Path:
        """A path from the configuration: relative to the workspace, or embedded (`demo:NAME`)."""
        if name.startswith(DEMO_PREFIX):
            return CODE_ROOT / "demo" / name.removeprefix(DEMO_PREFIX)
        return self.inside(name)

    def inside(self, name: str) -> Path:
        """A path that is relative to the workspace, or names a place of its own."""
        return (self.home / Path(name).expanduser()).resolve()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or `absent`."""
    return sha256_file(path) if path.is_file() else "absent"
