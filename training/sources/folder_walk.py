"""Which files of a folder may be images, and which sidecars lie beside each, by names and links; no
file is read."""

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from training.sources import sidecars

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".ico",
    ".cur", ".icns", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".dds", ".exr", ".hdr", ".eps",
    ".xcf", ".raw", ".dng", ".cr2", ".nef", ".arw",
))
# fmt: on
"""Names that claim to be an image. Most of these formats are rejected later, with a reason."""


class Status(NamedTuple):
    """What a file system says of a file, so that a change of it is seen."""

    bytes: int
    modified_ns: int
    kind: int
    """File type bits of st_mode."""
    changed_ns: int
    inode: int
    """With the time of change it tells a file that was replaced by one of equal size and
    modification time."""


class Found(NamedTuple):
    """A candidate and its sidecars."""

    name: bytes
    """Path relative to the root."""
    status: Status
    """Of the file that is read: a link's own where it is not followed."""
    sidecars: tuple[tuple[bytes, Status, bytes], ...]
    """Name relative to the root, status and real path of each, in the order of
    `sidecars.SUFFIXES`."""


class Unused(NamedTuple):
    """A sidecar of no image, or a folder or file that cannot be looked at."""

    name: bytes
    """Path relative to the root."""
    reason: str
    """A value of `tables.Reason`."""
    detail: str
    """One line."""


class _Folder(NamedTuple):
    """What one folder holds, by name relative to the root."""

    files: dict[bytes, Status]
    paths: dict[bytes, bytes]
    """Where each file is read: the target of a link that is followed, else the link itself, which
    is refused."""
    links: set[bytes]
    """Links that are not followed and may mean images, whatever their name."""
    folders: list[tuple[bytes, bytes]]
    """Relative and real path of each."""
    unused: list[Unused]


def walk(root: Path) -> Iterator[Found | Unused]:
    """Candidates below a folder, and what belongs to none, in no particular order.

    A link is followed where it stays inside the folder; a linked folder once, and never one that
    holds the link. Any other link to a folder or to something named like an image, and any pipe or
    device of such a name, is a candidate all the same, so that it is rejected with a reason and
    does not just vanish. Folders are walked whatever their name.
    """
    top = os.fsencode(os.path.realpath(root))
    waiting, followed = [(b"", top)], set[bytes]()
    while waiting:
        name, real = waiting.pop()
        try:
            with os.scandir(real) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Unused(name or b".", "unreadable", f"folder: {error.strerror}")
            continue
        folder = _sort_entries(inside, name, real, top, followed)
        waiting += folder.folders
        yield from folder.unused
        yield from _candidates(folder)


def _sort_entries(
    entries: list["os.DirEntry[bytes]"],
    folder: bytes,
    real: bytes,
    top: bytes,
    followed: set[bytes],
) -> _Folder:
    """The entries of the folder at `folder` below the root and at `real`; links are followed inside
    of `top`."""
    found = _Folder({}, {}, set(), [], [])
    for entry in entries:
        name, path = os.path.join(folder, entry.name), os.path.join(real, entry.name)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            found.unused.append(Unused(name, "unreadable", f"status: {error.strerror}"))
            continue
        if stat.S_ISLNK(status.st_mode):
            leads_to = os.path.realpath(path)
            target = _look(leads_to)
            is_folder = target is not None and stat.S_ISDIR(target.st_mode)
            again = is_folder and (leads_to in followed or is_inside(real, leads_to))
            if target is not None and is_inside(leads_to, top) and not again:
                status, path = target, leads_to
            elif is_folder or (target is None and not os.path.splitext(entry.name)[1]):
                found.links.add(
                    name
                )  # What leads nowhere and has no suffix was a folder, for all that is known.
            if is_folder:
                followed.add(leads_to)
        if stat.S_ISDIR(status.st_mode):
            found.folders.append((name, path))
        else:
            kind = stat.S_IFMT(status.st_mode)
            found.paths[name] = path
            found.files[name] = Status(
                status.st_size, status.st_mtime_ns, kind, status.st_ctime_ns, status.st_ino
            )
    return found


def _look(path: bytes) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _candidates(folder: _Folder) -> Iterator[Found | Unused]:
    """The candidates of one folder with their sidecars, and sidecars of none."""
    beside = _Sidecars(folder.files)
    for name, status in folder.files.items():
        if name in folder.links:
            yield Found(name, status, ())
        elif os.fsdecode(os.path.splitext(name)[1]).lower() in IMAGE_SUFFIXES:
            yield Found(
                name,
                status,
                tuple((side, folder.files[side], folder.paths[side]) for side in beside.of(name)),
            )
    for name in beside.unmatched():
        yield Unused(name, "sidecar_unmatched", "no image of that name beside it")


class _Sidecars:
    """The sidecars of one folder, found whatever the case of their suffix and the Unicode form of
    their name."""

    def __init__(self, names: Iterable[bytes]) -> None:
        self._by_name: dict[tuple[str, str], list[bytes]] = {}
        self._used: set[bytes] = set()
        for name in names:
            stem, suffix = os.path.splitext(os.fsdecode(name))
            if suffix.lower() in sidecars.SUFFIXES:
                self._by_name.setdefault(
                    (unicodedata.normalize("NFC", stem), suffix.lower()), []
                ).append(name)

    def of(self, image: bytes) -> list[bytes]:
        """Those of an image, in the order in which they are read: `a.txt`, `a.png.txt`, and so on
        for each suffix."""
        found = []
        for suffix in sidecars.SUFFIXES:
            for stem in (os.path.splitext(image)[0], image):
                names = self._by_name.get((unicodedata.normalize("NFC", os.fsdecode(stem)), suffix))
                if names:
                    exact = stem + suffix.encode()
                    found.append(exact if exact in names else names[0])
        self._used.update(found)
        return found

    def unmatched(self) -> list[bytes]:
        """Those that no image asked for."""
        return [
            name for names in self._by_name.values() for name in names if name not in self._used
        ]


def is_inside(path: bytes, folder: bytes) -> bool:
    """Whether a real path is that of a folder, or of something in it."""
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")
