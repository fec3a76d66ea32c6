"""A folder of images, read where it lies: its candidates in a stable order, with what their sidecars
say.

What looks like an image by its name is a candidate; whether it is one is decided by its bytes, in
`images`.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.config.workspace import DecodeConfig, SourceConfig
from training.errors import DataError
from training.sources import folder_walk, sidecars
from training.sources.folder_walk import Found, is_inside
from training.sources.source import Listing, Problem, candidate, candidates_frame, own_metadata

_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class FolderSource:
    """All image files below a folder; see `folder_walk.walk`."""

    config: SourceConfig
    root: Path
    limits: DecodeConfig
    """Not looked at here: files are measured where they are decoded."""

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"source {self.config.name!r}: {self.root} is not a folder")

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, times and inodes of all candidates and sidecars, and the
        source's settings."""
        source = self.config
        candidates, problems = _walk(self.root)
        hasher = hashlib.sha256(repr((source.name, source.tags, source.words)).encode())
        for found in candidates:
            for name, status, *_ in ((found.name, found.status), *found.sidecars):
                hasher.update(repr((name, *status)).encode())
        hasher.update(repr(sorted(problems)).encode())
        return hasher.hexdigest()

    def list(self) -> Listing:
        """All candidates with what their sidecars say, ordered by the bytes of the relative path;
        and what was not used of sidecars and folders."""
        candidates, problems = _walk(self.root)
        frame = candidates_frame(_rows(self.config, candidates, problems))
        return Listing(frame, sorted(problems))

    def open(self, locator: str) -> Path:
        """The file, as `readable` finds it."""
        return readable(self.root, locator)


def _walk(root: Path) -> tuple[list[Found], list[Problem]]:
    """Candidates by name, and what is of none."""
    candidates, problems = [], []
    for item in folder_walk.walk(root):
        if isinstance(item, Found):
            candidates.append(item)
        else:
            problems.append(Problem(encode_name(item.name), item.reason, "", item.detail))
    return sorted(candidates), problems


def _rows(
    config: SourceConfig, candidates: list[Found], problems: list[Problem]
) -> Iterator[dict[str, object]]:
    """The candidates as rows of a listing; flaws of their sidecars are added to `problems`."""
    for found in candidates:
        source_id = encode_name(found.name)
        metadata = own_metadata(config)
        names = {Path(os.fsdecode(path)): name for name, _, path in found.sidecars}
        for flaw in sidecars.read(list(names), metadata, config.words):
            path = encode_name(names[flaw.path])
            problems.append(Problem(path, flaw.reason, source_id, flaw.detail))
        yield candidate(
            config,
            source_id,
            metadata,
            locator=source_id,
            num_bytes=found.status.bytes,
            modified_ns=found.status.modified_ns,
        )


def locate(root: Path, locator: str) -> Path:
    """The file that a locator of this folder means.

    Raises:
        DataError: a locator that leads out of the folder.
    """
    name = b"".join(
        bytes([int(part, 16)]) if position % 2 else part.encode()
        for position, part in enumerate(_ESCAPE.split(locator))
    )
    parts = name.split(b"/")
    if not name or b"\0" in name or any(part in (b"", b".", b"..") for part in parts):
        raise DataError(f"locator {locator!r} must be a path inside its folder")
    return root / os.fsdecode(name)


def readable(root: Path, locator: str) -> Path:
    """Where the bytes of a candidate are read: its links resolved, as long as they stay inside the
    folder.

    Of a path that leads out, the link that does is returned, and `images.read_file` refuses it, as
    it does a link to no file.
    """
    path, top = locate(root, locator), os.fsencode(os.path.realpath(root))
    real = os.path.realpath(path)
    if is_inside(os.fsencode(real), top):
        return Path(real) if os.path.isfile(real) or not os.path.islink(path) else path
    above = [
        folder
        for folder in reversed(path.parents)
        if folder.is_relative_to(root) and folder != root
    ]
    leads_out = (at for at in above if not is_inside(os.fsencode(os.path.realpath(at)), top))
    return next(leads_out, path)


def encode_name(name: bytes) -> str:
    """A path as clean printable text: bytes that are not are percent-encoded, and so is a percent
    sign that would read as an encoded byte. `locate` turns it back; different paths give different
    texts.
    """
    text = name.decode("utf-8", "surrogateescape")
    clean = []
    for position, character in enumerate(text):
        escaped = character == "%" and _ESCAPE.match(text, position)
        if character.isprintable() and not escaped:
            clean.append(character)
        else:
            clean += [f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape")]
    return "".join(clean)
