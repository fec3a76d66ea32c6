"""Where a run's latents lie: beside it, or elsewhere, fetched file by file in the order in which
training wants them.

Elsewhere is any folder `latents/<encoding>` that fsspec can read. Manifests and tables are fetched
at the border of an epoch; latent files follow in a thread while training goes on, which also
compares each with its digest, once in this process. Whoever needs one sooner fetches and checks it
at once.
"""

import threading
from collections.abc import Collection, Iterable
from pathlib import Path

import fsspec

from training import commit, manifests
from training.errors import DamageError, DataError
from training.latents.files import LatentFile
from training.latents.generations import Generation, generations, read_generation
from training.manifests import Entry
from training.names import GenerationName

_ATTEMPTS = 3


class LatentSource:
    """The generations of an encoding's shards, as local files."""

    def __init__(self, folder: Path, url: str = "", vae_digest: str = "") -> None:
        """Name the place.

        Args:
            folder: The workspace's `latents/<encoding>`; with `url` the local folder that files are
                fetched into.
            url: Where they come from; empty for `folder` itself.
            vae_digest: Digest of the VAE that must have encoded them; empty for any.

        Raises:
            DataError: fsspec does not know the address, or the folder cannot be listed.
        """
        self.folder, self.url, self._vae_digest = folder, url, vae_digest
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._files = dict[tuple[str, Entry], LatentFile]()
        self._fetched = set[tuple[str, Entry]]()  # and compared with their digests
        if url:
            try:
                self._fs, self._root = fsspec.core.url_to_fs(url)
                self._fs.ls(self._root)
            except (OSError, ValueError, ImportError) as error:
                raise DataError(f"latents_url={url!r} cannot be listed: {error}") from None

    def choose(
        self, shard: str, image_ids: Collection[str]
    ) -> tuple[Generation | None, int, list[str]]:
        """The highest whole generation that holds all `image_ids`.

        Returns:
            The generation and 0, or None and how many images the best one lacks; and a line for
            every higher one that another VAE encoded or whose files are not all there, as while
            another machine copies them.
        """
        folder, wanted = self.folder / shard, set(image_ids)
        fewest, notes = len(wanted), list[str]()
        for number in reversed(self._numbers(shard)):
            if self.url:
                self._fetch_manifest(shard, number)
            generation = read_generation(folder, number)
            problem = self._of_another_vae(generation) or (
                "" if self.url else _incomplete(generation)
            )
            if problem:
                notes.append(problem)
                continue
            lacking = len(wanted.difference(generation.table()["image_id"].to_list()))
            if lacking == 0:
                return generation, 0, notes
            fewest = min(fewest, lacking)
        return None, fewest, notes

    def open(self, shard: str, entry: Entry) -> LatentFile:
        """A latent file, fetched if need be; the same object, with its map, until `keep` lets it
        go.

        Raises:
            DamageError: it is gone, cut or foreign; its digest is compared before its first row is
                read.
        """
        key, folder = (shard, entry), self.folder / shard
        if key in self._files:
            manifests.check_entry(folder, entry, whole=False)
        else:
            self.fetch(shard, entry)
            self._files.setdefault(key, LatentFile(folder, entry, checked=key in self._fetched))
        return self._files[key]

    def keep(self, files: Collection[tuple[str, Entry]]) -> None:
        """Let go of all opened files but these, and end the thread."""
        self.close()
        wanted = set(files)
        self._files = {key: file for key, file in self._files.items() if key in wanted}

    def fetch(self, shard: str, entry: Entry) -> None:
        """Make sure that a content file is there, whole; at once where it lies beside the run
        anyway.

        Raises:
            DamageError: it is not what its manifest says, after three attempts.
        """
        target = self.folder / shard / entry.name
        if not self.url or target.is_file():
            return
        with commit.lock(
            self.folder / ".locks" / f"{shard}.{entry.name}.lock", str(target), wait_s=3600.0
        ):
            for attempt in range(_ATTEMPTS):
                if target.is_file():
                    return
                try:
                    with commit.atomic_file(target) as temporary:
                        self._fs.get_file(f"{self._root}/{shard}/{entry.name}", str(temporary))
                        found = commit.sha256_file(temporary)
                        if found != entry.sha256:
                            raise DamageError(
                                f"{self.url}/{shard}/{entry.name} has SHA-256 {found[:16]}, its manifest says "
                                f"{entry.sha256[:16]}; run `foundry verify --repair` where it was made"
                            )
                        self._fetched.add((shard, entry))
                except (OSError, DamageError):
                    if attempt == _ATTEMPTS - 1:
                        raise

    def prefetch(self, files: Iterable[tuple[str, Entry]]) -> None:
        """Fetch and check files in this order in a thread, in place of whatever it was at
        before."""
        self.close()
        self._end = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(list(files), self._end), name="latent-files", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread after the file in work."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, files: list[tuple[str, Entry]], end: threading.Event) -> None:
        for shard, entry in files:
            if end.is_set():
                return
            try:
                self.open(shard, entry).check()
            except (OSError, DamageError):
                return  # whoever needs the file meets the same error, and can tell of it

    def _of_another_vae(self, generation: Generation) -> str:
        """That it is of another VAE than the run's; empty where it is of the same."""
        found = generation.manifest.models.get("vae", "none")
        if not self._vae_digest or found == self._vae_digest:
            return ""
        return (
            f"{generation.folder.name} {generation.name} was encoded with VAE {found[:16]}, the run's is "
            f"{self._vae_digest[:16]}"
        )

    def _numbers(self, shard: str) -> list[int]:
        """Generations that have a manifest, oldest first."""
        if not self.url:
            return generations(self.folder / shard)
        self._fs.invalidate_cache()
        if not self._fs.isdir(f"{self._root}/{shard}"):
            return []
        names = (
            str(path).rpartition("/")[2]
            for path in self._fs.ls(f"{self._root}/{shard}", detail=False)
        )
        return sorted(found.number for name in names if (found := GenerationName.of_manifest(name)))

    def _fetch_manifest(self, shard: str, number: int) -> None:
        """Fetch a generation's table, and then its manifest."""
        target = self.folder / shard / GenerationName(number).manifest
        if target.is_file():
            return
        content = self._fs.cat_file(f"{self._root}/{shard}/{target.name}")
        manifest = manifests.parse_manifest(content, f"{self.url}/{shard}/{target.name}")
        for entry in manifest.files:
            if entry.name.endswith(".parquet"):
                self.fetch(shard, entry)
        commit.write_bytes(target, content)


def _incomplete(generation: Generation) -> str:
    """What is not there of a generation's files, by size; empty for nothing."""
    for entry in generation.manifest.files:
        path = generation.folder / entry.name
        found = path.stat().st_size if path.is_file() else None
        if found != entry.bytes:
            state = "is missing" if found is None else f"has {found} bytes instead of {entry.bytes}"
            return f"{generation.folder.name} {generation.name} is not whole: {path} {state}"
    return ""
