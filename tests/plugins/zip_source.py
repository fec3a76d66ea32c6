"""Images in a .zip archive, read where it lies: a source from outside the package."""

import hashlib
import zipfile
import zlib
from calendar import timegm
from dataclasses import dataclass
from pathlib import Path

from training.config.workspace import DecodeConfig, SourceConfig
from training.errors import DataError
from training.images.decoding import Unusable
from training.sources.folder import encode_name
from training.sources.folder_walk import IMAGE_SUFFIXES
from training.sources.source import Listing, candidate, candidates_frame, own_metadata


@dataclass(frozen=True, slots=True)
class ZipSource:
    """All members of an archive that are named like an image."""

    config: SourceConfig
    path: Path
    limits: DecodeConfig

    def __post_init__(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise DataError(f"source {self.config.name!r}: {self.path} is not a .zip archive")

    def fingerprint(self) -> str:
        """SHA-256 over the archive's directory and the source's settings."""
        members = [
            (one.filename, one.file_size, one.CRC, one.date_time) for one in _members(self.path)
        ]
        return hashlib.sha256(
            repr((self.config.name, self.config.tags, members)).encode()
        ).hexdigest()

    def list(self) -> Listing:
        """The members in the order of their names, each with the source's tags."""
        metadata = own_metadata(self.config)
        rows = (
            candidate(
                self.config,
                encode_name(member.filename.encode()),
                metadata,
                locator=member.filename,
                num_bytes=member.file_size,
                # An archive counts in steps of two seconds; the checksum tells what it does not.
                modified_ns=timegm((*member.date_time, 0, 0, 0)) * 10**9 + member.CRC,
            )
            for member in _members(self.path)
        )
        return Listing(candidates_frame(rows), [])

    def open(self, locator: str) -> bytes:
        """The content of a member."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                size, limit = archive.getinfo(locator).file_size, self.limits.max_bytes
                if size > limit:
                    raise Unusable("too_many_bytes", value=size, limit=limit)
                return archive.read(locator)
        except KeyError:
            raise Unusable("gone", detail=f"no member of {self.path.name}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
            raise Unusable("unreadable", detail=error) from None


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive that are named like an image, by name; of several of one name the
    last, which is the one that is opened."""
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: one for one in archive.infolist() if not one.is_dir()}
    names = [name for name in members if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return [members[name] for name in sorted(names)]
