"""How the parts of a table lie in a workspace: side by side in one folder, or a folder for each with
its generations, the highest of which is current."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from training.manifests import manifests
from training.names import GenerationName, ShardKey
from training.tables.schemas import TABLES


class Layout(Protocol):
    """What the kinds of tables differ in."""

    def folder(self, home: Path, table: str, part: str) -> Path:
        """Folder with the content files and the manifest of a part."""

    def manifest(self, folder: Path, part: str) -> Path:
        """The manifest that is current in a part's folder, or would be the first."""

    def manifests(self, home: Path, table: str) -> list[Path]:
        """Every manifest of the table, sorted."""

    def parts(self, home: Path, table: str) -> list[str]:
        """Names of the table's committed parts, in the order in which they are read."""

    def part_at(self, manifest: Path) -> tuple[str, str]:
        """Table and part whose manifest lies at this path."""

    def stem(self, part: str, report: Mapping[str, Any]) -> str:
        """What the files of a new commit are named after."""


class _Parts:
    """`tables/<table>/<part>.json`: a new commit replaces the manifest."""

    def folder(self, home: Path, table: str, part: str) -> Path:
        return home / "tables" / table

    def manifest(self, folder: Path, part: str) -> Path:
        return folder / f"{part}.json"

    def manifests(self, home: Path, table: str) -> list[Path]:
        return manifests(home / "tables" / table)

    def parts(self, home: Path, table: str) -> list[str]:
        return [path.stem for path in self.manifests(home, table)]

    def part_at(self, manifest: Path) -> tuple[str, str]:
        return manifest.parent.name, manifest.stem

    def stem(self, part: str, report: Mapping[str, Any]) -> str:
        return part


class _Generations:
    """`<table>/<encoding>/<shard>/g0003.json`: a new commit adds a generation."""

    def folder(self, home: Path, table: str, part: str) -> Path:
        key = ShardKey.parse(part)
        return home / table / key.encoding / key.shard

    def manifest(self, folder: Path, part: str) -> Path:
        return folder / max(committed(folder), default=GenerationName(1)).manifest

    def manifests(self, home: Path, table: str) -> list[Path]:
        found = (home / table).glob("*/*/g*.json")
        return sorted(path for path in found if GenerationName.of_manifest(path.name))

    def parts(self, home: Path, table: str) -> list[str]:
        return sorted({self.part_at(path)[1] for path in self.manifests(home, table)})

    def part_at(self, manifest: Path) -> tuple[str, str]:
        shard = manifest.parent
        return shard.parents[1].name, str(ShardKey(shard.parent.name, shard.name))

    def stem(self, part: str, report: Mapping[str, Any]) -> str:
        return str(report["generation"])


def committed(folder: Path) -> list[GenerationName]:
    """The committed generations in a part's folder, oldest first; a missing folder has none."""
    names = (GenerationName.of_manifest(path.name) for path in folder.glob("g*.json"))
    return sorted(name for name in names if name)


PARTS: Layout = _Parts()
GENERATIONS: Layout = _Generations()


def layout_of(table: str) -> Layout:
    """How a table's parts lie."""
    known = TABLES.get(table)
    return GENERATIONS if known is not None and known.has_generations else PARTS


def all_manifests(home: Path) -> list[Path]:
    """Every manifest of the workspace: all tables, all generations."""
    tables = [path.name for path in sorted((home / "tables").glob("*/"))]
    kept = [path for table in tables for path in PARTS.manifests(home, table)]
    several = [name for name, table in TABLES.items() if table.has_generations]
    return kept + [path for table in several for path in GENERATIONS.manifests(home, table)]
